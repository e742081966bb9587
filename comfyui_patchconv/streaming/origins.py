"""Plain tensors in a streamed call: of zeros, as good as one zero; of a parameter, which stays; and maps that something
evaluated whole left plain, with which streaming goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .errors import CannotStreamError

_MAKERS = ("zeros", "zeros_like", "new_zeros")

_OF_MAPS = frozenset(
    (
        "conv2d",
        "conv3d",
        "conv_transpose2d",
        "conv_transpose3d",
        "group_norm",
        "upsample_nearest2d",
        "upsample_nearest3d",
    )
)
"""What decoders and encoders do to feature maps: with these, streaming goes on where it had stopped."""

_SMALL = 1 << 16
"""Bytes below which a tensor is not worth a look."""


class Origins(TorchDispatchMode):
    """While it is entered, remembers which tensors are zeros that no operator has written to, as video models put them
    before the first frames, and which are parts of parameters. Raises CannotStreamError for a write that would be lost.

    dry: tensors have no values that could be looked at. defer: gives a plain map back deferred, and what is to be
    called before something is written to its memory; anything else it gives back as it is, and nothing to call.
    """

    def __init__(self, dry: bool) -> None:
        super().__init__()
        self.defer: Callable[[Tensor], tuple[Tensor, Optional[Callable[[], None]]]] = lambda tensor: (tensor, None)
        self._dry = dry
        self._deferred: dict[int, tuple[StorageWeakRef, list[Callable[[], None]]]] = {}
        self._zeros: dict[int, StorageWeakRef] = {}
        self._parameters: dict[int, StorageWeakRef] = {}
        self._parts: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.before_write(value, name)
            self.before_write(kwargs.get("out"), name)
        elif name in _OF_MAPS:
            args = (self._again(args[0]), *args[1:])
        result = func(*args, **kwargs)
        if name in _MAKERS:
            if result.nbytes >= _SMALL:
                _remember(result, self._zeros)
        elif func._schema.is_mutable:
            for value in tree_flatten((args, kwargs))[0] if self._zeros else ():
                if isinstance(value, Tensor):
                    self._zeros.pop(_storage(value), None)
        elif args and isinstance(args[0], nn.Parameter):
            _remember(args[0], self._parameters)
        return result

    def _again(self, value: Any) -> Any:
        """A map that is plain, deferred; anything else as it is."""
        if not isinstance(value, Tensor) or value.nbytes < _SMALL:
            return value
        deferred, before_write = self.defer(value)
        if before_write is not None:
            _, calls = self._deferred.setdefault(_storage(value), (StorageWeakRef(value.untyped_storage()), []))
            calls.append(before_write)
        return deferred

    def before_write(self, value: Any, name: str) -> None:
        """The operator `name` is about to write to `value`."""
        if isinstance(value, Tensor) and (self._parts or self._deferred):
            storage = _storage(value)
            if storage in self._parts:
                raise CannotStreamError(f"{name} writes through a view of a view")
            for call in self._deferred.pop(storage, (None, ()))[1]:
                call()

    def stands_alone(self, part: Tensor) -> None:
        """`part` was computed for what should be a view of a deferred map: a write to it has to reach that."""
        _remember(part, self._parts)

    def one_zero(self, tensor: Tensor) -> Optional[Tensor]:
        """The same values as `tensor`, all zeros, in the memory of one; None where it is not known to be of zeros."""
        if _storage(tensor) not in self._zeros:
            return None
        if not self._dry and tensor.any():  # written to by a kernel that is no operator
            return None
        return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)

    def own(self, weight: Any) -> Any:
        """A tensor that stays what `weight` is: hosts stream weights through buffers that they use again, those of
        parameters excepted."""
        if not isinstance(weight, Tensor) or isinstance(weight, nn.Parameter) or _storage(weight) in self._parameters:
            return weight
        return weight.clone()


def _remember(tensor: Tensor, storages: dict[int, StorageWeakRef]) -> None:
    """The reference keeps the address from being given to another storage."""
    storage = _storage(tensor)
    if storage and storage not in storages:
        storages[storage] = StorageWeakRef(tensor.untyped_storage())


def _storage(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 for one that has none."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return 0
