"""Whole networks in strips: only what a normalisation or an unknown operator needs whole is ever stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import operators
from .tensor import CannotStreamError, LazyTensor, evaluated

__all__ = ["CannotStreamError", "stream", "streamed"]


def streamed(function: Callable[..., Any], report: Optional[dict[str, int]] = None) -> Callable[..., Any]:
    """`function`, with the feature maps among its arguments, and all that is computed from them, in strips.

    The result is that of `function`, in less memory. Gradients are off. Work is put off as long as possible, until the
    frames that hold intermediate maps are left and these can be given up as they are read.

    report: filled with the operators that were evaluated whole, and how often.
    """
    found = {} if report is None else report

    def enter(value: Any) -> Any:
        maps = isinstance(value, Tensor) and value.dim() in (4, 5) and value.is_floating_point()
        return LazyTensor.of(operators.leaf(value), found) if maps else value

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with torch.inference_mode():  # operators arrive whole there: one convolution, one group norm
                result = function(*tree_map(enter, args), **tree_map(enter, kwargs))
        except CannotStreamError:
            result = function(*args, **kwargs)
        with torch.no_grad():
            return tree_map(evaluated, result)

    return run


@contextmanager
def stream(module: nn.Module, report: Optional[dict[str, int]] = None) -> Iterator[nn.Module]:
    """Within the `with` block, `module` computes in strips; afterwards it is as it was. See `streamed`."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = streamed(module.forward, report)
    try:
        yield module
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
