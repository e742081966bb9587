"""What a part of a model took when it ran in strips: the figures that hosts show, and the words for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from torch import nn

from ..memory.recorder import Recorder, thinned
from ..units import size_of, time_of

_SAMPLES = 240
"""Of a timeline that is shown: about one for two pixels of a chart."""


State = Literal["done", "running", "stopped"]
_ENDINGS: dict[State, str] = {"done": "", "running": " so far", "stopped": ", stopped"}


@dataclass
class Figures:
    """Adds up all calls of one part in a run.

    part: what ran (`"VAE decoder"`). streamed: whether whole, or else by convolution. strips: of all that was streamed,
    or the most that one convolution was cut into; 0 where none of ours has run. calls, seconds: in all. peak: the
    most bytes in use at once beyond those at the start; 0 where that was not measured. eager: bytes of the feature
    maps that the same work was counted to need at once without us, without what its convolutions work in; 0 where
    that was not counted.
    timeline: (seconds, bytes) while it ran. state: stopped is what was cancelled or ended in an error. why: what spoke
    for the way that it ran, where that was chosen by itself. missed: how a budget was not kept. otherwise: what it is
    compared with. ran_eagerly: whether all of what might have been streamed did, for strips would have been no help;
    None where that is not known. over: on what it ran, where on more than one device. alone: why it ran on one though
    more were asked for.
    """

    part: str
    streamed: bool = False
    strips: int = 0
    calls: int = 0
    seconds: float = 0.0
    peak: int = 0
    eager: int = 0
    timeline: list[tuple[float, int]] = field(default_factory=list)
    state: State = "done"
    why: str = ""
    missed: str = ""
    otherwise: str = "without Patch Conv"
    ran_eagerly: Optional[bool] = None
    over: str = ""
    alone: str = ""

    def add(self, recorded: Recorder) -> None:
        """Add one more call."""
        self.calls += 1
        self.peak = max(self.peak, recorded.peak)
        self.timeline += [(self.seconds + min(at, recorded.seconds), size) for at, size in recorded.timeline]
        self.seconds += recorded.seconds
        while len(self.timeline) > _SAMPLES:
            self.timeline = thinned(self.timeline)

    @property
    def eager_at_least(self) -> int:
        """Bytes that eager needs at least; 0 where that is not known, or says nothing because we took more.

        What eager's convolutions work in is not counted, so a count below what was measured for us is no comparison.
        """
        return self.eager if self.eager >= self.peak else 0

    @property
    def ending(self) -> str:
        """What the state adds to a sentence."""
        return _ENDINGS[self.state]

    def words(self) -> dict[str, str]:
        """Say how it ran, and its peak, what eager needs, and time, as far as they are known.

        eager: for a sentence or a chart. eager_short: the same for a small place; missing where it says nothing.
        """
        if self.streamed and self.ran_eagerly:
            way = "eager, for strips would not help"
        elif self.streamed:
            way = "streamed" + (f" in {self.strips} {'strip' if self.strips == 1 else 'strips'}" if self.strips else "")
            way += f" over {self.over}" if self.over else ""
        elif self.strips > 1:
            way = f"in up to {self.strips} strips"
        elif self.why:
            way = "eager"
        elif self.calls and not self.strips:
            way = "whole (compiled by torch.compile, or left to another extension)"
        else:
            way = "whole (no convolution above the threshold)"
        if self.why:
            way = f"auto: {way} ({self.why})"
        words = {"way": way}
        if self.peak:
            words["peak"] = f"peak {size_of(self.peak)}"
        if self.eager:
            words["eager"] = f"{self.otherwise}: not measured"
        if self.eager_at_least:
            words["eager"] = f"{self.otherwise}: at least {size_of(self.eager)}, counted"
            words["eager_short"] = f"≥ {size_of(self.eager)} {self.otherwise}"
        if self.seconds:
            words["time"] = time_of(self.seconds)
        if self.missed:
            words["missed"] = self.missed
        if self.alone:
            words["alone"] = f"on one device: {self.alone}"
        return words

    def line(self) -> str:
        """Join the words to one line."""
        words = self.words()
        if "peak" in words and "eager" in words:
            words["peak"] += f" ({words.pop('eager')})"
        rest = [words[name] for name in ("peak", "eager", "time", "missed", "alone") if name in words]
        return ", ".join([f"{self.part} {words['way']}", *rest]) + self.ending

    def as_json(self) -> dict[str, Any]:
        """Give a front end the figures and the words. eager: 0 where there is nothing to draw."""
        known = {name: getattr(self, name) for name in ("part", "strips", "seconds", "peak", "timeline", "state")}
        words = {"words": self.words(), "line": self.line(), "ending": self.ending}
        return known | {"eager": self.eager_at_least} | words


class StripCount:
    """Notes the most strips that a convolution was cut into; a `Tiling.on_strip`."""

    def __init__(self, figures: Figures) -> None:
        self.figures = figures

    def __call__(self, module: nn.Module, rows_done: int, rows: int) -> None:
        self.figures.strips = max(self.figures.strips, strips_of(rows_done, rows))


def strips_of(rows_done: int, rows: int) -> int:
    """Count the strips that `rows` are cut into, after the first, which ends at `rows_done`; fewer after later ones."""
    return -(-rows // max(rows_done, 1))
