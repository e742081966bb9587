"""`patchconv demo | decode | encode | patch-diffusion | patch-ddpm`: the package without a host."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn, Optional

import torch

from ..memory.errors import first_line, is_out_of_memory
from . import decode, demo, encode, patch_ddpm, patch_diffusion

WRONG_INPUT, OUT_OF_MEMORY, INTERRUPTED = 2, 3, 130
"""Exit codes; 0 is success."""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code.

    0: done. 2: wrong input, said in one sentence on stderr before any work. 3: out of memory. 130: interrupted.
    """
    try:
        args = parser().parse_args(argv)
        with torch.inference_mode(args.job != "train"):
            args.run(args)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        return _fail("stopped.", INTERRUPTED)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None:
            raise
        return _fail(f"{error.name} is not installed: run pip install 'patchconv[{extra}]'.", WRONG_INPUT)
    except (ValueError, OSError) as error:
        return _fail(_sentence(error), WRONG_INPUT)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(f"out of memory ({first_line(error)}): {_LESS_MEMORY}", OUT_OF_MEMORY)
    return 0


_EXTRAS = {
    **dict.fromkeys(("diffusers", "numpy", "PIL"), "demo"),
    **dict.fromkeys(("accelerate", "tqdm"), "train"),
    "h5py": "keras",
}
"""Which extra brings what may not be installed."""

_LESS_MEMORY = "try --mode stream with a --budget, --dtype bfloat16, or --device cpu."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="patchconv", description="Convolutions in strips: the same pixels in less memory.")
    top.set_defaults(job="")
    commands = top.add_subparsers(required=True, metavar="demo | decode | encode | patch-diffusion | patch-ddpm")
    for command in (decode, encode, demo, patch_diffusion, patch_ddpm):
        command.add(commands)
    return top


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)


def _fail(message: str, code: int) -> int:
    print(f"patchconv: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the whole usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help.\n")
