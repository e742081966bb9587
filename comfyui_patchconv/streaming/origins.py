"""Plain tensors in a streamed call: of zeros, as good as one zero; of a parameter, which stays; and maps that something
evaluated whole left plain, with which streaming goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .errors import CannotStreamError

_MAKERS = ("zeros", "zeros_like", "new_zeros")

_OF_MAPS = (
    "conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d", "group_norm", "upsample_nearest2d",
    "upsample_nearest3d",
)  # fmt: skip
"""What decoders and encoders do to feature maps: with these, streaming goes on where it had stopped."""

_SMALL = 1 << 16
"""Bytes below which a tensor of zeros is not worth a look, nor a map worth streaming."""


class Again(Protocol):
    """What makes plain maps deferred again, and has those keep their values."""

    def defer(self, value: Tensor) -> Tensor:
        """A plain map, deferred; anything else as it is."""
        ...

    def before_write(self, storage: int) -> None:
        """Something is about to be written to the memory of a storage."""


_innermost = threading.local()
"""`origins`: of the streamed call that this thread is in, the innermost where one is a part of another."""


class Origins(TorchDispatchMode):
    """While it is entered, remembers which tensors are zeros that no operator has written to, as video models put them
    before the first frames, and which are parts of parameters. Raises CannotStreamError for a write that would be lost.
    Large maps that operators made here, and that are plain, it has deferred `again` where a decoder's operators get
    them.

    What writes without an operator, as NumPy to a tensor that shares its memory, is not seen.

    dry: tensors have no values that could be looked at.
    """

    def __init__(self, dry: bool) -> None:
        super().__init__()
        self.again: Optional[Again] = None
        self._dry = dry
        self._large: dict[int, tuple[StorageWeakRef, bool]] = {}  # storages, and whether they were made here
        self._zeros: dict[int, StorageWeakRef] = {}
        self._parameters: dict[int, StorageWeakRef] = {}
        self._parts: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = args[place] if place < len(args) else kwargs.get(argument.name)
                    for value in tree_flatten(written)[0]:
                        self.before_write(value, name)
        elif name in _OF_MAPS and func.namespace == "aten" and args:
            args = (self._deferred(args[0]), *args[1:])
        self._note_large((args, kwargs), made=False)
        result = func(*args, **kwargs)
        self._note_large(result, made=True)
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

    @contextmanager
    def innermost(self) -> Iterator[None]:
        """Within the block this is the call that plain maps belong to, not one that it is a part of."""
        before = getattr(_innermost, "origins", None)
        _innermost.origins = self
        try:
            yield
        finally:
            _innermost.origins = before

    def _deferred(self, value: Any) -> Any:
        """A large plain map that was made in this call, deferred; anything else as it is."""
        if self.again is None or _innermost.origins is not self or not _is_large(value):
            return value
        _, made = self._large.get(_storage(value), (None, False))
        return self.again.defer(value) if made else value

    def _note_large(self, values: Any, made: bool) -> None:
        """Remember the storages of large plain tensors; the first time tells whether they were made here."""
        for value in tree_flatten(values)[0]:
            if _is_large(value) and _storage(value) not in self._large:
                self._large[_storage(value)] = StorageWeakRef(value.untyped_storage()), made

    def before_write(self, value: Any, name: str) -> None:
        """The operator `name` is about to write to `value`."""
        if isinstance(value, Tensor):
            storage = _storage(value)
            if storage in self._parts:
                raise CannotStreamError(f"{name} writes through a view of a view")
            if self.again is not None:
                self.again.before_write(storage)

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


def _is_large(value: Any) -> bool:
    """Whether a value is a tensor that is worth streaming, and not of a class that does something else."""
    return (
        type(value) in (Tensor, FakeTensor, nn.Parameter) and value.layout == torch.strided and value.nbytes >= _SMALL
    )


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
