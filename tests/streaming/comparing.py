"""Compares what a streamed call gives and leaves with what one eager call gives and leaves."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Optional

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Tuning, streamed
from comfyui_patchconv.streaming.record.lazy import LazyTensor

ONE_ROW = Tuning(strip_bytes=1, always=True)
FEW_ROWS = Tuning(strip_bytes=1_000, always=True)
ONE_STRIP = Tuning(strip_bytes=1 << 40, always=True)
TUNINGS = {"one row": ONE_ROW, "few rows": FEW_ROWS, "one strip": ONE_STRIP}
Mode = Callable[[], AbstractContextManager[Any]]
MODES: dict[str, Mode] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}  # else 1e-5: what is in double was in single precision before


def skip_without_convolutions(dtype: torch.dtype) -> None:
    """torch before 2.2 has none in float16 on a CPU."""
    try:
        F.conv2d(torch.ones(1, 1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype))
    except RuntimeError:
        pytest.skip(f"this PyTorch has no {dtype} convolution on the CPU")


KEPT_STAY_LAZY = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 3)
"""Whether a map that a program keeps stays deferred, as docs/limits.md says: no object becomes another there."""

KEPT_ARE_ORDINARY = pytest.mark.skipif(KEPT_STAY_LAZY, reason="what a program keeps stays deferred before torch 2.3")
"""Of tests that look at what kind of object a kept map is."""


class DiffersError(AssertionError):
    """What a streamed call gave or left is not what eager gives or leaves; `kind` is a word for how."""

    def __init__(self, kind: str, path: str, text: str) -> None:
        super().__init__(f"{path}: {kind}: {text}")
        self.kind = kind


def seed_all(seed: int = 0) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed keeps a stack for each device that is not there
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)


def random_states() -> dict[str, str]:
    """A digest of what each generator draws from: thousands of numbers, which nobody wants to see where they differ."""
    numpy_state: Any = np.random.get_state()
    states = {"torch": torch.get_rng_state().tolist(), "random": random.getstate(), "numpy": numpy_state[1:3]}
    return {name: hashlib.sha256(pickle.dumps(state)).hexdigest() for name, state in states.items()}


def copied(value: Any, memo: Optional[dict[Any, Any]] = None) -> Any:
    """A copy for another run: with the same strides, and the same tensors sharing memory with one another."""
    memo = {} if memo is None else memo
    if ("object", id(value)) in memo:
        return memo["object", id(value)][0]
    if isinstance(value, Tensor):
        found = _copied_tensor(value, memo)
    elif isinstance(value, dict):
        found = type(value)((copied(key, memo), copied(item, memo)) for key, item in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        found = type(value)(*(copied(item, memo) for item in value))
    elif isinstance(value, (list, tuple, set)):
        found = type(value)(copied(item, memo) for item in value)
    else:
        found = copy.deepcopy(value)
    memo["object", id(value)] = found, value
    return found


def _copied_tensor(value: Tensor, memo: dict[Any, Any]) -> Tensor:
    if value.layout != torch.strided or value.is_meta:
        found = value.detach().clone()
    else:
        storage: Any = value.untyped_storage()
        key = "storage", storage.data_ptr()
        if key not in memo:
            memo[key] = storage.clone(), storage
        found = torch.empty(0, dtype=value.dtype, device=value.device)
        found.set_(memo[key][0], value.storage_offset(), value.shape, value.stride())
    if isinstance(value, nn.Parameter):
        return nn.Parameter(found, value.requires_grad)
    return found.requires_grad_(value.requires_grad)


def assert_ordinary(value: Tensor, path: str = "tensor") -> None:
    """An evaluated tensor with memory of its own, wrapped by nobody."""
    if torch._is_functional_tensor(value):  # type: ignore[reportPrivateImportUsage]
        raise DiffersError("type", path, "a functional wrapper")
    there = value.layout == torch.strided and value.device.type == "cpu" and value.numel() > 0
    if there and not (value.untyped_storage().nbytes() and value.data_ptr()):
        raise DiffersError("type", path, "a tensor without memory")


def assert_alike(
    actual: Any, expected: Any, tolerance: Optional[float] = None, *, strides: bool = True, path: str = "result"
) -> None:
    """The same types, structure, shapes, strides and values. Raises DiffersError, which says where."""
    comparison = _Comparison(tolerance)
    comparison.compare(actual, expected, path)
    if strides and comparison.other_strides:
        raise DiffersError("strides", *comparison.other_strides[0])


def _ordinary(actual: Any, expected: Any) -> Any:
    """Before torch 2.3 a map that a program keeps stays deferred: its values, where a tensor is expected."""
    if not KEPT_STAY_LAZY or type(actual) is not LazyTensor or type(expected) is not Tensor:
        return actual
    return torch.empty_strided(actual.shape, actual.stride(), dtype=actual.dtype).copy_(actual)


class _Comparison:
    """Walks through both values at once."""

    def __init__(self, tolerance: Optional[float]) -> None:
        self.tolerance = tolerance
        self.seen: list[tuple[Any, Any]] = []
        self.other_strides: list[tuple[str, str]] = []

    def compare(self, actual: Any, expected: Any, path: str) -> None:
        actual = _ordinary(actual, expected)
        if type(actual) is not type(expected):
            raise DiffersError("type", path, f"{type(actual).__name__} for {type(expected).__name__}")
        if isinstance(expected, Tensor):
            self.tensors(actual, expected, path)
        elif isinstance(expected, np.ndarray):
            self.arrays(actual, expected, path)
        elif isinstance(expected, (float, np.floating)):
            self.numbers(float(actual), float(expected), path)
        elif isinstance(expected, complex):
            self.numbers(actual.real, expected.real, path)
            self.numbers(actual.imag, expected.imag, path)
        elif isinstance(expected, (str, bytes, int, bool, type, type(None), torch.dtype, torch.device, range)):
            self.require(actual == expected, "value", path, f"{actual!r} for {expected!r}")
        elif not any(expected is one for one, _ in self.seen):
            self.seen.append((expected, actual))
            self.structures(actual, expected, path)

    def require(self, held: bool, kind: str, path: str, text: str) -> None:
        if not held:
            raise DiffersError(kind, path, text)

    def structures(self, actual: Any, expected: Any, path: str) -> None:
        if isinstance(expected, Mapping):
            self.sequences(list(actual), list(expected), f"keys of {path}")
            for (key, one), (_, other) in zip(actual.items(), expected.items()):
                self.compare(one, other, f"{path}[{key if isinstance(key, (str, int)) else '…'}]")
        elif isinstance(expected, (set, frozenset)):
            self.sequences(sorted(actual, key=_in_order), sorted(expected, key=_in_order), path)
        elif isinstance(expected, nn.Module):
            self.compare(dict(actual.named_parameters()), dict(expected.named_parameters()), path)
            self.compare(dict(actual.named_buffers()), dict(expected.named_buffers()), path)
        elif isinstance(expected, Iterable) and hasattr(expected, "__len__"):
            self.sequences(list(actual), list(expected), path)
        if isinstance(expected, (Iterator, nn.Module)) or callable(expected):
            return
        for name in _attributes(expected):
            self.require(hasattr(actual, name), "structure", path, f"no attribute {name}")
            self.compare(getattr(actual, name), getattr(expected, name), f"{path}.{name}")

    def sequences(self, actual: list[Any], expected: list[Any], path: str) -> None:
        self.require(len(actual) == len(expected), "structure", path, f"{len(actual)} items for {len(expected)}")
        for index, (one, other) in enumerate(zip(actual, expected)):
            self.compare(one, other, f"{path}[{index}]")

    def numbers(self, actual: float, expected: float, path: str) -> None:
        if math.isnan(expected) or math.isinf(expected):
            same = math.isnan(actual) if math.isnan(expected) else actual == expected
        else:
            same = abs(actual - expected) <= (self.tolerance or 1e-5) * max(abs(expected), 1.0)
        self.require(same, "value", path, f"{actual!r} for {expected!r}")

    def arrays(self, actual: Any, expected: Any, path: str) -> None:
        self.require(actual.dtype == expected.dtype, "dtype", path, f"{actual.dtype} for {expected.dtype}")
        if expected.dtype == object:
            self.sequences(list(actual.flat), list(expected.flat), path)
        else:
            unsigned = (np.uint16, np.uint32, np.uint64)  # torch 2.1 has no such types
            one, other = (found.astype(np.int64) if found.dtype in unsigned else found for found in (actual, expected))
            self.tensors(torch.from_numpy(one.copy()), torch.from_numpy(other.copy()), path)

    def tensors(self, actual: Tensor, expected: Tensor, path: str) -> None:
        for name in ("shape", "dtype", "device", "layout", "requires_grad"):
            one, other = getattr(actual, name), getattr(expected, name)
            self.require(one == other, name, path, f"{one} for {other}")
        if expected.is_meta:
            return
        assert_ordinary(actual, path)
        if expected.layout == torch.strided and expected.numel():
            one, other = ([s for s, size in zip(t.stride(), t.shape) if size > 1] for t in (actual, expected))
            if one != other:
                self.other_strides.append((path, f"{actual.stride()} for {expected.stride()}"))
        self.values(actual.detach(), expected.detach(), path)

    def values(self, actual: Tensor, expected: Tensor, path: str) -> None:
        if expected.layout != torch.strided:
            actual, expected = actual.to_dense(), expected.to_dense()
        if not expected.numel():
            return
        tolerance = TOLERANCE.get(expected.dtype, 1e-5) if self.tolerance is None else self.tolerance
        if not (expected.is_floating_point() or expected.is_complex()):
            count = int((actual != expected).sum())
            self.require(not count, "value", path, f"{count} of {expected.numel()} values differ")
            return
        wide = torch.complex128 if expected.is_complex() else torch.float64
        actual, expected = actual.to(wide), expected.to(wide)
        finite = expected.isfinite()
        self.require(torch.equal(finite, actual.isfinite()), "value", path, "other values are finite")
        self.require(torch.equal(expected.isnan(), actual.isnan()), "value", path, "other values are NaN")
        infinite = expected.isinf()
        self.require(torch.equal(actual[infinite], expected[infinite]), "value", path, "other infinities")
        if bool(finite.any()):
            scale = max(float(expected[finite].abs().max()), 1e-30)
            error = float((actual[finite] - expected[finite]).abs().max()) / scale
            self.require(error <= tolerance, "value", path, f"largest error {error:.1e} of the range")


def _in_order(value: Any) -> Any:
    return (0, float(value.double().sum())) if isinstance(value, Tensor) else (1, str(value))


def _attributes(value: Any) -> list[str]:
    if isinstance(value, (list, tuple, dict, set, frozenset)) and not hasattr(value, "__dict__"):
        return []
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    names = [*getattr(value, "__dict__", {}), *([slots] if isinstance(slots, str) else slots)]
    return [name for name in names if not name.startswith("__") and hasattr(value, name)]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def sharing(value: Any) -> list[tuple[int, int, bool]]:
    """Which two of the tensors share memory, and whether they are one object."""
    found = tensors_in(value)
    places = [tensor.untyped_storage().data_ptr() if tensor.numel() else index for index, tensor in enumerate(found)]
    return [
        (first, second, found[first] is found[second])
        for second in range(len(found))
        for first in range(second)
        if places[first] == places[second]
    ]


def assert_as_eager(
    function: Callable[..., Any],
    *args: Any,
    tuning: Tuning = FEW_ROWS,
    budget: Optional[int] = None,
    mode: Mode = torch.no_grad,
    tolerance: Optional[float] = None,
    strides: bool = True,
    memory: bool = False,
    report: Optional[dict[str, int]] = None,
    calls: int = 1,
) -> None:
    """A streamed call of `function` gives and leaves what eager does: results, arguments, random numbers.

    memory: which results and arguments share memory is compared as well. calls: of one streamed function, each with
    copies of the arguments.
    """
    given = copied(args)
    with mode():
        seed_all()
        expected, states = function(*given), random_states()
        run = streamed(function, budget=budget, report=report, tuning=tuning)
        for _ in range(calls):
            same = copied(args)
            seed_all()
            actual = run(*same)
            assert_alike(actual, expected, tolerance, strides=strides)
            assert_alike(same, given, tolerance, strides=strides, path="arguments")
            assert_alike(random_states(), states, path="random state")
            if memory:
                one, other = sharing((same, actual)), sharing((given, expected))
                if one != other:
                    raise DiffersError("memory", "result", f"shared by {one}, not by {other}")


class Progress:
    """Counts the steps that a streamed call reports."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, *_: Any) -> None:
        self.steps += 1
