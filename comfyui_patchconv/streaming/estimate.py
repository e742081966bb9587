"""What a call will take, before its input is there: recorded on a copy of the model, with tensors that have no values.

The copy shares no parameter, buffer or mutable object with the model; its weights are on the meta device and its tables
are made for real, so that no cache is left with anything but ordinary tensors.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..memory.allocator import no_collections
from .call import Call, store_without_values
from .graph.node import Node
from .plan.schedule import USUAL, Tuning
from .record.shapes import Spec

_TABLE_BYTES = 1 << 20
"""Bytes up to which a buffer is copied with its values: it may be a table that the model looks at."""

Make = Callable[..., Tensor]
"""`make(shape, dtype=…, counted=True)`: an input of a copy that is counted, and whether its own bytes are."""


@dataclass(frozen=True)
class Expected:
    """peak: bytes at once, beyond weights and the input. offloaded: bytes of maps that do not fit. work: bytes of
    maps computed in strips, in all `calls` of the streamed part. eager: bytes of the activations without us, the input
    among them. in_strips: whether anything is computed otherwise than eager does."""

    peak: int
    offloaded: int
    work: int
    calls: int
    eager: int
    in_strips: bool


def expect(
    model: nn.Module,
    run: Callable[[Any, Make], object],
    *,
    device: torch.device,
    part: str = "",
    dtype: Optional[torch.dtype] = None,
    budget: Optional[int] = None,
    attributes: Optional[dict[str, Any]] = None,
    tuning: Tuning = USUAL,
    report: Optional[dict[str, int]] = None,
) -> Expected:
    """What `run(copy, make)` takes on `device`, `copy` being a copy of `model`, where it is streamed within `budget`.

    part: the method of it that is streamed alone, as `"decoder.forward"`; what the rest of `run` holds meanwhile counts
    beside: frames that are done, frames kept for the next call. dtype: of floating-point weights and of what `make`
    makes; None for their own, and float32. attributes: set on each module of the copy that has them. report: as of
    `streamed`, of the whole of `run`. `model` is neither run nor changed. Raises whatever `run` raises: code that looks
    at values cannot be counted.
    """
    counted = _Counted(budget, tuning, report)
    return _recorded(model, run, counted, device, dtype, attributes, part, streams=not part).expected()


def peak_activations(
    model: nn.Module,
    run: Callable[[Any, Make], object],
    *,
    device: torch.device,
    dtype: Optional[torch.dtype] = None,
    attributes: Optional[dict[str, Any]] = None,
) -> int:
    """The most bytes of tensors that are alive at one time in `run(copy, make)`, run eagerly; see `expect`.

    A view counts as what it looks into, and the workspace inside an operator is not seen.
    """
    return _recorded(model, run, _Counted(None, USUAL), device, dtype, attributes).expected().eager


def _recorded(
    model: nn.Module, run: Callable[[Any, Make], object], counted: _Counted, device: torch.device,
    dtype: Optional[torch.dtype], attributes: Optional[dict[str, Any]], part: str = "", streams: bool = False,
) -> _Counted:  # fmt: skip
    copied = phantom_copy(model, device=device, dtype=dtype, attributes=attributes)
    recorder = counted.call.recorder
    recorder.device = device
    usual = dtype or torch.float32

    def make(shape: Sequence[int], dtype: torch.dtype = usual, counted: bool = True) -> Tensor:
        with _disable_current_modes():  # it is no tensor of the program's
            empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
            return recorder.phantom_of(Spec.of(empty), device, counted)

    with _same_randomness(device), torch.no_grad(), recorder, no_collections():
        if part:
            owner, _, name = part.rpartition(".")
            module = copied.get_submodule(owner)
            module.__dict__[name] = counted.part(getattr(module, name))
        result = run(copied, make)
        if streams:
            counted.streamed()
        del result
    return counted


@contextmanager
def _same_randomness(device: torch.device) -> Iterator[None]:
    """What the block draws leaves no trace: the noise of the real call is that of a call that was not counted."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    on_device = [device] if device.type == "cuda" and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=on_device):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(drawn)


