"""Processes that tests start."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import pytest

LIMIT = 1800.0
"""Seconds after which a process is taken to hang: a busy machine may be slow."""

COMMAND_LINE = "import sys; from comfyui_patchconv import cli; sys.exit(cli.main())"


RANKS = 3

LAUNCH = f"""
import os, socket, sys
from comfyui_patchconv import cli

def end(code):  # at once: taking all of a copied process apart takes longer than the test
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

os.setsid()
with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    port = unused.getsockname()[1]
processes = []
for rank in range({RANKS}):
    process = os.fork()
    if not process:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                           WORLD_SIZE="{RANKS}", LOCAL_WORLD_SIZE="{RANKS}")
        end(cli.main())
    processes.append(process)
end(max(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes))
"""
"""Runs the command line in so many processes, as torchrun does."""


def until(ready: Callable[[], object], every: float = 0.01) -> None:
    """Wait for `ready` to say so, however busy the machine is. Raises TimeoutError where it never does.

    every: seconds between two looks.
    """
    end = time.monotonic() + LIMIT
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"what is waited for has not come after {LIMIT:g} s")
        time.sleep(every)


def environment(**more: object) -> dict[str, str]:
    """For a process that finds this package, and before it what PYTHONPATH in `more` names."""
    folders = [more.pop("PYTHONPATH", ""), Path(__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(str(folder) for folder in folders if folder)
    one = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "COLUMNS": "200", "PYTHONPATH": path}
    return os.environ | one | {name: str(value) for name, value in more.items()}


def ended(command: Sequence[Any], folder: Optional[Path] = None, **more: object) -> subprocess.CompletedProcess[str]:
    """Start Python with these arguments and wait for its end."""
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment(**more), capture_output=True, text=True,
        timeout=LIMIT,
    )  # fmt: skip


class Ready:
    """A Python that has imported the command line: copies of it run programs at once, one after the other."""

    def __init__(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this system has no os.fork, by which a process is copied")
        command = [sys.executable, str(Path(__file__).with_name("ready.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def start(self, arguments: Sequence[Any], code: str = COMMAND_LINE, folder: Optional[Path] = None,
              **more: object) -> Copy:  # fmt: skip
        """Run `code`, the command line by default, in a copy."""
        return Copy(self._process, [str(one) for one in arguments], code, folder or Path.cwd(), more)

    def ended(self, arguments: Sequence[Any], code: str = COMMAND_LINE, folder: Optional[Path] = None,
              **more: object) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """The same, and wait for its end."""
        return self.start(arguments, code, folder, **more).wait()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Copy:
    """A program that runs in a copy of a `Ready`."""

    def __init__(
        self, parent: subprocess.Popen[str], arguments: list[str], code: str, folder: Path, more: Mapping[str, object]
    ) -> None:
        self._parent, self._folder = parent, tempfile.TemporaryDirectory()
        self._prints = [Path(self._folder.name, name) for name in ("out", "err")]
        asked = {
            "code": code, "arguments": arguments, "folder": str(folder),
            "environment": {name: str(value) for name, value in more.items()},
            "prints": [str(path) for path in self._prints],
        }  # fmt: skip
        assert parent.stdin is not None
        print(json.dumps(asked), file=parent.stdin, flush=True)
        self.arguments, self.number = arguments, int(self._line())

    def has_ended(self) -> bool:
        assert self._parent.stdout is not None
        return bool(select.select([self._parent.stdout], [], [], 0)[0])

    def kill(self) -> None:
        """By SIGKILL, unless it has ended."""
        if not self.has_ended():
            os.kill(self.number, signal.SIGKILL)

    def wait(self) -> subprocess.CompletedProcess[str]:
        code = os.waitstatus_to_exitcode(int(self._line()))
        out, err = (path.read_text() for path in self._prints)
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.arguments, code, out, err)

    def _line(self) -> str:
        """What the parent says next."""
        assert self._parent.stdout is not None
        if not select.select([self._parent.stdout], [], [], LIMIT)[0]:
            self._parent.kill()
            raise TimeoutError(f"{self.arguments} has not ended after {LIMIT:g} s")
        return self._parent.stdout.readline()
