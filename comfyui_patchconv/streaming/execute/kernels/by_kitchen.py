"""A norm whose statistics are known, SiLU and padding by comfy-kitchen's kernel, which takes statistics since 0.2.40:
where a host has brought it, and there is no Triton."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor

from .chains import Chain
from .choice import Failures
from .elements import Form

_HALVES = (torch.float16, torch.bfloat16)

_MOST_GROUPS = 1024
"""That its kernel has; here each channel is one."""

_NEARLY_NOTHING = 2.0**-60
"""Instead of nothing, which some channels are scaled by: no mean gives what is added to them then."""


def operator() -> Optional[Any]:
    """Its operator; None where no host has imported one that takes statistics."""
    found = getattr(torch.ops.comfy_kitchen, "group_norm_silu_pad3d", None)
    if found is None:
        return None
    names = {argument.name for argument in found.default._schema.arguments}
    return found.default if names >= {"zero_pad", "stats"} else None


_failures = Failures("comfy-kitchen could not run a kernel")


def works() -> bool:
    """Whether its kernel has not failed so far."""
    return not _failures.seen


def takes(chain: Chain) -> bool:
    """Whether the kernel does all of a chain."""
    last, channels = chain.last, chain.last.shape[1]
    form = replace(chain.form, stage=0)
    usual = chain.links[0].element.kind == "scale" and form in (Form(scaled=True), Form(scaled=True, first="silu"))
    halves = last.dtype in _HALVES and last.dtype == chain.source.dtype
    return usual and halves and len(last.shape) in (4, 5) and channels % 8 == 0 and channels <= _MOST_GROUPS


def statistics(line: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The line of a norm (see `ScaleAndShift`) as means and reciprocal deviations of each channel of each frame,
    `[N·T, C, 2]` in float32."""
    scale, shift = line[2:].float().view(2, *shape[:2])
    scale = torch.where(scale == 0, _NEARLY_NOTHING, scale)
    found = torch.stack((-shift / scale, scale), -1)
    return found if len(shape) == 4 else found.repeat_interleave(shape[2], 0)


def compute(form: Form, map: Tensor, stats: Tensor, dim: int, above: int, below: int) -> Optional[Tensor]:
    """What a form gives of a map whose rows lie along `dim`, between so many rows of zeros, with its channels last.
    None where its rows lie along another dimension than height and width, or the kernel fails. stats: see
    `statistics`."""
    found = operator()
    if found is None or not works() or dim < map.dim() - 2:
        return None
    pad = [0, 0, above, below, 0] if dim == map.dim() - 2 else [above, below, 0, 0, 0]
    video = map if map.dim() == 5 else map[:, :, None]
    ones = torch.ones(map.shape[1], dtype=map.dtype, device=map.device)
    given = video, ones, None, map.shape[1], 0.0, pad, form.first is not None, True, stats
    result = _failures.attempt(lambda: found(*given))
    return result if result is None or map.dim() == 5 else result[:, :, 0]
