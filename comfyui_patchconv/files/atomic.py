"""Files written whole or not at all: what was there stays as it was until the new file is complete and on the disk."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Optional

from ..memory.errors import is_out_of_memory
from .words import short

Write = Callable[[BinaryIO], object]
"""Writes a whole file into one that is open and empty."""


_OPEN_FILES = "/proc/self/fd"


def write_whole(path: str | os.PathLike[str], write: Write) -> None:
    """Have `write` write a file beside `path`, and put it in the place of `path` by rename once it is on the disk.

    Where that fails or ends early, on a full disk, by Ctrl-C or by a kill, `path` is as it was. The file beside it has
    no name until it is whole, where the system can do that (Linux, most file systems); elsewhere a kill leaves a hidden
    `.….part`. A link stays one: the file that it points to is replaced, and keeps its permissions.

    Raises OSError if the file cannot be written, and what `write` raises.
    """
    target, mode = _replaced(path)
    try:
        with _beside(target) as (file, put):
            write(file)
            file.flush()
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            put()
        _sync_folder(target.parent)
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise OSError(
            f"{path} cannot be written ({reason}), and what was there is as it was: is there space, and may you write "
            "there?"
        ) from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises OSError where `write_whole` could not write `path`, whatever is to be written."""
    target, _ = _replaced(path)
    reason = _refusal(target.parent)
    if reason is not None:
        raise OSError(f"{path} cannot be written (nothing can be, in {target.parent}: {reason}): use another folder.")


def _replaced(path: str | os.PathLike[str]) -> tuple[Path, Optional[int]]:
    """The file that writing `path` replaces, or makes, and its permissions, None where there is none yet."""
    target = Path(os.path.realpath(path))
    mode = _mode_of(target, path)
    if not target.parent.is_dir():
        raise OSError(f"{path} cannot be written (the folder {target.parent} does not exist): create it first.")
    return target, mode


def check_folder_writable(folder: Path) -> None:
    """Raises OSError where no file can be made in `folder`, which is there."""
    reason = _refusal(folder)
    if reason is not None:
        raise OSError(f"{folder} is a folder in which nothing can be written ({reason}): use another one.")


def _refusal(folder: Path) -> Optional[str]:
    """Why no file can be made in `folder`, found by making one; None where it can."""
    try:
        with _beside(folder / "any"):
            return None
    except OSError as error:
        return _reason(error)


def copy_whole(source: Path, path: Path) -> None:
    """Copy `source` to `path`, whole or not at all; see `write_whole`."""

    def write(file: BinaryIO) -> None:
        with source.open("rb") as opened:
            shutil.copyfileobj(opened, file, 1 << 20)

    write_whole(path, write)


def _mode_of(target: Path, path: str | os.PathLike[str]) -> Optional[int]:
    """The permissions of the file that is there; None without one. Raises OSError for what must not be replaced."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): use another name.") from None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} cannot be written (it is a folder, a device or a pipe): give the name of a file.")
    if not os.access(target, os.W_OK):
        raise OSError(f"{path} cannot be written (it is read-only): use another name, or make it writable.")
    return stat.S_IMODE(found.st_mode)


@contextmanager
def _beside(target: Path) -> Iterator[tuple[BinaryIO, Callable[[], None]]]:
    """A new file in `target`'s folder, and what puts it in `target`'s place; it is gone at the end if that was not
    called."""
    number = _nameless(target.parent)
    if number is None:
        with _named(target) as found:
            yield found
    else:
        with open(number, "w+b") as file:
            yield file, lambda: _name(file, target)


def _nameless(folder: Path) -> Optional[int]:
    """A new file without a name in `folder`; None where there is no such thing."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir(_OPEN_FILES):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError:  # the file system has none; whether the folder can be written to, the other way says
        return None


def _name(file: BinaryIO, target: Path) -> None:
    """Give a file without a name `target`'s: a link replaces nothing, so by way of a name beside it."""
    beside = _name_beside(target)
    number = file.fileno()
    try:
        # With a folder, or Python would link what is in /proc, not the file that it stands for.
        os.link(f"{_OPEN_FILES}/{number}", beside, src_dir_fd=number, follow_symlinks=True)
    except OSError:  # the file system, or a sandbox, links no such file
        with _named(target) as (copy, put):
            file.seek(0)
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.flush()
            os.fchmod(copy.fileno(), stat.S_IMODE(os.fstat(number).st_mode))
            os.fsync(copy.fileno())
            put()
        return
    try:
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _named(target: Path) -> Iterator[tuple[BinaryIO, Callable[[], None]]]:
    beside = _name_beside(target)
    try:
        with beside.open("x+b") as file:

            def put() -> None:
                file.close()  # Windows renames no open file
                os.replace(beside, target)

            yield file, put
    finally:
        beside.unlink(missing_ok=True)


def _name_beside(target: Path) -> Path:
    return target.with_name(f".{secrets.token_hex(8)}.part")


def _sync_folder(folder: Path) -> None:
    """Have the new name on the disk too, where the system can do that."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _reason(error: Exception) -> Optional[str]:
    """Why the system could not write, a few words; None if that is not what went wrong.

    `torch.save` covers the system's error with one of its own.
    """
    found: Optional[BaseException] = error
    while found is not None and not is_out_of_memory(found):
        if isinstance(found, OSError):
            return short(found.strerror or str(found))
        found = found.__cause__ or found.__context__
    return None


def check_no_input(output: Path, inputs: Iterable[Path | None], option: str = "--out") -> None:
    """Raises ValueError if writing `output` would replace one of `inputs`, by whatever name."""
    for path in inputs:
        if path is not None and path.exists() and output.exists() and path.samefile(output):
            raise ValueError(f"{option} is {output}, which is {path}, an input: give the output a name of its own.")
