"""Whole networks in strips: only what a normalisation or an unknown operator needs whole is ever stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional, Union

from torch import nn

from .call import carry_out, joins, signature
from .dry_run import choose, choose_if_possible
from .errors import CannotStreamError
from .estimate import Expected, expect
from .run import OnProgress, Plan, Run

__all__ = [
    "CannotStreamError",
    "Expected",
    "Plan",
    "Run",
    "carry_out",
    "choose",
    "choose_if_possible",
    "expect",
    "joins",
    "signature",
    "stream",
    "streamed",
]


def streamed(
    function: Callable[..., Any],
    *,
    budget: Optional[int] = None,
    report: Optional[dict[str, int]] = None,
    on_progress: Optional[OnProgress] = None,
) -> Callable[..., Any]:
    """`function`, with the feature maps among its arguments, and all that is computed from them, in strips.

    The result is that of `function`, in less memory. Gradients are off. Work is put off as long as possible, until the
    frames that hold intermediate maps are left and these can be given up as they are read.

    budget: bytes of the device, beyond weights and arguments, to stay within: maps that do not fit are kept in host
    memory, or in a file where the device is the CPU. None for no limit. Where even a strip does not fit, more is used.
    report: filled with the operators that were evaluated whole, and how often. on_progress: see `OnProgress`; what it
    raises ends the call. Raises ValueError for a budget that is not a whole number above 0.
    """
    if budget is not None and (not isinstance(budget, int) or budget <= 0):
        raise ValueError(f"budget is {budget!r}: give a whole number of bytes above 0, or None for no limit.")
    plans: dict[Any, Plan] = {}

    def run(*args: Any, **kwargs: Any) -> Any:
        if joins(args, kwargs):
            return function(*args, **kwargs)
        key = signature((args, kwargs))
        if key not in plans:
            plans[key] = choose_if_possible(function, args, kwargs, budget=budget)
        return carry_out(function, args, kwargs, Run(plans[key], report, on_progress))

    return run


@contextmanager
def stream(
    target: Union[nn.Module, Callable[..., Any]],
    *,
    budget: Optional[int] = None,
    report: Optional[dict[str, int]] = None,
    on_progress: Optional[OnProgress] = None,
) -> Iterator[Any]:
    """Within the `with` block, or the decorated function, `target` computes in strips; afterwards it is as it was.

    target: a module, or a method of an object (`vae.decode`). The other arguments are those of `streamed`.
    Raises TypeError for anything else.
    """
    owner, name = (target, "forward") if isinstance(target, nn.Module) else _method(target)
    before = owner.__dict__.get(name)
    method = streamed(getattr(owner, name), budget=budget, report=report, on_progress=on_progress)
    owner.__dict__[name] = method
    try:
        yield target
    finally:
        del owner.__dict__[name]
        if before is not None:
            owner.__dict__[name] = before


def _method(target: Any) -> tuple[Any, str]:
    """The object and the name under which it has a method; one that a decorator made may have the decorator's."""
    owner, function = getattr(target, "__self__", None), getattr(target, "__func__", None)
    names = [getattr(target, "__name__", ""), *dir(type(owner))]
    name = next((name for name in names if getattr(getattr(owner, name, None), "__func__", None) is function), "")
    if owner is None or not hasattr(owner, "__dict__") or not name:
        raise TypeError(f"{target!r} cannot be streamed: give a module, or a method of an object such as vae.decode.")
    return owner, name
