"""Chains by one kernel of Triton's, which reads a strip once and writes the next convolution's input once, padded; and
the statistics of what is written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import prod
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ...graph.node import Span
from .choice import Failures
from .elements import TYPES, Form

_TILE = 2048
"""Elements that a program has at once: 16 for each thread."""

_LEAST_CHANNELS, _MOST_CHANNELS = 4, 64
"""Of a tile: where pixels lie next to each other, and where channels do."""

_TURNS = 8
"""Tiles that a program looks at one after the other, where it gathers statistics: there are as many fewer of these."""

_MOST_PROGRAMS = (1 << 16) - 1
"""Along the second and the third side of a grid."""


class KernelView(NamedTuple):
    """A map as a kernel sees it, `[N, C, frames, rows, pixels]`: sizes and strides, in elements."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, map: Tensor, dim: int, rows: bool = False) -> Optional[KernelView]:
        """A map whose rows lie along `dim`. Those are one row of all of its pixels, unless single `rows` are wanted.
        None where they are not evenly apart."""
        if dim < 2:
            return None
        places = range(2, dim), range(dim, dim + rows), range(dim + rows, map.dim())
        parts = [_merged(map, part) for part in places]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        sizes, strides = zip((map.shape[0], map.stride(0)), (map.shape[1], map.stride(1)), *found)
        return cls(sizes, strides)


def _merged(map: Tensor, dims: Sequence[int]) -> Optional[tuple[int, int]]:
    """Size and stride of some dimensions as one; None where there is no such stride."""
    size, stride = 1, 0
    for dim in reversed(dims):
        if map.shape[dim] == 1:
            continue
        if size == 1:
            stride = map.stride(dim)
        elif map.stride(dim) != size * stride:
            return None
        size *= map.shape[dim]
    return size, stride


def _times(repeats: Sequence[int], dim: int) -> Optional[tuple[int, int, int]]:
    """How many times frames, rows and pixels are repeated; None where a view merges dimensions that differ in that."""
    if not repeats:
        return 1, 1, 1
    frames, pixels = repeats[2:dim], repeats[dim + 1 :]
    if any(len(part) > 1 and max(part) > 1 for part in (frames, pixels)):
        return None
    return prod(frames), repeats[dim], prod(pixels)


class Inputs(NamedTuple):
    """What a form reads: the map, what is added to it, and the line of a norm (see `ScaleAndShift`)."""

    map: Tensor
    other: Optional[Tensor] = None
    line: Optional[Tensor] = None


class _Views(NamedTuple):
    """What is read and written, as a kernel sees it. times: how often frames, rows and pixels are written."""

    map: KernelView
    other: Optional[KernelView]
    out: Optional[KernelView]
    times: tuple[int, int, int]

    @classmethod
    def of(cls, form: Form, inputs: Inputs, out: Optional[Tensor], dim: int) -> Optional[_Views]:
        """None where a kernel does not see all of them, or there is nothing to see."""
        times, given = _times(form.repeats, dim), (inputs.map, inputs.other, out)
        if times is None or not inputs.map.numel() or any(one is not None and one.dtype not in TYPES for one in given):
            return None
        single = *(max(times[1:]) > 1,) * 2, False
        map, other, to = (
            None if one is None else KernelView.of(one, dim, rows) for one, rows in zip(given, single)
        )  # fmt: skip
        seen = [view is not None for view in (map, other, to)]
        if map is None or seen != [one is not None for one in given]:
            return None
        return None if other is not None and other.sizes != map.sizes else cls(map, other, to, times)


def compute(
    form: Form, inputs: Inputs, out: Optional[Tensor], dim: int, above: int = 0, gathers: bool = False,
    rows: Optional[Span] = None,
) -> tuple[bool, Optional[Tensor]]:  # fmt: skip
    """Write `form` of its inputs to `out`, whose rows lie along `dim`: behind `above` rows of zeros, and as many more
    behind it as there is room for. out: None where the moments of the map alone are wanted. rows: of what it gives,
    those that are wanted; None for all.

    Whether it was done, and where it `gathers` the moments of each channel of what is written, as
    `Statistics.add_moments` takes them. It is not where maps have other types than `TYPES`, or strides by which they
    are not `[N, C, frames, rows, pixels]`, nor where a kernel fails.
    """
    views, map = _Views.of(form, inputs, out, dim), inputs.map
    if views is None:
        return False, None
    x, other, to, times = views
    batch, channels, frames = *x.sizes[:2], x.sizes[2] * times[0]
    width = prod(map.shape[dim + 1 :]) * times[2]
    first, last = rows or (0, map.shape[dim] * times[1])
    pixels = (last - first) * width
    out_pixels = to.sizes[4] if to is not None else pixels
    at_once, of_pixels = _tile(x, to, out_pixels)
    turns = min(_TURNS, _power(-(-out_pixels // of_pixels))) if gathers else 1
    grid = (parts := -(-out_pixels // (of_pixels * turns))), -(-channels // at_once), batch * frames
    if max(grid[1:]) > _MOST_PROGRAMS:
        return False, None
    moments = None
    if gathers:
        moments = torch.empty((3, parts * frames, batch, channels), dtype=torch.float32, device=map.device)
    launched = _launch(
        map.device, grid, map, inputs.other if other is not None else map,
        inputs.line if form.scaled else map, out if out is not None else map, moments if gathers else map,
        channels, frames, pixels, out_pixels, above * width, width, first, batch * channels, parts * frames,
        *x.strides, *((0,) * 5 if other is None else other.strides), *((0,) * 5 if to is None else to.strides),
        form.inner, form.added or 0.0, form.factor, _slope(form.first), _slope(form.second),
        SCALED=form.scaled, FIRST=_kind(form.first), ADDS=other is not None, SECOND=_kind(form.second),
        WRITES=out is not None, GATHERS=gathers, FRAME_TIMES=times[0], ROW_TIMES=times[1], PIXEL_TIMES=times[2],
        PIXELS=of_pixels, CHANNELS=at_once, TURNS=turns,
    )  # fmt: skip
    return launched, moments if launched else None


def _tile(x: KernelView, to: Optional[KernelView], out_pixels: int) -> tuple[int, int]:
    """Channels and pixels that a program computes at once: more of that one along which memory runs."""
    channels = x.sizes[1]
    ends = [one for one in (x, to) if one is not None]
    by_channels = any(one.strides[1] == 1 < channels for one in ends)
    by_pixels = any(one.strides[4] == 1 for one in ends)
    most = _LEAST_CHANNELS if not by_channels else _MOST_CHANNELS // 2 if by_pixels else _MOST_CHANNELS
    at_once = min(_power(channels), most)
    return at_once, min(_power(out_pixels), max(_TILE // at_once, 1))


def _power(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(count - 1, 0).bit_length()


def _kind(activation: Any) -> int:
    return 0 if activation is None else 1 if activation == "silu" else 2 if activation else 3


def _slope(activation: Any) -> float:
    return 0.0 if activation is None or activation == "silu" else activation


_FAILURES = Failures("Triton could not compile or launch a kernel")


def works() -> bool:
    """Whether no kernel has failed to compile or to launch so far."""
    return not _FAILURES.seen


def _launch(device: torch.device, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> bool:
    """Launch the kernel; False, behind one warning, where it cannot be compiled or launched. Raises what says that
    memory ran out."""

    def launch() -> bool:
        from .source import chain

        kernel: Any = chain
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*arguments, **constants)
        return True

    return works() and bool(_FAILURES.attempt(launch))
