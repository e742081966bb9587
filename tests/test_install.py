"""Setting up: quick and silent where all is there, and only what is missing where it is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from processes import LIMIT

import install

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "pip", "numpy", "diffusers", "safetensors"}


def start(*argv: str, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *argv], env={**os.environ, **environment}, capture_output=True, text=True, timeout=LIMIT
    )


# A host's call


def test_with_all_there_it_is_quick_and_silent_and_imports_nothing_heavy() -> None:
    before = os.times()
    done = start("-X", "importtime", str(ROOT / "install.py"))
    after = os.times()
    assert done.returncode == 0
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert all(line.startswith("import time:") for line in lines)
    imported = {line.split("|")[-1].strip() for line in lines}
    assert "importlib.metadata" in imported
    assert not {name.split(".")[0] for name in imported} & HEAVY
    # Of the processor's time, whatever else it does; Windows does not tell a child's.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


@pytest.fixture
def missing(tmp_path: Path) -> Path:
    """A copy of this folder's `install.py` whose one requirement is nowhere to be had."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "install.py").write_text((ROOT / "install.py").read_text())
    (tmp_path / "ours" / "requirements.txt").write_text(
        "# a comment\nsafetensors>=0.4\n\npatchconv-no-such>=9  # why\n"
    )
    return tmp_path / "ours" / "install.py"


def webui(folder: Path, launcher: bool = True) -> str:
    folder.mkdir()
    (folder / "launch.py").write_text("def run_pip(command, desc=None):\n    print('run_pip', command, '|', desc)\n")
    if launcher:
        (folder / "webui.py").write_text("")
    return str(folder)


def test_the_webuis_pip_installs_what_is_missing_and_only_that(tmp_path: Path, missing: Path) -> None:
    done = start(str(missing), PYTHONPATH=webui(tmp_path / "webui"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'run_pip install "patchconv-no-such>=9" | patchconv-no-such>=9 for Patch Conv\n'


@pytest.mark.parametrize("launcher", [True, False])
def test_outside_the_webui_pip_is_run(tmp_path: Path, missing: Path, launcher: bool) -> None:
    """A module `launch` without a `webui.py` beside it is somebody else's."""
    path = webui(tmp_path / "ros", launcher=False) if launcher else ""
    done = start(str(missing), PYTHONPATH=path, PIP_NO_INDEX="1")
    assert done.returncode == 1
    assert "run_pip" not in done.stdout
    assert "patchconv-no-such>=9" in done.stderr
    assert "safetensors" not in done.stderr


@pytest.mark.parametrize("code", [0, 7])
def test_pips_exit_code_is_handed_on_and_what_it_says_only_where_it_fails(
    tmp_path: Path, missing: Path, code: int
) -> None:
    local = tmp_path / "local"
    (local / "pip").mkdir(parents=True)
    (local / "pip" / "__init__.py").touch()
    (local / "pip" / "__main__.py").write_text(f"import sys\nprint(sys.argv[1:])\nsys.exit({code})\n")
    done = start(str(missing), PYTHONPATH=str(local))
    assert done.returncode == code
    assert done.stdout == "install.py: Installing patchconv-no-such>=9\n"
    assert done.stderr == ("['--disable-pip-version-check', 'install', 'patchconv-no-such>=9']\n" if code else "")


def test_torch_is_never_among_what_a_host_is_given() -> None:
    wanted = {install.re.split(r"[^A-Za-z0-9._-]", line)[0] for line in install.requirements(ROOT / "requirements.txt")}
    assert wanted
    assert not wanted & {"torch", "torchvision", "torchaudio", "diffusers", "xformers", "numpy"}
    for name in wanted:
        needs = metadata.requires(name) or []
        assert not [line for line in needs if line.startswith("torch") and "extra ==" not in line]


# What is missing


@pytest.mark.parametrize("met", [install.met, install.met_simply])
@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("safetensors", True),
        ("safetensors>=0.0.1", True),
        ("safetensors >= 0.4", True),
        ("safetensors>=999", False),
        ("patchconv-no-such", False),
        ("patchconv-no-such>=1", False),
    ],
)
def test_a_requirement_is_met_by_what_is_installed(
    met: Callable[[str], bool], requirement: str, expected: bool
) -> None:
    assert met(requirement) is expected


def test_a_requirement_is_met_by_exactly_its_version() -> None:
    version = metadata.version("safetensors")
    assert install.met(f"safetensors=={version}")
    assert install.met(f"safetensors>={version}")
    assert install.met_simply(f"safetensors>={version}")
    assert not install.met(f"safetensors!={version}")
    assert not install.met_simply(f"safetensors!={version}")  # left to pip


def test_a_requirement_for_other_systems_is_met() -> None:
    assert install.met("patchconv-no-such; sys_platform == 'amiga'")
    assert not install.met("patchconv-no-such; python_version >= '3'")


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.13.0+cpu", (2, 13, 0)), ("0.4", (0, 4)), ("1.0rc1", (1, 0)), ("3.0.dev2", (3, 0)), ("weekly", ())],
)
def test_the_numbers_of_a_version(version: str, expected: tuple[int, ...]) -> None:
    assert install.numbers(version) == expected


