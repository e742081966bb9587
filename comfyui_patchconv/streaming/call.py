"""One call of a function, with feature maps among its arguments, in strips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .buffers import require_room
from .errors import CannotStreamError
from .graph import Node
from .run import Run
from .tensor import LazyTensor, PlainMaps, evaluated, finish, is_plain_map


def carry_out(function: Callable[..., Any], args: Any, kwargs: Any, run: Run) -> Any:
    """What `function(*args, **kwargs)` returns, computed in strips as `run` says.

    Raises OSError where files have no room for what the plan keeps elsewhere; in a dry run CannotStreamError for what
    would run plain.
    """
    with run.origins.innermost():
        return _carry_out(function, args, kwargs, run)


def _carry_out(function: Callable[..., Any], args: Any, kwargs: Any, run: Run) -> Any:
    given = (*args, *kwargs.values())
    before = [pair for value in given for pair in _contents(value)]
    random = [] if run.dry else _random_states(given)
    try:
        with torch.inference_mode():  # operators arrive whole there: one convolution, one group norm
            lazy = [enter(value, run) for value in given]
            if not run.dry and any(type(value) is LazyTensor and value.device.type == "cpu" for value in lazy):
                require_room(run.plan.elsewhere)
            for container, content in before:
                _fill(container, content, lambda value: enter(value, run))
            run.origins.again = PlainMaps(run)
            with run.counter, run.origins:
                result = function(*lazy[: len(args)], **dict(zip(kwargs, lazy[len(args) :])))
            _require_apart(run, given, before)
            del lazy
    except BaseException as error:
        for container, content in before:
            _fill(container, content, lambda value: value)
        if run.dry or not isinstance(error, CannotStreamError):
            raise
        run.report[str(error)] = 1
        run.written.clear()
        for set_state, device, state in random:
            set_state(state, *device)
        with torch.no_grad():
            result = function(*args, **kwargs)
    del before  # the frames that were kept for this call can go as they are read
    with torch.no_grad():
        found: list[LazyTensor] = []
        _settle((result, *given), lambda tensor: found.append(tensor) or tensor)
        finish(found, run.written.values())
        _settle((result, *given), evaluated)
        return tree_map(evaluated, result)


def joins(args: Any, kwargs: Any) -> bool:
    """Whether the arguments of a call are deferred already, by a streamed call that it is a part of."""
    return any(type(value) is LazyTensor for value in (*args, *kwargs.values()))


def _contents(value: Any) -> list[tuple[Any, Any]]:
    """The lists and dictionaries of an argument, which a call may change, and a copy of each."""
    if not isinstance(value, (list, dict)):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [(value, value.copy()), *(pair for one in inner for pair in _contents(one))]


def _fill(container: Any, content: Any, put: Callable[[Any], Any]) -> None:
    """Make a list or dictionary hold what is in `content`, another one, each value as `put` gives it back."""
    if isinstance(container, dict):
        container.clear()
        container.update((key, put(value)) for key, value in content.items())
    else:
        container[:] = [put(value) for value in content]


def enter(value: Any, run: Run) -> Any:
    """A feature map becomes lazy; anything else is itself."""
    return LazyTensor.of(Node.of(value, run, counted=False), original=value) if is_plain_map(value) else value


def _settle(value: Any, put: Callable[[LazyTensor], Any], depth: int = 4) -> None:
    """Put something in the place of each map that is left in lists, dictionaries and objects.

    Video models keep frames for the next call in the caller's lists; an encoder's result may be a distribution.
    """
    if isinstance(value, (Tensor, nn.Module)) or depth == 0:
        return
    inside = value if isinstance(value, (list, dict, tuple)) else getattr(value, "__dict__", {})
    for key, one in list(inside.items() if isinstance(inside, dict) else enumerate(inside)):
        if not isinstance(one, LazyTensor):
            _settle(one, put, depth - 1)
        elif isinstance(inside, tuple):
            put(one)  # in a result, which is mapped as a whole
        else:
            inside[key] = put(one)


def _require_apart(run: Run, given: Any, before: list[tuple[Any, Any]]) -> None:
    """Raise CannotStreamError where an argument that was written to shares its memory with another one."""
    if not run.written:
        return
    contents = [one for _, content in before for one in (content.values() if isinstance(content, dict) else content)]
    storages = [value.untyped_storage()._cdata for value in (*given, *contents) if isinstance(value, Tensor)]
    if any(storages.count(tensor.untyped_storage()._cdata) > 1 for tensor, _ in run.written.values()):
        raise CannotStreamError("an argument is written to that shares its memory with another one")


def _random_states(given: Any) -> list[tuple[Any, Any, Tensor]]:
    """Of the generators that a call may draw from, beside its own: what sets one, for which device, and its state."""
    states: list[tuple[Any, Any, Tensor]] = [(torch.set_rng_state, (), torch.get_rng_state())]
    for device in dict.fromkeys(value.device for value in given if isinstance(value, Tensor)):
        of_device: Any = getattr(torch, device.type, None)
        if device.type != "cpu" and hasattr(of_device, "get_rng_state"):
            states.append((of_device.set_rng_state, (device,), of_device.get_rng_state(device)))
    return states


def signature(values: Any) -> Any:
    """What a plan depends on: the shapes, types and devices of tensors."""
    return tuple(
        (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else type(value)
        for value in tree_flatten(values)[0]
    )
