"""What is handed out: the wheel, the sdist, and what the Comfy registry packs, built from this checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = {
    path.relative_to(ROOT).as_posix()
    for pattern in ("**/*.py", "data/*")
    for path in (ROOT / "comfyui_patchconv").glob(pattern)
}
HOSTS_OWN = (".github/", ".gitattributes", ".gitignore")
"""What only the repository's host has a use for."""


def _git(*arguments: str) -> set[str]:
    """Paths that `git ls-files` names. A skip where this is no checkout, as in an unpacked sdist."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the project is not known")
    command = ["git", "ls-files", "-z", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}


def _sources() -> set[str]:
    return _git("--cached", "--others", "--exclude-standard")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of a copy of what belongs to the project."""
    folder = tmp_path_factory.mktemp("distribution")
    for name in _sources():
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_core_and_nothing_else(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2] for name in wheel.namelist()} - {""}
        commands = wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))).decode()
    assert names == CORE
    assert {"METADATA", "RECORD", "licenses/LICENSE"} <= about
    assert "patchconv = comfyui_patchconv.cli:main" in commands


@pytest.mark.slow
def test_the_sdist_holds_all_that_the_tests_need(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert names - made == {name for name in _sources() if not name.startswith(HOSTS_OWN)}


def test_the_registry_packs_what_comfyui_loads() -> None:
    left_out = _git("--cached", "--others", "--ignored", "--exclude-from=.comfyignore")
    packed = _sources() - left_out
    whole = ("comfyui_patchconv", "nodes", "web", "example_workflows")
    for folder in whole:
        assert {name for name in _sources() if name.startswith(f"{folder}/")} <= packed, folder
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "install.py", "README.md", "LICENSE"} <= packed
    assert {name for name in _sources() if name.startswith("locales/") and name.endswith(".json")} <= packed
    others = {name.partition("/")[0] for name in packed if "/" in name} - {*whole, "locales"}
    assert not others


def _pythons(text: str) -> set[str]:
    return set(re.findall(r"\b3\.\d\d\b", text))


def test_pythons_are_the_same_everywhere() -> None:
    """What is declared is what is tested, and what pages tell: the oldest and the newest on each system."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = {found for found in _pythons(project) if f"Python :: {found}" in project}
    (row,) = re.findall(
        r"^\| Python \| (.+) \|$", (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8"), re.M
    )
    assert _pythons(row) == declared
    order = sorted(declared, key=lambda version: int(version[2:]))
    assert f'requires-python = ">={order[0]}"' in project
    workflow = ROOT / ".github" / "workflows" / "tests.yml"
    if not workflow.exists():
        pytest.skip("the repository's host's own files are not here")
    tested = re.findall(r"^ +python: \[(.+)\]$", workflow.read_text(encoding="utf-8"), re.M)
    assert [_pythons(one) for one in tested] == [{order[0], order[-1]}] * 2
