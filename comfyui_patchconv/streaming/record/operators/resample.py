"""Upsampling, shuffles, windows and pads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ...graph.node import Node
from ...graph.steps import Pad, Resample, RowLocal
from .common import OperatorCall, dim_of, each, fixed_dim

_SMOOTH = {"bilinear": 1, "trilinear": 1, "linear": 1, "bicubic": 2}
"""Upsampling that mixes rows, and how many rows beside its own an output row may read."""


def upsample(call: OperatorCall) -> Optional[Node]:
    given = call.given()
    input = given.get("input", given.get("self"))
    name = call.name.replace("_upsample", "upsample")
    smooth = name.split("_")[1].rstrip("123d")
    halo, mode = _SMOOTH.get(smooth, 0), smooth if smooth in _SMOOTH else "nearest"
    usual = mode == "nearest"
    mode = "nearest-exact" if usual and "exact" in name else mode
    if not isinstance(input, Node) or given.get("align_corners") or "aa" in name:
        return None
    sides = len(input.shape) - 2
    factors = [out / side if side else 0.0 for out, side in zip(call.spec.shape[2:], input.shape[2:])]
    dim = dim_of(input, (0, 1))
    if dim is None or any(factor != int(factor) or factor < 1 for factor in factors):
        return None
    scales = _scales(given, sides)
    if scales is not None and any(scale is not None and scale != factor for scale, factor in zip(scales, factors)):
        return None
    up = int(factors[dim - 2])
    if up & (up - 1) and (halo or not _finds_rows(up, input.shape[dim])):
        return None  # eager finds rows, and the weights of smooth ones, in float32: exactly for powers of two alone

    def run(piece: Tensor) -> Tensor:
        return F.interpolate(piece, scale_factor=factors, mode=mode)

    repeats = (1, 1, *map(int, factors)) if usual and _repeats(factors, input.shape[2:]) else ()
    step = Resample(up, 1, input.shape[dim], dim, run, halo=halo, repeats=repeats)
    return call.node(step, [input], [dim], dim)


def _repeats(factors: Sequence[float], sides: Sequence[int]) -> bool:
    """Whether nearest upsampling of so many pixels gives each of them as often as the others."""
    return all(not up & (up - 1) or _finds_rows(up, side) for up, side in zip(map(int, factors), sides))


@cache
def _finds_rows(up: int, rows: int) -> bool:
    """Whether output row i of nearest upsampling is made of row i // up in float32 too."""
    places = torch.arange(up * rows, dtype=torch.float32, device="cpu")
    return bool(
        (places * torch.tensor(1 / up, dtype=torch.float32)).floor().equal(places.div(up, rounding_mode="floor"))
    )


def _scales(given: dict[str, Any], sides: int) -> Optional[list[Any]]:
    found = given.get("scale_factors")
    if found is None:
        names = ("scales",) if sides == 1 else ("scales_d", "scales_h", "scales_w")[-sides:]
        found = [given.get(name) for name in names]
    return list(found)


def shuffle(call: OperatorCall) -> Optional[Node]:
    input, factor = call.args
    if not isinstance(input, Node) or len(input.shape) < 3:
        return None
    count = len(input.shape)
    dim = dim_of(input, range(count - 2))
    if dim is None:
        return None
    up, down = (factor, 1) if call.name == "pixel_shuffle" else (1, factor)
    func = call.func

    def run(piece: Tensor) -> Tensor:
        return func(piece.contiguous() if piece.dim() == 5 else piece, factor)  # refused with its channels last

    step = Resample(up, down, input.shape[dim], dim, run, cheap=True)
    return call.node(step, [input], [dim], dim)


