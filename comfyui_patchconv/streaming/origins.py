"""Where plain tensors come from that meet deferred ones: of zeros, as good as one zero; of a parameter, which stays."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .errors import CannotStreamError

_MAKERS = ("zeros", "zeros_like", "new_zeros")

_SMALL = 1 << 16
"""Bytes below which a tensor is not worth a look."""


class Origins(TorchDispatchMode):
    """While it is entered, remembers which tensors are zeros that no operator has written to, as video models put them
    before the first frames, and which are parts of parameters. Raises CannotStreamError for a write that would be lost.

    dry: tensors have no values that could be looked at.
    """

    def __init__(self, dry: bool) -> None:
        super().__init__()
        self._dry = dry
        self._zeros: dict[int, StorageWeakRef] = {}
        self._parameters: dict[int, StorageWeakRef] = {}
        self._parts: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._parts and func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, Tensor) and _storage(value) in self._parts:
                    raise CannotStreamError(f"{func.overloadpacket.__name__} writes through a view of a view")
        result = func(*args, **kwargs)
        if func.overloadpacket.__name__ in _MAKERS:
            if result.nbytes >= _SMALL:
                _remember(result, self._zeros)
        elif func._schema.is_mutable:
            for value in tree_flatten((args, kwargs))[0] if self._zeros else ():
                if isinstance(value, Tensor):
                    self._zeros.pop(_storage(value), None)
        elif args and isinstance(args[0], nn.Parameter):
            _remember(args[0], self._parameters)
        return result

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
