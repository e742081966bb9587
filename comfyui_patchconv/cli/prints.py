"""What a command prints to: whatever becomes of that, the command's work is done, and counts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


@contextmanager
def lenient() -> Iterator[None]:
    """Within the block, printing raises nothing: not where there is nowhere to print to, on a full disk, or to a pipe
    that is closed. What cannot be printed to stdout is said once on stderr, unless nobody reads any more."""
    with ExitStack() as stack:
        error = stack.enter_context(_opened(sys.stderr))
        stack.enter_context(redirect_stderr(error))
        output = stack.enter_context(_opened(sys.stdout))
        output.on_loss = error
        stack.enter_context(redirect_stdout(output))
        try:
            yield
        finally:
            output.flush()
            error.flush()


@contextmanager
def _opened(stream: TextIO | None) -> Iterator[Any]:
    """`stream` as a `_Lenient`; of none, as under `pythonw`, one that goes nowhere. Where the system's stream is closed
    that takes its number, too, which the next file to be opened would have, and libraries write errors into."""
    if stream is not None:
        yield _Lenient(stream)
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        yield _Lenient(nowhere)


class _Lenient:
    """A text stream that goes on where `stream` cannot: what is printed from then on is lost.

    on_loss: where that is said, if anywhere.
    """

    on_loss: Any = None

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Print `text`, each line at once and whole, for several processes may print; names of files in escapes where
        there are no letters for them: on Windows, what is not a terminal has one language's."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # the latter by one that is closed
            self._lose(error)
        if text.endswith("\n"):
            self.flush()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        with suppress(OSError, ValueError):  # a stream without a number has nothing left that would be written later
            number = os.open(os.devnull, os.O_WRONLY)
            os.dup2(number, self._stream.fileno())
            os.close(number)
        said, self.on_loss = self.on_loss, None
        if said is not None and not isinstance(error, BrokenPipeError):
            why = getattr(error, "strerror", None) or error
            print(f"patchconv: what is done cannot be printed ({why}), and is done all the same.", file=said)
