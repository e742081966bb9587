# type: ignore  # what Triton compiles is not what a checker of Python's types reads
"""The kernels themselves, in Triton's language. Imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activated(value, kind: tl.constexpr, slope):  # Triton compiles no names of Python's types
    if kind == 1:
        value = value / (1.0 + tl.exp(-value))
    if kind == 2:
        value = tl.where(value > 0, value, value * slope)
    if kind == 3:  # not times zero, which infinities are not
        value = tl.where(value < 0, 0.0, value)
    return value


@triton.jit(do_not_specialize=["first"])
def chain(
    x, other, line, out, moments,
    channels, frames, pixels, out_pixels, above, width, first, lines, parts,
    x_n, x_c, x_a, x_r, x_p, other_n, other_c, other_a, other_r, other_p, out_n, out_c, out_a, out_r, out_p,
    inner, added, factor, slope_first, slope_second,
    SCALED: tl.constexpr, FIRST: tl.constexpr, ADDS: tl.constexpr, SECOND: tl.constexpr, WRITES: tl.constexpr,
    GATHERS: tl.constexpr, FRAME_TIMES: tl.constexpr, ROW_TIMES: tl.constexpr, PIXEL_TIMES: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """One pass over a map `[N, C, frames, rows, pixels]`, in float32: `Form`, written with `above` pixels of zeros
    before it and more behind it, up to `out_pixels`; and the moments of each channel of what is written,
    `[3, parts, N, C]`, a part for each frame and each TURNS blocks of PIXELS.

    Frames, rows and pixels are written so many TIMES each: rows of `width` pixels then, from row `first` of them on;
    where all are written once, a row has all pixels. Sizes are of what is written, strides in elements.

    Grid: parts of a frame, blocks of CHANNELS, frames of all samples. line: see `ScaleAndShift`, of `lines` channels in
    all. FIRST, SECOND: 0 for no activation, 1 SiLU, 2 leaky, 3 ReLU.
    """
    part, sample = tl.program_id(0), tl.program_id(2) // frames
    frame = tl.program_id(2) % frames
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = c < channels
    wide_c, wide_n, wide_a = c.to(tl.int64), sample.to(tl.int64), frame.to(tl.int64)
    read_a = (frame // FRAME_TIMES).to(tl.int64)
    x_at = x + wide_n * x_n + read_a * x_a + (wide_c * x_c)[None, :]
    if ADDS:
        other_at = other + wide_n * other_n + read_a * other_a + (wide_c * other_c)[None, :]
    if WRITES:
        out_at = out + wide_n * out_n + wide_a * out_a + (wide_c * out_c)[None, :]
    if SCALED:
        scale = tl.load(line + 2 * lines + sample * channels + c, mask=there, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(line + 3 * lines + sample * channels + c, mask=there, other=0.0).to(tl.float32)[None, :]
    count = tl.zeros((CHANNELS,), tl.float32)  # of pixels; the same for each channel
    mean = tl.zeros((CHANNELS,), tl.float32)
    squares = tl.zeros((CHANNELS,), tl.float32)
    for turn in range(TURNS):
        q = (part * TURNS + turn) * PIXELS + tl.arange(0, PIXELS)
        inside = (q >= above) & (q < above + pixels)
        mask = inside[:, None] & there[None, :]
        p = q - above
        r = p - p  # a row of all pixels
        if ROW_TIMES * PIXEL_TIMES > 1:
            r = (p // width + first) // ROW_TIMES
            p = p % width // PIXEL_TIMES
        r, p = r.to(tl.int64)[:, None], p.to(tl.int64)[:, None]
        value = tl.load(x_at + r * x_r + p * x_p, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            value = value * scale + shift
        value = _activated(value, FIRST, slope_first) * inner
        if ADDS:
            value += added * tl.load(other_at + r * other_r + p * other_p, mask=mask, other=0.0).to(tl.float32)
        value = _activated(value * factor, SECOND, slope_second)
        value = tl.where(mask, value, 0.0)
        if WRITES:
            value = value.to(out.dtype.element_ty)
            tl.store(out_at + q.to(tl.int64)[:, None] * out_p, value, mask=(q < out_pixels)[:, None] & there[None, :])
            value = value.to(tl.float32)
        if GATHERS:
            new = tl.sum(inside.to(tl.float32), 0)
            total = count + new
            share = new / tl.maximum(total, 1.0)
            near = tl.sum(value, 0) / tl.maximum(new, 1.0)
            apart = tl.where(mask, value - near[None, :], 0.0)
            difference = near - mean
            mean += difference * share
            squares += tl.sum(apart * apart, 0) + difference * difference * (count * share)
            count = total
    if GATHERS:
        samples = tl.num_programs(2) // frames
        at = moments + ((frame * tl.num_programs(0) + part) * samples + sample) * channels + c
        size = parts * samples * channels
        tl.store(at, count, mask=there)
        tl.store(at + size, mean, mask=there)
        tl.store(at + 2 * size, squares, mask=there)
