"""What a method takes of which one part is streamed, as often as it calls that: video comes in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from ..footprint import counting, twin
from .call import signature
from .dry_run import choose
from .run import Plan


@dataclass(frozen=True)
class Expected:
    """peak: bytes at once, beyond weights. work: bytes of maps that the streamed part computes, in all its `calls`."""

    peak: int
    work: int
    calls: int


def expect(
    model: nn.Module,
    part: str,
    run: Callable[[Any], object],
    *,
    device: torch.device,
    dtype: Optional[torch.dtype] = None,
    budget: Optional[int] = None,
    seconds: float = float("inf"),
    attributes: Optional[dict[str, Any]] = None,
) -> Expected:
    """What `run(copy)` takes while the method `part` of the copy, as `"decoder.forward"`, is streamed within `budget`.

    The parts' plans, and what the rest of `run` holds meanwhile: frames that are done, frames kept for the next call.
    `model` is neither run nor changed. The other arguments are those of `footprint.peak_activations`. Raises as that
    and `choose` do.
    """
    owner, _, name = part.rpartition(".")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied = twin(model, mode, device=device, dtype=dtype, attributes=attributes)
    plain = getattr(copied.get_submodule(owner), name)
    calls: list[tuple[int, Any]] = []
    arguments: dict[Any, Any] = {}

    with counting(mode, device, seconds) as live:

        def noted(*args: Any, **kwargs: Any) -> Any:
            key = signature((args, kwargs))
            calls.append((live.now, key))
            if key not in arguments:
                arguments[key] = tree_map(_shape_of, (args, kwargs))
            with live.paused():
                return plain(*args, **kwargs)

        copied.get_submodule(owner).__dict__[name] = noted
        run(copied)
    part_owner = model.get_submodule(owner)
    function = MethodType(getattr(type(part_owner), name), part_owner)  # its own, not what is patched in
    plans: dict[Any, Plan] = {
        key: choose(
            function,
            *tree_map(_without_values, shapes),
            budget=budget,
            device=device,
            dtype=dtype,
            attributes=attributes,
        )
        for key, shapes in arguments.items()
    }
    peaks = [held + plans[key].peak for held, key in calls]
    return Expected(max([live.peak, *peaks]), sum(plans[key].work for _, key in calls), len(calls))


@dataclass(frozen=True)
class _Shape:
    """Of a tensor that may go meanwhile."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


def _shape_of(value: Any) -> Any:
    return _Shape(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _without_values(value: Any) -> Any:
    return torch.empty(value.sizes, dtype=value.dtype, device="meta") if isinstance(value, _Shape) else value
