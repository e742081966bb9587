"""All of it on a device that is not the CPU, and what a GPU does not forgive: tensors that lie on the other side.

The device is the CPU's memory under another name, so it is no faster than a GPU that is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import LIMIT

HERE = Path(__file__).parent
SOURCE = HERE / "device.cpp"


@pytest.fixture(scope="session")
def answers(pytestconfig: pytest.Config) -> dict[str, dict[str, Any]]:
    """In a process of its own: a device stays until that ends."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    ninja = pytest.importorskip("ninja", reason="ninja, which builds the device, is not installed: pip install ninja")
    if sys.platform == "win32":
        pytest.skip("torch builds what extends it by a compiler here that is not on the path")
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler (c++) to build the device with")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip(f"torch is {torch.__version__}: what a device has to define is another thing before 2.13")
    built_of = f"{SOURCE.read_text(encoding='utf-8')} {torch.__version__} {sys.version}".encode()
    folder = pytestconfig.cache.mkdir(f"second_device_{hashlib.sha256(built_of).hexdigest()[:16]}")
    command = [sys.executable, str(HERE / "run.py"), str(folder)]
    environment = os.environ | {
        "PATH": os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]]),
        "PYTHONPATH": str(HERE.parents[1]),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("part", "tolerance", "least"),
    [
        ("models", 1e-5, 48), ("networks", 1e-9, 40), ("layers", 1e-5, 8), ("ranks", 1e-5, 4), ("workers", 1e-5, 2),
        ("pixel_models", 1e-5, 3), ("videos", 1e-5, 4), ("sizes", 0, 1),
    ],
)  # fmt: skip
def test_it_gives_what_the_cpu_gives(
    answers: dict[str, dict[str, Any]], part: str, tolerance: float, least: int
) -> None:
    found = answers[part]
    wrong = {name: value for name, value in found.items() if not isinstance(value, float) or value > tolerance}
    assert not wrong
    assert len(found) >= least


def test_it_takes_what_plans_say(answers: dict[str, dict[str, Any]]) -> None:
    """The workspace of convolutions is in a plan and not in this device's count, so plans are above it."""
    for name, figures in answers["peaks"].items():
        print(name, figures)
        assert 0.5 * figures["plan"] < figures["peak"] <= 1.05 * figures["plan"]
    for method in ("decode", "encode", "forward"):
        assert any(figures["offloaded"] for name, figures in answers["peaks"].items() if name.startswith(method))


def test_the_host_waits_for_nothing_within_a_sweep(answers: dict[str, dict[str, Any]]) -> None:
    found = answers["waits"]
    assert found.pop("noted") == 2
    assert all(one["passes"] > 0 for one in found.values())
    assert {name: one["waits"] for name, one in found.items()} == {"decode": "", "encode": "", "forward": ""}
