"""Set up what this folder needs.

    python install.py               install what is missing from requirements.txt, the host's way (hosts call it so)
    python install.py demo [ARGS]   set up an environment if needed, then decode a photograph in tiles and in strips
    python install.py test [ARGS]   the same set-up, then the tests that are not slow; ARGS go to pytest
    python install.py test slow     the same set-up, then the slow ones

Nothing happens at import.
"""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
NAME = "patchconv"
PYTHON = (3, 10)
TORCH, LEAST_TORCH = "torch==2.13.0", (2, 1)
BESIDE_OLDER = {(2, 6): "diffusers<0.36", (2, 3): "numpy<2"}
"""What goes with a torch below each version: newer diffusers look for `torch.accelerator` when they are imported, and a
torch that was built for NumPy 1 makes no tensors of NumPy 2's arrays."""
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def main(argv: list[str]) -> int:
    """Run one of the three jobs and return its exit code."""
    if sys.version_info < PYTHON:
        return fail(
            f"Python {sys.version.split()[0]} runs this and 3.10 or newer is needed: use python3.10 install.py."
        )
    job, rest = (argv[0], argv[1:]) if argv else ("", [])
    if not job:
        return install_for_host()
    if job in ("-h", "--help"):
        print(__doc__)
        return 0
    if job not in ("demo", "test"):
        return fail(f"{job!r} is not a job: use 'demo', 'test' or nothing.", 2)
    python = environment_python()
    if Path(python) != Path(sys.executable):
        return run_in_venv(python, argv)
    code = set_up(job)
    if code:
        return code
    if job == "demo":
        return call([sys.executable, "-m", "comfyui_patchconv", "demo", *rest])
    if rest in ([], ["slow"]):  # one process a core, each of which computes on one; one line says how far they are
        kind = "slow" if rest else "not slow"
        rest = ["-n", "auto", "--dist", "worksteal", "-q", "--disable-warnings", "-p", "percentages", "-m", kind]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        folders = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(folder for folder in folders if folder)
    # Not `python -m pytest`: that puts this folder on the path, and the hosts have a module `nodes` too.
    return call([str(Path(sysconfig.get_path("scripts"), "pytest")), *rest], cwd=ROOT)


def install_for_host() -> int:
    """Install what the host's Python lacks of requirements.txt; quick when that is nothing."""
    missing = [line for line in requirements(ROOT / "requirements.txt") if not met(line)]
    if not missing:
        return 0
    run_pip = webui_pip()
    if run_pip is None:
        return pip(f"Installing {', '.join(missing)}", "install", *missing)
    for line in missing:
        run_pip(f'install "{line}"', f"{line} for Patch Conv")
    return 0


def webui_pip():
    """`launch.run_pip` where Automatic1111's WebUI or Forge runs this, else None."""
    if "launch" not in sys.modules:
        spec = importlib.util.find_spec("launch")
        # Others have a module of this name too (ROS): the WebUI's lies beside webui.py.
        if spec is None or not spec.origin or not Path(spec.origin).with_name("webui.py").exists():
            return None
    import launch  # pyright: ignore[reportMissingImports]

    return getattr(launch, "run_pip", None)


def requirements(path: Path) -> list[str]:
    """The requirements in a file like requirements.txt, without comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def met(requirement: str) -> bool:
    """Whether what is installed satisfies `requirement`, such as `safetensors>=0.4`; extras are not looked into."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return met_simply(requirement)
    wanted = Requirement(requirement)
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return True
    version = installed(wanted.name)
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def met_simply(requirement: str) -> bool:
    """`met` without `packaging`: a name, or a name and a least version."""
    found = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(?:>=\s*([0-9.]+))?", requirement)
    if found is None:
        return False  # pip understands more, and finds out
    version = installed(found[1])
    return version is not None and numbers(version) >= numbers(found[2] or "0")


