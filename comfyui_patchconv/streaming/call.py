"""One call of a function, with feature maps among its arguments, in strips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .graph import Node
from .run import Run
from .tensor import CannotStreamError, LazyTensor, evaluated, finish


def carry_out(function: Callable[..., Any], args: Any, kwargs: Any, run: Run) -> Any:
    """What `function(*args, **kwargs)` returns, computed in strips as `run` says."""
    try:
        with torch.inference_mode():  # operators arrive whole there: one convolution, one group norm
            lazy = [enter(value, run) for value in args]
            result = function(*lazy, **{name: enter(value, run) for name, value in kwargs.items()})
            del lazy
    except CannotStreamError as error:
        run.report[str(error)] = 1
        result = function(*args, **kwargs)
    with torch.no_grad():
        finish((result, args, kwargs))
        for value in (*args, *kwargs.values()):
            _settle(value)
        return tree_map(evaluated, result)


def enter(value: Any, run: Run) -> Any:
    """A feature map becomes lazy; anything else is itself."""
    maps = type(value) is not LazyTensor and isinstance(value, Tensor) and value.dim() in (4, 5)
    return LazyTensor.of(Node.of(value, run, counted=False)) if maps and value.is_floating_point() else value


def _settle(container: Any) -> None:
    """Maps that were left in the caller's lists and dictionaries (video models keep frames there) become tensors."""
    if isinstance(container, (list, dict)):
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            container[key] = evaluated(value)
            _settle(value)
