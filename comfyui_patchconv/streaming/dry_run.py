"""What a call will take, found by running it without values, and the plan that suits it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from ..footprint import twin
from . import buffers
from .call import carry_out
from .errors import CannotStreamError
from .run import Plan, Run

_WORTH = 0.95
"""A plan that computes more has to take less than this share of the other's memory."""


def choose(
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    *,
    budget: Optional[int] = None,
    device: Optional[torch.device] = None,
    dtype: Optional[torch.dtype] = None,
    attributes: Optional[dict[str, Any]] = None,
) -> Plan:
    """The plan for `function(*args, **kwargs)`: the least work of those that stay within `budget`, and that find room
    for what they keep elsewhere.

    Where no plan does, the one that puts least elsewhere, or one for a smaller budget that takes less; without a
    budget, the one of the lowest peak.

    function: a module or a method of one, which runs on a copy with weights that take no memory. args, kwargs: none of
    their tensors is read; on the meta device they stand for tensors on `device`. device, dtype, attributes: see
    `footprint.peak_activations`; the device is that of the first tensor by default. Raises TypeError for any other
    function, because it would see tensors without values itself, and whatever the method raises when it does.
    """
    if not isinstance(getattr(function, "__self__", function), nn.Module):
        raise TypeError(f"{function!r} cannot be planned: give a module or a method of one.")
    if device is None:
        device = next(iter(_tensors((args, kwargs)))).device
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied = twin(function, mode, device=device, dtype=dtype, attributes=attributes)

    def trial(unstored_from: Optional[int], blanks: bool, budget: Optional[int] = budget) -> tuple[Plan, set[int]]:
        run = Run(Plan(budget, unstored_from, blanks), dry=True)
        with torch.inference_mode(), mode:
            positional, named = tree_map(lambda value: _fake(value, device), (args, kwargs))
            run.counter = _Plain(run, device)
            carry_out(copied, positional, named, run)
        figures = dict(peak=run.peak, stored=run.stored, moved=run.moved, elsewhere=run.elsewhere, work=run.work)
        return replace(run.plan, **figures), run.again

    try:
        first, again = trial(None, True)
    except CannotStreamError:  # one that is written to in a way that is not known, it may be
        first, again = trial(None, False)
    unused = buffers.room(device) if first.elsewhere else 0
    if budget is not None and first.peak <= budget and first.elsewhere <= unused:
        return first
    best = first
    for size in sorted((size for size in again if size >= first.peak / 8), reverse=True):
        plan, _ = trial(size, first.blanks)
        if not _better(plan, best, budget, unused):
            break
        best = plan
    if budget is not None and best.peak > budget:
        # What is placed while there is room stays where it is: less of it leaves more for what has to be there.
        for part in (budget // 2, budget // 4):
            plan, _ = trial(best.unstored_from, first.blanks, part)
            if plan.peak < _WORTH * best.peak and plan.elsewhere <= max(unused, best.elsewhere):
                best = plan
    return best


def choose_if_possible(
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    *,
    budget: Optional[int] = None,
    device: Optional[torch.device] = None,
    attributes: Optional[dict[str, Any]] = None,
) -> Plan:
    """As `choose`, but where `function` cannot run without values a plan that knows the budget alone."""
    try:
        return choose(function, args, kwargs, budget=budget, device=device, attributes=attributes)
    except Exception as error:  # anything: it streams all the same
        logging.getLogger(__name__).info("No plan for %r (%s: %s).", function, type(error).__name__, error)
        return Plan(budget, blanks=False)


class _Plain(TorchDispatchMode):
    """Within it, what `run` takes has in it the tensors on `device` that are alive without being feature maps: what was
    evaluated whole, and what is made of that."""

    def __init__(self, run: Run, device: torch.device) -> None:
        super().__init__()
        self._run, self._device = run, device
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_flatten((args, kwargs))[0]:
            self._remember(tensor, made=False)
        result = func(*args, **kwargs or {})
        for tensor in tree_flatten(result)[0]:
            self._remember(tensor, made=True)
        self._count()
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._count()  # without what was the function's own

    def _count(self) -> None:
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        self._run.plain = sum(size for key, (_, size) in self._storages.items() if key not in self._run.of_maps)
        self._run.note(0, 0, 0)

    def _remember(self, tensor: Any, made: bool) -> None:
        if isinstance(tensor, FakeTensor):
            storage = tensor.untyped_storage()
            counts = made and tensor.device.type == self._device.type
            self._storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes() if counts else 0))


def _better(plan: Plan, best: Plan, budget: Optional[int], room: int) -> bool:
    """Whether a plan that computes more is worth it. room: bytes that can be kept elsewhere."""
    if budget is None:
        return plan.peak < _WORTH * best.peak
    misses, best_misses = ((one.peak > budget, one.elsewhere > room) for one in (plan, best))
    return (*misses, plan.moved) < (*best_misses, _WORTH * best.moved)


def _fake(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=device if value.is_meta else value.device)


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda value: found.append(value) if isinstance(value, Tensor) else None, values)
    return found