def windows(call: OperatorCall) -> Optional[Node]:
    """`unfold` and `fold` (`im2col`, `col2im`) of windows that lie side by side: rows of an image to one of windows."""
    given, func = call.given(), call.func
    input = given["self"]
    height, width = each(given["kernel_size"], 2)
    usual = each(given["stride"], 2) == [height, width] and each(given["padding"], 2) == [0, 0]
    usual = usual and each(given["dilation"], 2) == [1, 1]
    folds = call.name == "col2im"
    image = call.spec.shape if folds else input.shape
    if not isinstance(input, Node) or len(image) != 4 or not usual or image[2] % height or image[3] % width:
        return None
    if fixed_dim(input) not in (None, 2) or input.shape[2] < 2:
        return None
    across = image[3] // width  # windows of one row
    options = [height, width], [1, 1], [0, 0], [height, width]

    def run(piece: Tensor) -> Tensor:
        size = [[piece.shape[2] // across * height, image[3]]] if folds else []
        return func(piece, *size, *options)

    up, down = (height, across) if folds else (across, height)
    return call.node(Resample(up, down, input.shape[2], 2, run, cheap=True), [input], [2], 2)


def pad(call: OperatorCall) -> Optional[Node]:
    """`pad` and the operators that it is made of, in all modes."""
    given = call.given()
    input, sizes = given["self"], list(given.get("pad", given.get("padding", ())))
    if not isinstance(input, Node):
        return None
    name = call.name
    mode = given.get("mode", "constant")
    mode = "replicate" if name.startswith("replication") else "reflect" if name.startswith("reflection") else mode
    value = given.get("value")
    count = len(input.shape)
    pairs = [(0, 0)] * (count - len(sizes) // 2) + [pair for pair in zip(sizes[::2], sizes[1::2])][::-1]
    dim = dim_of(input)
    if dim is None:
        return None
    before, after = pairs[dim]
    rows = input.shape[dim]
    if mode == "reflect" and max(before, after) >= rows:
        return None
    if mode != "constant" and (dim < 2 or min(before, after) < 0):
        return None
    others = [pair if place != dim else (0, 0) for place, pair in enumerate(pairs)]
    edges = [side for pair in reversed(others) for side in pair][: len(sizes)]
    fill = 0.0 if value is None else value

    def run(piece: Tensor) -> Tensor:
        if not any(edges):
            return piece
        return F.pad(piece, edges, mode, fill if mode == "constant" else None)

    if mode == "circular":
        return _circular(call, input, dim, before, run)
    return call.node(Pad(before, after, mode, fill, rows, dim, run), [input], [dim], dim)


def _circular(call: OperatorCall, input: Node, dim: int, before: int, run: Callable[[Tensor], Tensor]) -> Node:
    return gathered_rows(call, input, dim, lambda first, last: (first - before, last - before), run)


def gathered_rows(
    call: OperatorCall,
    input: Node,
    dim: int,
    place: Callable[[int, int], tuple[int, int]],
    run: Callable[[Tensor], Tensor],
) -> Node:
    """Rows of a stored map that goes on at its other end where it ends. place: where output rows lie in it."""
    rows = input.shape[dim]

    def compute(pieces: Sequence[Tensor], first: int, last: int) -> Tensor:
        low, high = place(first, last)
        parts, whole = [], pieces[0]
        while low < high:
            start = low % rows
            size = min(rows - start, high - low)
            parts.append(whole.narrow(dim, start, size))
            low += size
        return run(parts[0] if len(parts) == 1 else torch.cat(parts, dim))

    return call.node(RowLocal(compute, 0, moves=True), [input], [None], dim)


TABLE: dict[str, Callable[[OperatorCall], Optional[Node]]] = {
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), shuffle),
    **dict.fromkeys(("im2col", "col2im"), windows),
    **dict.fromkeys(
        (
            "pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
            "replication_pad2d", "replication_pad3d",
        ),
        pad,
    ),
    **{
        f"{prefix}{name}": upsample
        for prefix, names in (
            (
                "upsample_",
                ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d", "bicubic2d"),
            ),
            ("_upsample_", ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d")),
        )
        for name in names
    },
}  # fmt: skip