class _Counted:
    """One run that is counted."""

    def __init__(self, budget: Optional[int], tuning: Tuning, report: Optional[dict[str, int]] = None) -> None:
        self.call = Call(budget, {} if report is None else report, None, tuning, OrderedDict(), phantom=True)
        self.peak = self.calls = 0
        self._outside = True
        self._evaluate = self.call.evaluate
        self.call.recorder.evaluate = self._store

    def part(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """`method`, of which each call is counted as streamed."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            recorder = self.call.recorder
            if not self._outside:
                return method(*args, **kwargs)
            self._store_held()
            self.peak = max(self.peak, recorder.peak_since)
            held = recorder.alive
            self._outside = False
            self.call.begin()
            try:
                result = method(*args, **kwargs)
                self._store_held()
            finally:
                self._outside = True
            self.calls += 1
            self.peak = max(self.peak, held + self.call.peak)
            recorder.peak_since = recorder.alive
            return result

        return counted

    def streamed(self) -> None:
        """All of it was streamed."""
        self._outside = False
        self._store_held()
        self.calls += 1
        self.peak, self.call.recorder.peak_since = max(self.peak, self.call.peak), 0

    def expected(self) -> Expected:
        call, recorder = self.call, self.call.recorder
        peak = max(self.peak, recorder.peak_since) if self.calls else recorder.eager_peak
        return Expected(peak, call.offloaded, call.planned, self.calls, recorder.eager_peak, call.in_strips)

    def _store_held(self) -> None:
        """Mark what the program holds when a call begins or ends as stored."""
        cells = [tensor.view_.cell for tensor in self.call.recorder.held()]
        self.call.recorder.store(cell.value for cell in cells if cell.value is not None)

    def _store(self, roots: Sequence[Node], keep: Sequence[Node]) -> None:
        """Outside of the part eager runs: what it takes is counted by what is alive."""
        if self._outside:
            store_without_values(roots)
        else:
            self._evaluate(roots, keep)


def phantom_copy(
    model: Any,
    *,
    device: torch.device,
    dtype: Optional[torch.dtype] = None,
    attributes: Optional[dict[str, Any]] = None,
) -> Any:
    """A deep copy of a module without the values of its weights, and without what was hooked into it or put in the
    place of its methods: what counts is the computation as its class has it.

    Raises what `copy.deepcopy` raises for objects that cannot be copied.
    """
    memo: dict[int, Any] = {}
    kept: list[Any] = []  # what has an entry in `memo` must not die before the copy is done
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _without_values(tensor, name in module._parameters, dtype, device)
        kind = type(module)
        for name, value in module.__dict__.items():
            if callable(value) and callable(getattr(kind, name, None)) and not isinstance(value, nn.Module):
                memo[id(value)] = None
                kept.append(value)
            elif name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
                kept.append(value)
    copied = copy.deepcopy(model, memo)
    for original, module in zip(model.modules(), copied.modules()):
        kind = type(module)
        for name, value in list(module.__dict__.items()):
            if value is None and callable(getattr(kind, name, None)) and callable(original.__dict__.get(name)):
                del module.__dict__[name]
        for name, value in (attributes or {}).items():
            if name in original.__dict__:
                module.__dict__[name] = value
    return copied


def _without_values(tensor: Tensor, parameter: bool, dtype: Optional[torch.dtype], device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if not parameter and tensor.nbytes <= _TABLE_BYTES and not tensor.is_meta:
            return tensor.detach().to("cpu" if device.type == "cpu" else tensor.device, kind, copy=True)
        empty = torch.empty(tensor.shape, dtype=kind, device="meta")
        return nn.Parameter(empty, requires_grad=False) if parameter else empty
