"""Draws memory over time with Pillow: hosts have that and no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

from PIL import Image, ImageDraw, ImageFont

from ..units import GIB
from .figures import Figures

WIDTH, HEIGHT = 1024, 480
"""Pixels of the picture of one part; several stand one below the other."""

_SCALE = 2  # drawn larger, so that lines are smooth
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 32, 92, 64
_TICKS = 5
_INK, _MUTED, _GRID, _PAPER = "#1f2430", "#667085", "#e4e7ec", "#ffffff"
_LINE, _AREA, _EAGER = "#2563eb", "#dbe7fd", "#c2410c"


def draw(parts: Sequence[Figures]) -> Image.Image:
    """Draw one chart for each part, RGB: memory over time, its peak, and dashed what eager was counted to need.

    Without parts, a sentence that nothing was measured.
    """
    sheet = Image.new("RGB", (WIDTH * _SCALE, HEIGHT * max(len(parts), 1) * _SCALE), _PAPER)
    for number, figures in enumerate(parts):
        _Chart(sheet, number * HEIGHT, figures).draw()
    if not parts:
        _Pen(sheet, 0).text((WIDTH / 2, HEIGHT / 2), "Nothing was measured", 20, _MUTED, "mm")
    return sheet.resize((sheet.width // _SCALE, sheet.height // _SCALE), Image.Resampling.LANCZOS)


def steps(top: float, ticks: int = _TICKS) -> tuple[float, int]:
    """A round step, 1, 2 or 5 times a power of ten, and how many of them, `ticks` or so, reach to `top` or over it."""
    power = 1.0
    while power * 10 <= top / ticks:
        power *= 10
    while power > top / ticks:
        power /= 10
    step = next(power * times for times in (1, 2, 5, 10) if power * times * ticks >= top)
    return step, max(math.ceil(top / step), 1)


class _Pen:
    """Draws in pixels of the finished picture, from `down` below its top."""

    def __init__(self, sheet: Image.Image, down: float) -> None:
        self.down, self._draw = down, ImageDraw.Draw(sheet)

    def _at(self, point: tuple[float, float]) -> tuple[float, float]:
        return point[0] * _SCALE, (point[1] + self.down) * _SCALE

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float) -> None:
        self._draw.line([self._at(point) for point in points], color, round(width * _SCALE), joint="curve")

    def dashed(self, y: float, left: float, right: float, color: str, width: float, dash: float = 8) -> None:
        while left < right:
            self.line([(left, y), (min(left + dash, right), y)], color, width)
            left += dash * 1.6

    def area(self, points: Sequence[tuple[float, float]], color: str) -> None:
        self._draw.polygon([self._at(point) for point in points], color)

    def text(self, point: tuple[float, float], words: str, size: float, color: str, anchor: str) -> None:
        self._draw.text(self._at(point), words, color, font(size * _SCALE), anchor)


class _Chart:
    def __init__(self, sheet: Image.Image, down: float, figures: Figures) -> None:
        self.pen, self.figures, self.eager = _Pen(sheet, down), figures, figures.eager_at_least
        self.unit, name = (GIB, "GiB") if max(figures.peak, self.eager) >= GIB else (2**20, "MiB")
        self.title = f"Memory ({name})"
        most = max(figures.peak, self.eager, *(size for _, size in figures.timeline), 1)
        self.step, self.count = steps(1.04 * most / self.unit)
        self.left, self.right, self.top, self.bottom = _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM

    def x(self, seconds: float) -> float:
        return self.left + (self.right - self.left) * seconds / max(self.figures.seconds, 1e-9)

    def y(self, size: float) -> float:
        return self.bottom - (self.bottom - self.top) * size / (self.unit * self.step * self.count)

    def draw(self) -> None:
        figures, pen, words = self.figures, self.pen, self.figures.words()
        pen.text((14, 24), f"{figures.part} {words['way']}", 18, _INK, "lm")
        rest = [words[name] for name in ("peak", "time") if name in words]
        rest += [words["eager"]] if "eager" in words and not self.eager else []
        pen.text((14, 48), ", ".join(rest) + figures.ending, 15, _MUTED, "lm")
        self._axes()
        line = [(self.x(at), self.y(size)) for at, size in [(0.0, 0), *figures.timeline] if at <= figures.seconds]
        if len(line) > 1:
            pen.area([(line[0][0], self.bottom), *line, (line[-1][0], self.bottom)], _AREA)
            pen.line(line, _LINE, 2)
        if figures.peak:
            self._level(figures.peak, words["peak"], _LINE, "rd" if figures.peak >= self.eager else "rt")
        if self.eager:
            self._level(self.eager, words["eager"], _EAGER, "rt" if figures.peak >= self.eager else "rd")
        pen.line([(self.left, self.bottom), (self.right, self.bottom)], _INK, 1.5)

    def _axes(self) -> None:
        pen = self.pen
        for number in range(self.count + 1):
            value = number * self.step
            y = self.y(value * self.unit)
            pen.line([(self.left, y), (self.right, y)], _GRID, 1)
            pen.text((self.left - 10, y), f"{value:g}", 14, _MUTED, "rm")
        pen.text((14, self.top - 18), self.title, 14, _MUTED, "lm")
        step, _ = steps(max(self.figures.seconds, 1e-3), 6)
        at = 0.0
        while at <= self.figures.seconds + 1e-9:
            pen.text((self.x(at), self.bottom + 16), f"{at:g}", 14, _MUTED, "mm")
            at = round(at + step, 9)
        pen.text((self.right, self.bottom + 40), "Time (s)", 14, _MUTED, "rm")

    def _level(self, size: float, words: str, color: str, anchor: str) -> None:
        """Draw a dashed line across, its words above it or below."""
        y = self.y(size)
        self.pen.dashed(y, self.left, self.right, color, 1.5)
        self.pen.text((self.right - 4, y - 4 if anchor == "rd" else y + 5), words, 14, color, anchor)


def font(size: float) -> Any:
    """Pillow's own font, `size` pixels high where this Pillow can."""
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()


