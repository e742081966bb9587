"""Which files a command writes, checked before there is any work: one rule for what is there already.

`--out FILE` is replaced once the new file is whole; in `--out FOLDER` what is there is skipped, unless `--overwrite`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Optional

from ..files.atomic import check_folder_writable, check_no_input, check_writable
from .arguments import path_of

RULE = (
    "A FILE that is there is replaced once the new one is whole; in a FOLDER what is there is skipped, unless "
    "--overwrite."
)


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options of a command that takes several inputs."""
    parser.add_argument(
        "--out",
        type=path_of,
        required=True,
        metavar="FILE|FOLDER",
        help=f"{what}; with several inputs a folder. {RULE}",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there in a FOLDER")


class Outputs:
    """Where the results of `inputs` go: to the file `out` for one, into the folder `out` for several.

    out: may be a folder that is there for one input, too; for several it is made where it is missing.
    folder: whether the inputs came as one, so that `out` is one too.
    others: files that are read beside the inputs. suffixes: of the files, the first one of those in a folder.

    Raises ValueError for an `out` that cannot be one, for two inputs whose results would have one name, and for an
    output that is a file to be read.
    """

    def __init__(
        self, out: Path, inputs: Sequence[Path], others: Sequence[Path], *suffixes: str, overwrite: bool = False,
        folder: bool = False,
    ) -> None:  # fmt: skip
        self.out, self.read, self.suffix, self.overwrite = out, (*inputs, *others), suffixes[0], overwrite
        self.folder = folder or len(inputs) > 1 or (out.is_dir() and out.suffix.lower() not in suffixes)
        self.written: dict[str, Path] = {}
        if not self.folder:
            check_output(out, *suffixes)
        else:
            check_folder(out)
            if folder and out.suffix.lower() in suffixes:
                raise ValueError(f"--out is {out} and the input is a folder: give the name of a folder.")
            names: dict[str, Path] = {}
            for path in inputs:
                other = names.setdefault(_as_compared(path.stem), path)
                if other is not path:
                    raise ValueError(
                        f"{other} and {path} would both be {path.stem}{self.suffix}: rename one, or give them apart."
                    )
        for path in inputs:
            check_no_input(self._name(path), self.read)

    def of(self, path: Path, count: int = 1, parts: int = 1) -> list[Optional[Path]]:
        """The files for the results of the input `path`, numbered where there are several; None for what is
        skipped. count, parts: results, and the parts of each: all of the first result, all of the second …

        Raises ValueError where that would replace an input, or the results of another one.
        """
        names = self._names(path, count, parts)
        for each in names:
            check_no_input(each, self.read)
            other = self.written.setdefault(_as_compared(str(each)), path)
            if other is not path:
                raise ValueError(f"{each} has been written for {other} and {path} would replace it: give them apart.")
        kept = [each for each in names if self.folder and each.exists() and not self.overwrite]
        if self.folder:
            self.out.mkdir(exist_ok=True)
        check_folder(names[0].parent, (each.name for each in names if each not in kept))
        if len(kept) == len(names) > 1 and parts > 1:
            print(f"{kept[0]} to {kept[-1].name}: there already, skipped")
        elif parts == 1:
            for each in kept:
                print(f"{each}: there already, skipped")
        return [None if each in kept else each for each in names]

    def suffix_of(self, path: Path) -> str:
        """How the names of the files for the input `path` end."""
        return self._name(path).suffix.lower()

    def _names(self, path: Path, count: int, parts: int) -> list[Path]:
        name = self._name(path)
        results = [name] if count == 1 else [_numbered(name, number) for number in range(count)]
        return [_numbered(one, part) if parts > 1 else one for one in results for part in range(parts)]

    def _name(self, path: Path) -> Path:
        return self.out / f"{path.stem}{self.suffix}" if self.folder else self.out


def _as_compared(name: str) -> str:
    """A file's name, the same for all that name one file: Windows and macOS look past capitals."""
    return name.casefold() if sys.platform in ("win32", "darwin") else name


def _numbered(name: Path, number: int) -> Path:
    return name.with_stem(f"{name.stem}-{number + 1:04}")


def check_output(path: Path, *suffixes: str, option: str = "--out") -> None:
    """Raises ValueError unless `path` can be the name of a file that ends in one of `suffixes`, if given, and OSError
    where that cannot be written."""
    if path.is_dir():
        raise ValueError(f"{option} is {path}, which is a folder: give the name of a file.")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} is {path}: its name must end in {' or '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise ValueError(f"{option} is {path} and the folder {path.parent} does not exist: create it first.")
    check_writable(path)


def check_folder(path: Path, names: Iterable[str] = (), option: str = "--out", parents: bool = False) -> None:
    """Raises ValueError unless `path` is a folder, or can be the name of a new one, and OSError where nothing can be
    written to it.

    names: of files that will be; those that are there can be replaced. parents: the folders around it are made, too.
    """
    if path.is_dir():
        check_folder_writable(path)
        for name in names:
            if os.path.lexists(path / name):
                check_writable(path / name)
        return
    if os.path.lexists(path):
        what = "a link to nothing" if path.is_symlink() else "a file"
        raise ValueError(f"{option} is {path}, which is {what}: give the name of a folder.")
    around = path.parent
    while parents and not os.path.lexists(around):
        around = around.parent
    if not around.is_dir():
        what = "is not a folder: choose another one" if os.path.lexists(around) else "does not exist: create it first"
        raise ValueError(f"{option} is {path} and {around} {what}.")
    check_folder_writable(around)
