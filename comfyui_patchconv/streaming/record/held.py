"""Ordinary tensors that deferred steps will read: a write to their memory, seen first, leaves those steps a copy, or
has them evaluated first (`Values.before_write`)."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Protocol
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
        self._copies: list[tuple[list[ref[Any]], int]] = []
        self._at_most_copied = 0
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
        """Something is about to be written to the memory of `tensor`: who reads it gets a copy."""
        storage = tensor.untyped_storage()._cdata
        self._constants.pop(storage, None)
        for place in [place for place in self._held if place[0] == storage]:
            del self._held[place]
        readers = self.readers_of(tensor)
        self._readers.pop(storage, None)
        for part in _parts(readers):
            for reader, copied in zip(part.readers, part.copied()):
                reader.tensor = copied
            self._copies.append(([ref(reader) for reader in part.readers], part.bytes))
            self._at_most_copied += part.bytes

    def readers_of(self, tensor: Tensor) -> list[Any]:
        """Who will read the memory of `tensor`."""
        found = (one() for one in self._readers.get(tensor.untyped_storage()._cdata, ()))
        return [reader for reader in found if reader is not None and reader.tensor is not None]

    def to_copy(self, tensor: Tensor) -> int:
        """Bytes that copies of the memory of `tensor` would take if it was written to now."""
        return sum(part.bytes for part in _parts(self.readers_of(tensor)))

    def copies_more(self, tensor: Tensor, most: int) -> bool:
        """Whether there would be more than `most` bytes of copies then; those that are left are only counted if need
        be, for a program may write often."""
        size = self.to_copy(tensor)
        return size > 0 and self._at_most_copied + size > most and self.copied + size > most

    @property
    def copied(self) -> int:
        """Bytes of the copies that are still to be read."""
        self._copies = [(readers, size) for readers, size in self._copies if any(one() is not None for one in readers)]
        self._at_most_copied = sum(size for _, size in self._copies)
        return self._at_most_copied


class _Part(NamedTuple):
    """Readers of memory between two of its bytes, whose copy takes so many. together: it is copied as it is, for they
    overlap; else once for each place that is read."""

    readers: list[Any]
    first: int
    last: int
    bytes: int
    together: bool

    def copied(self) -> list[Tensor]:
        """What each of them is to read."""
        if not self.together:
            copies: dict[Any, Tensor] = {}
            return [copies.setdefault(_place(one.tensor), _cloned(one.tensor, copies)) for one in self.readers]
        old: Any = self.readers[0].tensor
        flat: Any = torch.empty(0, dtype=torch.uint8, device=old.device)
        memory = flat.set_(old.untyped_storage(), self.first, (self.last - self.first,), (1,)).clone().untyped_storage()
        return [_in_copy(one.tensor, memory, self.first) for one in self.readers]


def _cloned(tensor: Tensor, copies: dict[Any, Tensor]) -> Tensor:
    found = copies.get(_place(tensor))
    return tensor.clone() if found is None else found


def _in_copy(tensor: Tensor, memory: Any, first: int) -> Tensor:
    """The same part of a copy of memory from its byte `first` on."""
    made: Any = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    offset = int(tensor.storage_offset()) - first // tensor.dtype.itemsize
    return made.set_(memory, offset, tensor.shape, tensor.stride())


def _place(tensor: Tensor) -> Any:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()


_ALIGNED = 16
"""Bytes that those of an element of any type divide."""


def _parts(readers: list[Any]) -> list[_Part]:
    """Readers of one memory, by the parts of it that they read: what overlaps is copied once, if that takes less."""
    found: list[_Part] = []
    group: list[Any] = []
    first = last = 0
    for low, high, _, reader in sorted(
        (*_span(reader.tensor), number, reader) for number, reader in enumerate(readers)
    ):
        if group and low < last:
            last = max(last, high)
            group.append(reader)
            continue
        if group:
            found.append(_part(group, first, last))
        first, last, group = low // _ALIGNED * _ALIGNED, high, [reader]
    return [*found, _part(group, first, last)] if group else found


def _part(readers: list[Any], first: int, last: int) -> _Part:
    apart = sum({_place(one.tensor): one.tensor.nbytes for one in readers}.values())
    as_it_is = not any(one.tensor.is_conj() or one.tensor.is_neg() for one in readers)
    together = as_it_is and last - first < apart
    return _Part(list(readers), first, last, last - first if together else apart, together)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of its memory that a tensor has, and the one behind its last."""
    start = int(tensor.storage_offset()) * tensor.dtype.itemsize
    if not tensor.numel():
        return start, start
    reach = 1 + sum((side - 1) * stride for side, stride in zip(tensor.shape, tensor.stride()))
    return start, start + reach * tensor.dtype.itemsize