def test_comments_and_empty_lines_are_no_requirements(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("# all\n\n  a>=1  # why\nb\n")
    assert install.requirements(tmp_path / "r.txt") == ["a>=1", "b"]


# demo and test


def test_an_unknown_job_is_one_sentence() -> None:
    done = start(str(ROOT / "install.py"), "tset")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "install.py: 'tset' is not a job: use 'demo', 'test' or nothing.\n"


@pytest.mark.parametrize(
    ("given", "kind"), [([], "not slow"), (["slow"], "slow"), (["-k", "geometry"], None)], ids=["", "slow", "some"]
)
def test_tests_are_all_that_are_not_slow_or_the_slow_ones_or_what_is_asked_for(
    given: list[str], kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(install, "environment_python", lambda: sys.executable)
    monkeypatch.setattr(install, "set_up", lambda job: 0)
    monkeypatch.setattr(install, "call", lambda command, **_: started.append(command) or 0)
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")  # and back
    assert install.main(["test", *given]) == 0
    assert started[0][1:] == given if kind is None else started[0][-2:] == ["-m", kind]


def chosen(python: str) -> Path:
    code = "import install; print(install.environment_python())"
    done = start("-c", code, python=python, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def base_python() -> Path:
    return Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")


@pytest.mark.skipif(not base_python().exists(), reason="this environment's own Python is not where Unix has it")
@pytest.mark.parametrize("conda", [None, "/opt/conda/envs/another"])
def test_outside_an_environment_it_is_venv(conda: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where conda has activated another environment than this Python's."""
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    if conda is not None:
        monkeypatch.setenv("CONDA_PREFIX", conda)
    assert chosen(str(base_python())).is_relative_to(ROOT / ".venv")


def test_inside_an_environment_it_is_that_one(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    python = next(path for path in (tmp_path / "venv").glob("*/python*") if path.stem == "python")
    assert chosen(str(python)) == python


def test_an_environment_without_pip_is_kept_and_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    venv.create(tmp_path / ".venv", symlinks=os.name != "nt")
    (tmp_path / ".venv" / "mine").write_text("kept")
    python = next(str(path) for path in (tmp_path / ".venv").glob("*/python*") if path.stem == "python")
    assert not install.runs(python, "import pip")
    assert install.run_in_venv(python, ["tset"]) == 2
    assert install.runs(python, "import pip")
    assert (tmp_path / ".venv" / "mine").read_text() == "kept"


def test_an_environment_of_a_python_since_removed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(tmp_path / "gone")
    assert install.run_in_venv(str(python), ["tset"]) == 2
    assert install.runs(str(python), "import pip")


@pytest.mark.parametrize(("version", "code"), [("3.9.19", 1), ("3.10.0", 2)])
def test_an_old_python_is_told_so(
    version: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", tuple(map(int, version.split("."))))
    monkeypatch.setattr(sys, "version", f"{version} (main)")
    assert install.main(["tset"]) == code
    assert ("Python 3.9.19 runs this" in capsys.readouterr().err) is (code == 1)


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ("2.13.0+cpu", ["torch==2.13.0+cpu"]),
        ("2.6.0", ["torch==2.6.0"]),
        ("2.5.1", ["torch==2.5.1", "diffusers<0.36"]),
        ("2.3.0", ["torch==2.3.0", "diffusers<0.36"]),
        ("2.2.2", ["torch==2.2.2", "diffusers<0.36", "numpy<2"]),
        ("2.1.2+cu121", ["torch==2.1.2+cu121", "diffusers<0.36", "numpy<2"]),
        (None, []),
    ],
)
def test_the_torch_that_is_there_stays_and_gets_what_goes_with_it(
    torch: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tests need would have pip replace an old torch, and the newest diffusers and NumPy ask for a newer one."""
    asked: list[str] = []
    monkeypatch.setattr(install, "pip", lambda message, *arguments: asked.extend(arguments) or 0)
    monkeypatch.setattr(install, "installed", lambda name: torch)
    monkeypatch.setattr(install, "ready", lambda extra: False)
    assert install.set_up("demo") == 0
    assert asked == ["install", "--editable", f"{ROOT}[demo]", *expected]


@pytest.mark.parametrize(("torch", "triton"), [("2.1.2", "2.1.0"), ("2.5.1", "3.1.0"), ("2.13.0", "3.7.1")])
def test_what_tests_need_is_met_beside_the_triton_of_a_torch_for_cuda(torch: str, triton: str) -> None:
    """Such a torch asks for one Triton and no other: pip refuses a second wish, or replaces torch."""
    requirements = pytest.importorskip("packaging.requirements", reason="packaging is not installed")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = [requirements.Requirement(line) for line in re.findall(r'"(triton\b[^"]*)"', project)]
    assert wanted
    assert all(one.specifier.contains(triton) for one in wanted), f"torch {torch} comes with Triton {triton}"


def test_a_machine_with_an_nvidia_gpu_gets_the_usual_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux" or Path("/proc/driver/nvidia/version").exists():
        pytest.skip("only a Linux machine without a GPU can show both cases")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.CPU_WHEELS in install.cpu_only()
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert install.cpu_only() == []
