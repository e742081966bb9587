"""What several commands ask for, and how they answer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch

from ..conv.strip_sizes import DEFAULT_THRESHOLD
from ..hosts.auto import WORDS
from ..hosts.modes import RunMode
from ..memory.recorder import Recorder
from ..streaming import USUAL
from .arguments import DTYPES, device, natural, path_of, seconds, size
from .outputs import add_out
from .processes import Processes
from .vae import CHOICES, MB, RunOptions


def add_conversion(parser: argparse.ArgumentParser, given: str, what: str, out: str) -> None:
    """Add the options of a command that decodes or encodes files.

    given, what: the option that names them, and what they are. out: what is written.
    """
    parser.add_argument(
        "--vae", type=path_of, required=True, help="VAE or checkpoint, in its authors' layout or diffusers'"
    )
    parser.add_argument(
        given,
        type=path_of,
        nargs="+",
        required=True,
        metavar="FILE",
        help=f"{what}, or a folder of them; one that fails does not end the others",
    )
    add_out(parser, out)
    add_strips(parser)
    add_mode(parser)
    add_trust(parser)
    add_spread(parser)


def add_strips(parser: argparse.ArgumentParser) -> None:
    """Add the options of all that decodes or encodes."""
    parser.add_argument("--splits", type=natural, default=0, help="strips per convolution; 0 chooses (default)")
    parser.add_argument(
        "--threshold",
        type=natural,
        default=DEFAULT_THRESHOLD,
        help="input elements from which a convolution runs in strips (default: %(default)s)",
    )
    parser.add_argument("--device", type=device, default=None, help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")


def add_mode(parser: argparse.ArgumentParser) -> None:
    """Add the options of what runs in one mode."""
    parser.add_argument(
        "--mode",
        choices=CHOICES,
        default="auto",
        help="auto: eager where that fits, patch where that is enough, else stream within what is free (default); "
        "patch: each large convolution in strips; stream: everything in strips; plain: eager, no strips",
    )
    parser.add_argument(
        "--budget",
        type=size,
        help="memory beside the weights for --mode auto and stream to stay within, such as 2GiB or 800MB; default: "
        "what is free for auto, no limit for stream",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the option of what reads files of `torch.save`."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="read .ckpt, .pt, .pth and .bin files on torch below 2.6 too, where code in one could run",
    )


def add_spread(parser: argparse.ArgumentParser) -> None:
    """Add the options of what torchrun starts in several processes."""
    parser.add_argument(
        "--spread",
        choices=("rows", "pictures"),
        help="under torchrun: rows: each picture over all processes; pictures: a picture each, taken from a common "
        "list; default: rows of a single picture, else pictures",
    )
    parser.add_argument(
        "--silent-seconds",
        type=seconds,
        default=int(USUAL.silent_seconds),
        metavar="SECONDS",
        help="under torchrun: end where nothing is heard of a process for so long (default: %(default)s)",
    )


def inputs_of(given: Sequence[Path], other: Path, *suffixes: str) -> list[Path]:
    """The files that are given, and those of the folders among them whose names end in `suffixes`, in order, without
    the `other` one that is read.

    Raises ValueError for a folder that has none.
    """
    found: list[Path] = []
    for path in given:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(one for one in path.iterdir() if one.suffix.lower() in suffixes and one.is_file())
        inside = [one for one in inside if not (other.exists() and one.samefile(other))]
        if not inside:
            raise ValueError(f"{path} is a folder without a file that ends in {' or '.join(suffixes)}: name another.")
        found += inside
    return found


def of_folder(given: Sequence[Path]) -> bool:
    """Whether a folder is among what is given, so that what is written goes to one."""
    return any(path.is_dir() for path in given)


def run_options(args: argparse.Namespace, processes: Processes) -> RunOptions:
    """The options as `RunOptions`, for what `processes` does.

    Raises ValueError for a budget that the mode does not take, and for a mode in which processes cannot do one picture
    together.
    """
    group = processes.group if processes.rows else None
    if group is not None and args.mode not in ("auto", "stream"):
        raise ValueError(
            f"--mode is {args.mode} and several processes do one picture together: use stream, or --spread pictures."
        )
    if args.budget is not None and args.mode not in ("auto", "stream"):
        raise ValueError(
            f"--budget is for --mode auto and stream and the mode is {args.mode}: leave it out, or choose one of them."
        )
    return RunOptions(
        args.mode, args.splits, args.threshold, args.budget, group, processes.beside, float(args.silent_seconds)
    )


class Choices:
    """How one decode or encode ran, where that was chosen by itself; an `OnChoice`."""

    def __init__(self) -> None:
        self._ways: list[str] = []

    def __call__(self, way: RunMode, why: str) -> None:
        self._ways.append(f"{WORDS[way]} ({why})")

    def __str__(self) -> str:
        return f"; auto: {', then '.join(self._ways)}" if self._ways else ""


def say(what: str, recorder: Recorder, choices: Optional[Choices] = None) -> None:
    """Print what was made, what that took, and how it ran, where that was chosen by itself."""
    print(f"{what}, {recorder.seconds:.1f} s, peak {recorder.peak / MB:.0f} MB beyond the weights{choices or ''}")


def default_device() -> torch.device:
    """The device that work is done on if none is asked for."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
