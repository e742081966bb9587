"""Turns errors into a sentence and an exit code; and runs work on several inputs, of which one may fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Optional

from ..memory.errors import first_line, is_out_of_memory
from ..streaming import SpreadError

SPREAD, WRONG_INPUT, OUT_OF_MEMORY, INTERRUPTED = 1, 2, 3, 130
"""Exit codes; 0 is success. SPREAD: of several processes another one failed, or some of their inputs."""

_EXTRAS = {
    **dict.fromkeys(("diffusers", "numpy", "PIL"), "demo"),
    **dict.fromkeys(("accelerate", "tqdm"), "train"),
    "h5py": "keras",
    **dict.fromkeys(("spandrel", "torchvision", "pyvips"), "upscale"),
    "soundfile": "sound",
    "av": "video",
}
"""Which extra brings what may not be installed."""

_less_memory: ContextVar[str] = ContextVar("less_memory", default="a machine with more of it")
"""What the command that runs has for where memory runs out."""


def advise(less_memory: str) -> None:
    """From now on, who runs out of memory is told to try `less_memory`, which the command at hand has."""
    _less_memory.set(less_memory)


def failure(error: BaseException) -> Optional[tuple[str, int]]:
    """The sentence and the exit code for `error`; None for one that is a mistake of this program."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped.", INTERRUPTED
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get(error.name or "")
        found = f"{error.name} is not installed: run pip install 'patchconv[{extra}]'."
        return None if extra is None else (found, WRONG_INPUT)
    if isinstance(error, SpreadError):
        return str(error), SPREAD
    if is_out_of_memory(error):
        return f"out of memory ({first_line(error)}): try {_less_memory.get()}.", OUT_OF_MEMORY
    if isinstance(error, (ValueError, OSError)):
        return _sentence(error), WRONG_INPUT
    return None


def tell(sentence: str) -> None:
    """Print what went wrong."""
    print(f"patchconv: {sentence}", file=sys.stderr)


def each(inputs: Sequence[Path], work: Callable[[Path], None]) -> int:
    """Do `work` for each of several inputs, and return the exit code; one that fails does not end the others.

    Raises what `work` raises for a single input.
    """
    if len(inputs) == 1:
        work(inputs[0])
        return 0
    codes: list[int] = []
    for path in inputs:
        code = attempt(path, work)
        if code:
            codes.append(code)
    if codes:
        tell(f"{len(codes)} of {len(inputs)} failed.")
    return max(codes, default=0)


def attempt(path: Path, work: Callable[[Path], None]) -> int:
    """Do `work` for one of several inputs: 0, or the exit code where it failed, and why is said.

    Raises SpreadError, for without another rank none of the others can be done, and what is a mistake of this program.
    """
    try:
        work(path)
    except SpreadError:
        raise
    except Exception as error:
        found = failure(error)
        if found is None:
            raise
        tell(found[0])
        return found[1]
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)
