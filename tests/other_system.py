"""A plugin that takes away, of Linux, what Windows or macOS has not: `-p other_system --lacking windows`, with tests/
on the path of Python. What then fails would fail there.

It shows what Python and the C library lack, not how another system's file names, processes or drivers behave; but a
file that is open is neither replaced nor removed, as on Windows. Processes that tests start have all of Linux.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest

LACKING: dict[str, dict[Any, str]] = {
    "macos": {
        os: "posix_fallocate O_TMPFILE sched_getaffinity sched_setaffinity memfd_create",
        mmap: "MADV_REMOVE MAP_POPULATE",
    },
    "windows": {
        os: "fork forkpty posix_fallocate pwrite pread O_TMPFILE O_CLOEXEC O_DIRECTORY fchmod mkfifo "
        "setsid killpg getpgid sched_getaffinity sched_setaffinity memfd_create wait "
        "WTERMSIG WIFSIGNALED WEXITSTATUS",
        mmap: "MADV_REMOVE MAP_PRIVATE MAP_ANONYMOUS MAP_SHARED MAP_POPULATE PROT_READ PROT_WRITE",
        signal: "SIGKILL SIGSTOP SIGCONT SIGHUP SIGUSR1 SIGUSR2 SIGXFSZ SIGALRM SIGPIPE setitimer alarm",
    },
}
"""By what `--lacking` names: of each module what it has not there."""

MODULES = {"macos": (), "windows": ("resource", "termios", "pty")}
"""Modules of Python's library that are not there."""

_FILES_OF_LINUX = ("/proc", "/dev/shm")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--lacking`."""
    parser.addoption("--lacking", choices=sorted(LACKING), help="take away what this system has not")


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before any test is imported, and after what tests start processes with."""
    system = early_config.known_args_namespace.lacking
    if system is not None:
        take_away(system)


def take_away(system: str) -> None:
    """Take away from this process what `system` has not."""
    import multiprocessing.util  # noqa: F401 - and others that look at what there is when they are imported
    import shutil  # noqa: F401

    import torch.utils.data  # noqa: F401

    for module, names in LACKING[system].items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    for name in MODULES[system]:
        sys.modules[name] = None  # type: ignore[assignment]
    tempfile._O_TMPFILE_WORKS = False  # type: ignore[attr-defined]
    for name in ("exists", "is_dir", "is_file", "open", "iterdir", "read_text", "write_text"):
        setattr(
            Path, name, _without_files_of_linux(getattr(Path, name), not_there=name in ("exists", "is_dir", "is_file"))
        )
    os.path.isdir = _without_files_of_linux(os.path.isdir, not_there=True)  # type: ignore[assignment]
    _without_malloc_trim(system)
    if system == "windows":
        subprocess.Popen.kill = lambda process: process.send_signal(_KILL)  # type: ignore[method-assign]
        _with_peaks_by_psutil()
        _with_open_files_that_stay()
        select.select = _sockets_alone  # type: ignore[assignment]


def _without_files_of_linux(function: Callable[..., Any], not_there: bool) -> Callable[..., Any]:
    def without(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith(_FILES_OF_LINUX):
            if not_there:
                return False
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return function(path, *args, **kwargs)

    return without


def _with_peaks_by_psutil() -> None:
    """On Windows psutil knows the most memory that a process has had."""
    from comfyui_patchconv.memory import usage

    class Info(NamedTuple):
        rss: int
        peak_wset: int

    of_linux = psutil.Process.memory_info

    def memory_info(process: psutil.Process) -> Info:
        return Info(of_linux(process).rss, _rusage(_RUSAGE_SELF).ru_maxrss * 1024)

    psutil.Process.memory_info = memory_info  # type: ignore[assignment]
    usage.sys = SimpleNamespace(platform="win32")  # type: ignore[assignment]


def _without_malloc_trim(system: str) -> None:
    loaded = ctypes.CDLL

    class Library:
        """A C library without calls of its own."""

    def library(name: Any, *args: Any, **kwargs: Any) -> Any:
        if name is not None:
            return loaded(name, *args, **kwargs)
        if system == "windows":
            raise TypeError("bad argument type for built-in operation")
        return Library()

    ctypes.CDLL = library  # type: ignore[assignment, misc]


def _with_open_files_that_stay() -> None:
    """Windows neither replaces nor removes a file that is open or mapped, and opens no folder."""
    opened = builtins.open
    opened_by_number: Any = os.open

    def refuse(path: Any) -> None:
        held = os.path.realpath(os.fsdecode(path))
        with opened("/proc/self/maps") as maps:
            mapped = any(line.rstrip().endswith(f" {held}") for line in maps)
        if mapped or any(_link(number) == held for number in os.listdir("/proc/self/fd")):
            raise PermissionError(errno.EACCES, "It is being used by another process", held)

    def guarded(function: Callable[..., Any], places: int) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            by = sys._getframe(1).f_globals.get("__name__")
            if by != "tempfile" and "dir_fd" not in kwargs:  # its files go there when they are closed
                for path in args[:places]:
                    if isinstance(path, (str, bytes, os.PathLike)) and os.path.isfile(path):
                        refuse(path)
            return function(*args, **kwargs)

        return checked

    def open_no_folder(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if isinstance(path, (str, bytes, os.PathLike)) and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))
        return opened_by_number(path, flags, *args, **kwargs)

    for name, places in (("replace", 2), ("rename", 2), ("unlink", 1), ("remove", 1)):
        setattr(os, name, guarded(getattr(os, name), places))
    os.open = open_no_folder  # type: ignore[assignment]


def _link(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


_select = select.select
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
try:
    from resource import RUSAGE_SELF as _RUSAGE_SELF
    from resource import getrusage as _rusage
except ImportError:  # this is Windows
    pass


def _sockets_alone(readers: Any, writers: Any, others: Any, timeout: Any = None) -> Any:
    for one in (*readers, *writers, *others):
        if not hasattr(one, "getsockname"):
            raise OSError(errno.ENOTSOCK, "An operation was attempted on something that is not a socket")
    return _select(readers, writers, others, timeout)
