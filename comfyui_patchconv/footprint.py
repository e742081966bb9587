"""How much memory a computation's activations need at once, counted on fake tensors: shapes only, no arithmetic."""

from __future__ import annotations

import copy
import time
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


def peak_live_bytes(
    call: Callable[[], object],
    *,
    device: Optional[torch.device] = None,
    mode: Optional[FakeTensorMode] = None,
    seconds: float = float("inf"),
) -> int:
    """The most bytes of tensors alive at one time of those that `call` makes, run on fake tensors.

    What existed before is not counted, a view counts as what it looks into, and the workspace inside an operator is
    not seen. Gradients are off.

    device: count only tensors on it; None for all. mode: the fake mode of tensors that `call` already holds.
    seconds: when to give up. Raises TimeoutError then, and whatever `call` raises: code that looks at values cannot
    run on fake tensors.
    """
    with counting(mode or FakeTensorMode(allow_non_fake_inputs=True), device, seconds) as live:
        call()
    return live.peak


@contextmanager
def counting(mode: FakeTensorMode, device: Optional[torch.device], seconds: float) -> Iterator[Live]:
    """Within the block tensors are fake, and those that are made are counted; see `peak_live_bytes`."""
    # A tensor made in inference mode has no version counter, which fake tensors of older torch versions ask for.
    with torch.inference_mode(False), torch.no_grad(), mode, Live(mode, device, time.monotonic() + seconds) as live:
        yield live


def peak_activations(
    module: nn.Module,
    run: Callable[[Any], object],
    *,
    device: torch.device,
    dtype: Optional[torch.dtype] = None,
    seconds: float = float("inf"),
    attributes: Optional[dict[str, Any]] = None,
) -> int:
    """`peak_live_bytes` of `run(copy)`, where `copy` is `module` with weights that take no memory, all on `device`.

    `module` is neither run nor changed, and may lie elsewhere. Methods that were replaced on one of its modules are
    the class's own again in the copy: what counts is the plain computation.

    dtype: of floating-point weights; None for their own. attributes: set on each module of the copy that has them.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied = twin(module, mode, device=device, dtype=dtype, attributes=attributes)
    return peak_live_bytes(lambda: run(copied), device=device, mode=mode, seconds=seconds)


def twin(
    module: Any,
    mode: FakeTensorMode,
    *,
    device: torch.device,
    dtype: Optional[torch.dtype] = None,
    attributes: Optional[dict[str, Any]] = None,
) -> Any:
    """The copy that `peak_activations` runs, of a module or a method of one; its weights are fake tensors of `mode`."""
    return _Twins(mode, device, dtype, attributes or {}).of(module)


class Live(TorchDispatchMode):
    """Adds up, after each operator, the storages that operators made and that something still holds.

    peak: the most bytes so far.
    """

    def __init__(self, mode: FakeTensorMode, device: Optional[torch.device], deadline: float) -> None:
        super().__init__()
        self.peak, self._paused = 0, False
        self._mode, self._device, self._deadline = mode, device, deadline
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._fakes: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self._deadline:
            raise TimeoutError("counting activations takes too long")
        args, kwargs = tree_map(self._enter, (args, kwargs or {}))
        result = func(*args, **kwargs)
        for tensor in tree_flatten(result)[0]:
            self._note(tensor, made=True)
        if not self._paused:
            self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        """Bytes of tensors that are alive."""
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        return sum(size for _, size in self._storages.values())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is alive within the block alone makes no peak; what outlives it counts from then on."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _enter(self, value: Any) -> Any:
        """An operator's argument. A tensor that is not fake yet becomes so, once, and is none that was made here."""
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            value = self._mode.from_tensor(value)
            self._fakes.append(value)
        self._note(value, made=False)
        return value

    def _note(self, value: object, made: bool) -> None:
        """Remember the storage of a tensor; the first time tells whether it was made here."""
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        counts = made and (self._device is None or _same_device(value.device, self._device))
        # The reference keeps the address from being given to another storage while the entry is here.
        self._storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes() if counts else 0))


class _Twins:
    """Copies of modules whose parameters and buffers are fake; one copy per module and tensor, shared as before."""

    def __init__(
        self,
        mode: FakeTensorMode,
        device: torch.device,
        dtype: Optional[torch.dtype],
        attributes: dict[str, Any],
    ) -> None:
        self._mode, self._device, self._dtype, self._attributes = mode, device, dtype, attributes
        self._twins: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """The copy of a module, of a container with modules in it, or of a bound method; anything else is itself."""
        if isinstance(value, nn.Module):
            return self._twins[id(value)] if id(value) in self._twins else self._module(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.of(value.__self__))
        # New containers in any case: a run that notes something in one leaves the original be. Only of these types,
        # because others, such as a frozen configuration, need not work once copied.
        if type(value) in (dict, OrderedDict, defaultdict):
            twin: Any = copy.copy(value)
            twin.update([(key, self.of(item)) for key, item in twin.items()])
            return twin
        for kind in (list, tuple, set):
            if type(value) is kind:
                return kind(self.of(item) for item in value)
        return value

    def _module(self, module: nn.Module) -> nn.Module:
        kind = type(module)
        twin = self._twins[id(module)] = object.__new__(kind)
        state = dict(module.__dict__)
        tensors = {name: state.pop(name) for name in ("_parameters", "_buffers")}
        for name, value in state.items():
            replaced = callable(value) and callable(getattr(kind, name, None))
            if not replaced:
                twin.__dict__[name] = self._attributes[name] if name in self._attributes else self.of(value)
        for name, held in tensors.items():
            fakes = twin.__dict__[name] = copy.copy(held)
            fakes.update((key, self._tensor(tensor)) for key, tensor in held.items())
        return twin

    def _tensor(self, tensor: Optional[Tensor]) -> Optional[Tensor]:
        if tensor is None or id(tensor) in self._twins:
            return None if tensor is None else self._twins[id(tensor)]
        dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        with torch.inference_mode(False), self._mode:
            fake = torch.empty(tensor.shape, dtype=dtype, device=self._device)
            fake = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
        self._twins[id(tensor)] = fake
        return fake


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)
