"""`patchconv demo | decode | encode | upscale | patch-diffusion | patch-ddpm`: the package without a host."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn, Optional

import torch

from . import decode, demo, encode, patch_ddpm, patch_diffusion, upscale
from .empty_cache import no_empty_cache
from .failures import WRONG_INPUT, advise, failure, tell
from .prints import lenient


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code.

    0: done. 2: wrong input, said in one sentence on stderr before any work. 3: out of memory. 130: interrupted. Of
    several inputs one that fails does not end the others, and the code is the highest of theirs.
    """
    with lenient():
        return _run(argv)


def _run(argv: Optional[Sequence[str]]) -> int:
    try:
        args = parser().parse_args(argv)
        advise(args.less_memory)
        with no_empty_cache(), torch.inference_mode(args.job != "train"):
            return args.run(args) or 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except (Exception, KeyboardInterrupt) as error:
        found = failure(error)
        if found is None:
            raise
        tell(found[0])
        return found[1]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="patchconv", description="Convolutions in strips: the same pixels in less memory.")
    top.set_defaults(job="")
    commands = top.add_subparsers(
        required=True, metavar="demo | decode | encode | upscale | patch-diffusion | patch-ddpm"
    )
    for command in (decode, encode, upscale, demo, patch_diffusion, patch_ddpm):
        command.add(commands)
    return top


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the whole usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help.\n")
