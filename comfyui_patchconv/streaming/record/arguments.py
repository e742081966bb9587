"""The tensors among an operator's arguments, and what the arguments say of the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from ..graph.node import Node, dense_strides
from .held import Held, is_ordinary
from .lazy import LazyTensor
from .schema import Operator, operator_of
from .shapes import SIMPLE, Spec


def written_by(operator: Operator, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The tensors that an operator writes to."""
    values = [args[place] if place < len(args) else kwargs.get(name) for place, name in operator.written]
    return tensors_in(values)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Arguments with `function` of each value within them."""
    if type(value) is tuple:
        return tuple(mapped(function, one) for one in value)
    if isinstance(value, list):
        return [mapped(function, one) for one in value]
    if type(value) is dict:
        return {key: mapped(function, one) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, one) for one in value))
    return function(value)


def tensors_in(value: Any) -> list[Any]:
    """The tensors among arguments, in order."""
    found: list[Any] = []
    for one in value.values() if type(value) is dict else value:
        kind = type(one)
        if kind is LazyTensor:
            found.append(one)
        elif kind in SIMPLE:
            continue
        elif kind is list or kind is tuple or kind is dict:
            found += tensors_in(one)
        elif isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            found += tensors_in(one)
    return found


def are_usual(tensors: list[Any]) -> bool:
    """Whether tensors are all deferred or ordinary."""
    return all([type(one) is LazyTensor or is_ordinary(one) for one in tensors])


def has_no_values(values: Any) -> bool:
    """Whether there is a tensor on the meta device among arguments."""
    return any(value.device.type == "meta" for value in tensors_in(values))


def nowhere(value: Any) -> Any:
    """The meta device in the place of any."""
    return torch.device("meta") if isinstance(value, torch.device) else value


def mixes_devices(values: Any) -> bool:
    """Whether some tensors are on the meta device and some are not."""
    kinds = {value.device.type for value in tensors_in(values)}
    return "meta" in kinds and len(kinds) > 1


def spec_of(value: Any) -> Optional[Spec]:
    """What a tensor looks like; None for anything else."""
    if type(value) is LazyTensor:
        return value.view_.spec
    return Spec.of(value) if isinstance(value, Tensor) else None


def is_dense(spec: Optional[Spec]) -> bool:
    """Whether places of memory follow each other without gaps, and none has two."""
    return spec is not None and dense_strides(spec.shape, spec.strides) == list(spec.strides)


def device_of(func: Any, args: Any, kwargs: dict[str, Any], sources: list[Node]) -> torch.device:
    """Where the result of `func` lies."""
    given = device_given(kwargs, None) if kwargs else None
    if given is None and operator_of(func).name in ("to", "type_as", "_to_copy"):
        given = next((value for value in args if isinstance(value, torch.device)), None)
        if given is None and len(args) > 1 and isinstance(args[1], (Node, Held)):
            given = args[1].device if isinstance(args[1], Node) else args[1].tensor.device
    if given is not None:
        return numbered(given)
    return sources[0].device if len(sources) == 1 else max(sources, key=lambda node: node.bytes).device


def device_given(kwargs: dict[str, Any], otherwise: Any) -> Any:
    """The device that an operator is asked for by name."""
    given = kwargs.get("device")
    return otherwise if given is None else torch.device(given)


def numbered(device: torch.device) -> torch.device:
    """A device with its number, where it has one."""
    if device.index is not None or device.type in ("cpu", "meta"):
        return device
    return torch.empty(0, device=device).device