@dataclass(frozen=True)
class Series:
    """A line of `lines`: what it is called, its colour, its points, and a height that a dashed line marks."""

    label: str
    color: str
    points: Sequence[tuple[float, float]] = ()
    level: Optional[float] = None


def lines(title: str, series: Sequence[Series], across: str, up: str) -> Image.Image:
    """Several lines in one chart from zero, RGB; `across` and `up` say what its axes count."""
    sheet = Image.new("RGB", (WIDTH * _SCALE, HEIGHT * _SCALE), _PAPER)
    pen, left, right, bottom, top = _Pen(sheet, 0), _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM, _TOP + 8
    pen.text((14, 20), title, 18, _INK, "lm")
    farthest = max((x for one in series for x, _ in one.points), default=0.0) or 1.0
    highest = max((y for one in series for y in (*(y for _, y in one.points), one.level or 0)), default=0.0) or 1.0
    step, count = steps(1.04 * highest)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / farthest, bottom - (bottom - top) * y / (step * count)

    pen.text((14, top - 18), up, 14, _MUTED, "lm")
    pen.text((right, bottom + 40), across, 14, _MUTED, "rm")
    for number in range(count + 1):
        _, y = at(0, number * step)
        pen.line([(left, y), (right, y)], _GRID, 1)
        pen.text((left - 10, y), f"{number * step:g}", 14, _MUTED, "rm")
    each, _ = steps(farthest, 6)
    for number in range(int(farthest / each + 1e-9) + 1):
        pen.text((at(number * each, 0)[0], bottom + 16), f"{number * each:g}", 14, _MUTED, "mm")
    columns = len(series) if len(series) < 4 else 2
    for number, one in enumerate(series):
        start = 14 + number % columns * (WIDTH - 28) / columns
        line = 46 + number // columns * 20
        pen.line([(start, line), (start + 22, line)], one.color, 3)
        pen.text((start + 30, line), one.label, 15, _INK, "lm")
        if len(one.points) > 1:
            pen.line([at(x, y) for x, y in one.points], one.color, 2)
        if one.level is not None:
            pen.dashed(at(0, one.level)[1], left, right, one.color, 1)
    pen.line([(left, bottom), (right, bottom)], _INK, 1.5)
    return sheet.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
