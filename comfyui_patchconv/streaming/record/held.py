"""Ordinary tensors that deferred steps will read: a write to their memory, seen first, leaves those steps a copy."""

from __future__ import annotations

from typing import Any, Optional, Protocol
from weakref import ref

import torch
from torch import Tensor, nn


class Reader(Protocol):
    """What has a tensor to read later."""

    tensor: Any


class Held:
    """A tensor as the call saw it: its memory, whatever becomes of the object."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype


def is_ordinary(value: Any) -> bool:
    """Whether a value is a tensor with values in memory, and of no class of its own."""
    if type(value) is not Tensor and type(value) is not nn.Parameter:
        return False
    return value.layout is torch.strided and not value.is_quantized


class Memory:
    """Who reads which memory later. Writes that are no operator, as NumPy's to a shared array, are not seen."""

    def __init__(self) -> None:
        self._readers: dict[int, list[ref[Any]]] = {}
        self._held: dict[Any, ref[Held]] = {}
        self._constants: dict[int, tuple[Any, ref[Tensor]]] = {}
        self._given: dict[int, Tensor] = {}  # by the storage: memory that others write to without an operator

    def hold(self, tensor: Tensor) -> Held:
        """`tensor` as it is now, one for all who hold the same."""
        storage = tensor.untyped_storage()._cdata
        place = storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        found = self._held.get(place)
        held = found() if found is not None else None
        if held is None:
            given = storage in self._given
            held = Held(tensor.detach().clone() if given else tensor.detach())
            if not given:
                self._held[place] = ref(held)
                self.watch(held)
        return held

    def give(self, tensor: Tensor) -> None:
        """The memory of `tensor` goes to somebody who may write to it at any time: who reads it gets a copy."""
        self.before_write(tensor)
        self._given[tensor.untyped_storage()._cdata] = tensor.detach()

    def forget_given(self) -> None:
        """Nothing more is recorded that could read such memory."""
        self._given.clear()

    def note_constant(self, tensor: Tensor, value: Any) -> None:
        """`tensor`, which is new, has one value everywhere."""
        storage = tensor.untyped_storage()._cdata
        self._constants[storage] = value, ref(tensor, lambda _: self._constants.pop(storage, None))

    def constant_in(self, tensor: Tensor) -> Any:
        """The one value of a tensor in memory that was noted; None if it has others, or was written to since."""
        found = self._constants.get(tensor.untyped_storage()._cdata)
        if found is None:
            return None
        alike = tensor.device.type != "cpu" or bool((tensor == found[0]).all())  # NumPy may have written to it, unseen
        return found[0] if alike else None

    def is_given(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._given

    def require_there(self) -> None:
        """Raise RuntimeError where memory that is still to be read was given back (FSDP, `storage.resize_(0)`)."""
        for readers in self._readers.values():
            for one in readers:
                reader = one()
                tensor = None if reader is None else reader.tensor
                if tensor is not None and tensor.numel() and tensor.untyped_storage().nbytes() == 0:
                    raise RuntimeError(
                        f"The memory of a tensor of shape {tuple(tensor.shape)} was given back before the call was "
                        "over: stream a part that is called while its weights are there."
                    )

    def watch(self, reader: Reader) -> None:
        """`reader.tensor` will be read later."""
        storage = reader.tensor.untyped_storage()._cdata
        self._readers.setdefault(storage, []).append(ref(reader))

    def is_read(self, tensor: Tensor, but_by: Optional[Reader] = None) -> bool:
        """Whether anything, but for one reader, will read the memory of `tensor`."""
        readers = (one() for one in self._readers.get(tensor.untyped_storage()._cdata, ()))
        return any(reader is not None and reader is not but_by for reader in readers)

    def before_write(self, tensor: Tensor) -> None:
        """Something is about to be written to the memory of `tensor`."""
        storage = tensor.untyped_storage()._cdata
        self._constants.pop(storage, None)
        for place in [place for place in self._held if place[0] == storage]:
            del self._held[place]
        copies: dict[Any, Tensor] = {}
        for one in self._readers.pop(storage, ()):
            reader = one()
            if reader is not None and reader.tensor is not None:
                old = reader.tensor
                place = old.storage_offset(), old.shape, old.stride(), old.dtype
                if place not in copies:
                    copies[place] = old.clone()
                reader.tensor = copies[place]
