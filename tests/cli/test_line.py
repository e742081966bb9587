"""The line that says how far work is, as a terminal without any codes shows it."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest

from comfyui_patchconv.cli.line import cleared, percent, show


class Terminal(io.StringIO):
    """Knows carriage returns and nothing else."""

    def isatty(self) -> bool:
        return True

    def line(self) -> str:
        """What is seen on its last line."""
        shown = ""
        for part in self.getvalue().split("\r"):
            shown = part + shown[len(part) :]
        return shown.rstrip()


def test_the_newest_share_is_seen() -> None:
    with redirect_stderr(Terminal()) as terminal:
        percent(1, 4)
        percent(3, 4)
    assert terminal.line() == " 75%"


def test_nothing_is_left_when_the_work_is_done() -> None:
    with redirect_stderr(Terminal()) as terminal, cleared():
        show("convolution 100000: 100%")
    assert terminal.line() == ""
    assert "\x1b" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")


def test_nothing_is_left_of_work_that_fails() -> None:
    with redirect_stderr(Terminal()) as terminal, pytest.raises(ValueError), cleared():
        raise ValueError(show("  5%"))
    assert terminal.line() == ""