def installed(name: str) -> str | None:
    """The version of the distribution `name`, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.13.0+cpu` is (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def environment_python() -> str:
    """The Python that `demo` and `test` use: this one in an environment (venv, conda), else that of `.venv`."""
    if sys.prefix != sys.base_prefix or Path(sys.prefix, "conda-meta").is_dir():
        return sys.executable
    return str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def run_in_venv(python: str, argv: list[str]) -> int:
    """Run this file again in `.venv`, which is made first where it is missing."""
    make = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    if runs(python, ""):
        make = [python, "-m", "ensurepip"]  # uv's have no pip, and what an interrupted run has left
    if not runs(python, "import pip"):
        say(f"Making the environment {VENV}")
        if call(make):
            return fail(
                f"{sys.executable} cannot make an environment: install its venv module (on Debian and Ubuntu: "
                "apt install python3-venv), or run this in an environment of your own."
            )
    return call([python, str(Path(__file__).resolve()), *argv])


def runs(python: str, code: str) -> bool:
    """Whether `python` runs `code` without an error."""
    if not Path(python).exists():
        return False
    return subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def set_up(extra: str) -> int:
    """Install torch where it is missing, and this folder with the requirements of `extra`; quick when all is there."""
    version = installed("torch")
    if version is None and importlib.util.find_spec("torch") is None:
        size = "about 200 MB to load, 800 on the disk" if cpu_only() else "with CUDA several GB to load"
        code = pip(f"Installing torch ({size})", "install", TORCH, *cpu_only())
        if code:
            return code
    elif version is not None and numbers(version) < LEAST_TORCH:
        return fail(f"torch {version} is installed here and 2.1 or newer is needed: update it, or use another Python.")
    if ready(extra):
        return 0
    message = f"Installing this folder and what the {extra} needs (50 to 100 MB to load)"
    return pip(message, "install", "--editable", f"{ROOT}[{extra}]", *beside(installed("torch")))


def beside(torch: str | None) -> list[str]:
    """What pip has to keep to where torch of this version is installed: that very torch, and what goes with it. Nothing
    where it is not known."""
    if torch is None:
        return []
    return [f"torch=={torch}", *(wanted for newer, wanted in BESIDE_OLDER.items() if numbers(torch) < newer)]


def cpu_only() -> list[str]:
    """Where pip may find a torch without gigabytes of CUDA, for a Linux machine that has no use for it."""
    nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if sys.platform != "linux" or nvidia:
        return []
    return ["--extra-index-url", CPU_WHEELS, "--retries", "1"]


def ready(extra: str) -> bool:
    """Whether this folder is installed, as pyproject.toml has it now, with all that `extra` asks for."""
    try:
        from packaging.requirements import Requirement

        package = metadata.distribution(NAME)
        origin = json.loads(package.read_text("direct_url.json") or "{}")
        since = Path(str(package.locate_file(""))).joinpath(f"{NAME}-{package.version}.dist-info").stat().st_mtime
    except (ImportError, OSError, ValueError):
        return False
    if origin.get("url") != ROOT.as_uri() or not origin.get("dir_info", {}).get("editable"):
        return False
    if ROOT.joinpath("pyproject.toml").stat().st_mtime > since:
        return False
    extras, seen = [extra], set()
    while extras:
        seen.add(current := extras.pop())
        for line in package.requires or ():
            wanted = Requirement(line)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": current}):
                continue
            if wanted.name == NAME:
                extras.extend(wanted.extras - seen)
            elif not met(str(wanted).split(";")[0]):
                return False
    return True


def pip(message: str, *arguments: str) -> int:
    """Run this Python's pip, on one line with how long it takes; what pip says is shown only where it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    began, shown = time.monotonic(), sys.stdout.isatty()
    say(message, "" if shown else "\n")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while True:
            try:
                code = process.wait(1)
                break
            except subprocess.TimeoutExpired:
                if shown:
                    say(f"{message} … {time.monotonic() - began:.0f} s", "", "\r")
            except KeyboardInterrupt:
                continue  # it has had the same signal: wait for it to end
        if shown:
            print(flush=True)
        if code:
            said.seek(0)
            sys.stderr.write(said.read())
    return code if code >= 0 else 128 - code


def call(command: list[str], cwd: Path | None = None) -> int:
    """Run `command` and return its exit code, that of an interrupted one too."""
    process = subprocess.Popen(command, cwd=cwd)
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            continue  # it has had the same signal: wait for it to end


def say(message: str, end: str = "\n", begin: str = "") -> None:
    print(f"{begin}install.py: {message}", end=end, flush=True)


def fail(message: str, code: int = 1) -> int:
    print(f"install.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
