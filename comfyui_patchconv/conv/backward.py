"""Gradients of a convolution in strips: strips forward, strips backward, and no more kept than eager keeps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

from .autocast import autocast_state
from .transforms import is_batched, transformed


class OwnWaysError(Exception):
    """The forward that was to run in strips does more than its module's settings say: it is to run whole."""


class Differentiable(torch.autograd.Function):
    """Strips forward and backward. Keeps for backward what an eager convolution keeps: input, weight and bias."""

    @staticmethod
    def forward(ctx: Any, call: Any, strip_rows: int, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.call, ctx.strip_rows, ctx.autocast = call, strip_rows, _same_autocast(input.device.type)
        ctx.save_for_backward(input, weight, bias)
        with torch.enable_grad():  # of nothing here: shows whether the forward has parameters of its own
            return call.tiled(input.detach(), weight.detach(), None if bias is None else bias.detach(), strip_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Optional[Tensor], ...]:
        (grad,) = grads
        call, tensors = ctx.call, ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        again = torch.is_grad_enabled()  # a second derivative is wanted
        if again or transformed() or is_batched(grad):  # differentiate the whole convolution
            wanted = [tensor for tensor, need in zip(tensors, needed) if need]
            with torch.enable_grad(), ctx.autocast():
                output = call.whole(*tensors)
            found = iter(torch.autograd.grad(output, wanted, grad, create_graph=again))
            return (None, None, *(next(found) if need else None for need in needed))
        input, weight, bias = tensors
        # Sums over strips: in float32 at least, so that halves do not lose what a whole convolution keeps.
        sums = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) if need else None
            for tensor, need in zip(tensors, needed)
        ]
        size, rows = input.shape[call.dim], grad.shape[call.dim]

        def work(first: int, last: int) -> None:
            window = call.window(first, last, size)
            leaves = [None if t is None else t.detach() for t in (call.read(input, window), weight, bias)]
            wanted = [leaf.requires_grad_() for leaf, need in zip(leaves, needed) if leaf is not None and need]
            with torch.enable_grad(), ctx.autocast():
                result = call.strip(leaves[0], window, first, last, leaves[1], leaves[2])
            found = torch.autograd.grad(result, wanted, grad.narrow(call.dim, first, last - first))
            totals = [total for total in sums if total is not None]
            parts = [part.to(total.dtype) for part, total in zip(found, totals)]
            for total, part in zip(totals, parts):
                if total is not sums[0]:
                    total += part
                elif isinstance(window.rows, range):
                    total.narrow(call.dim, window.rows.start, len(window.rows)).add_(part)
                else:
                    total.index_add_(call.dim, torch.tensor(window.rows, device=total.device), part)

        for _ in call.each_strip(work, input, rows, ctx.strip_rows):
            pass
        return (None, None, *(None if s is None else s.to(t.dtype) for s, t in zip(sums, tensors)))


def _same_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """What makes a context with the present state of autocast."""
    if device_type == "meta":
        return nullcontext
    return partial(torch.autocast, device_type, *autocast_state(device_type))
