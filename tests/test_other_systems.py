"""What Windows and macOS have not is done without: some of the tests again, in a process that lacks it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LIMIT, environment

TESTS = Path(__file__).parent

AGAIN = ["files/test_atomic.py", "memory/test_mapped.py", "memory/test_recorder.py", "streaming/test_offloaded.py",
         "cli/test_outputs.py", "hosts/test_devices.py", "conv/test_limits.py"]  # fmt: skip
"""What depends on the system most."""


def again(system: str, *arguments: str) -> str:
    """What pytest says of tests in a process that lacks what `system` has not."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "other_system", "--lacking", system, *arguments]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment(PYTHONPATH=TESTS), capture_output=True, text=True, timeout=2 * LIMIT
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("system", ["macos", "windows"])
def test_it_works_without_what_another_system_has_not(system: str) -> None:
    said = again(system, "-m", "not slow", *(str(TESTS / path) for path in AGAIN))
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None
    assert int(passed[1]) > 150


@pytest.mark.slow
def test_every_test_can_be_collected_on_windows() -> None:
    assert re.search(r"\d{4,} tests collected", again("windows", "--collect-only", str(TESTS)))


def test_what_is_taken_away_was_there() -> None:
    """Else the names have changed, and nothing is shown."""
    if not sys.platform.startswith("linux"):
        pytest.skip("this system is one that lacks it")
    code = (
        "import mmap, os, signal, sys; sys.path.insert(0, sys.argv[1]); import other_system\n"
        "missing = [name for one in other_system.LACKING.values() for module, names in one.items()\n"
        "           for name in names.split() if not hasattr(module, name)]\n"
        "print(missing)\n"
        "other_system.take_away('windows')\n"
        "print(*(hasattr(os, name) for name in ('fork', 'pwrite', 'posix_fallocate')), hasattr(signal, 'SIGKILL'))"
    )
    command = [sys.executable, "-c", code, str(TESTS)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout.splitlines() == ["[]", "False False False False"], done.stderr
    assert hasattr(os, "fork")
