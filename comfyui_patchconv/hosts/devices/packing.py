"""Takes a value apart for another process: tensors by themselves, the rest as bytes."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ...streaming.spread.agree import sum_of
from ..clones import Wrapper
from .local import is_local, reduced, reduced_parametrized

STOPPED = "stopped"
"""What a worker says of a call that another one has ended."""

_ON_CPU = torch.device("cpu")


class CannotSendError(ValueError):
    """Something that another process cannot be given; the text says what, without a full stop."""


class Looks(NamedTuple):
    """What a tensor is beside its bytes. order: its dimensions from the widest stride to the narrowest. moved: whether
    it lies on the device that is computed on. parameter, inference: of which kind it is."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    moved: bool
    parameter: bool
    inference: bool

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Packed(NamedTuple):
    """A value taken apart: `tensors` are dense, in the order of their `looks`, on any device."""

    looks: list[Looks]
    tensors: list[Tensor]
    rest: bytes

    @property
    def name(self) -> str:
        """What tells it from another, whatever memory the tensors lie in."""
        looks = hashlib.sha256(repr(self.looks).encode() + self.rest)
        return f"{looks.hexdigest()} {sum_of(self.tensors)}"


class _Packer(pickle.Pickler):
    """Leaves out of modules what stands in for their methods: that is the host's process's."""

    def __init__(self, file: io.BytesIO, device: torch.device) -> None:
        super().__init__(file, 4)
        self.looks: list[Looks] = []
        self.tensors: list[Tensor] = []
        self._device, self._numbers = device, {}
        self._kept: list[Any] = []  # that ids stay theirs

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return "device" if value == self._device else None
        if not isinstance(value, Tensor):
            return None
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.looks)
            self._kept.append(value)
            self._add(value)
        return number

    def _add(self, value: Tensor) -> None:
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_meta:
            raise CannotSendError(f"a tensor of the kind {type(value).__name__} cannot be sent")
        order = tuple(sorted(range(value.dim()), key=lambda dim: -value.stride(dim)))
        dense = value.detach().permute(order)
        if not dense.is_contiguous():
            order, dense = tuple(range(value.dim())), value.detach().contiguous()
        kind = type(value) is nn.Parameter
        moved = value.device == self._device
        self.looks.append(Looks(tuple(value.shape), order, value.dtype, moved, kind, value.is_inference()))
        self.tensors.append(dense)

    def reducer_override(self, value: Any) -> Any:
        if is_local(value):
            return reduced(value)
        if not isinstance(value, nn.Module):
            return NotImplemented
        if is_parametrized(value):
            return reduced_parametrized(value, _own(vars(value)))
        usual = value.__reduce_ex__(4)
        if isinstance(usual, tuple) and len(usual) > 2 and isinstance(usual[2], dict):
            return (*usual[:2], _own(usual[2]), *usual[3:])
        return usual


def _own(state: dict[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in state.items() if not isinstance(one, Wrapper)}


def packed(value: Any, device: torch.device) -> Packed:
    """A value taken apart. device: the one that is computed on; on the other side it is another. Raises CannotSendError
    for what has no bytes, such as a lock."""
    file = io.BytesIO()
    packer = _Packer(file, device)
    try:
        packer.dump(value)
    except CannotSendError:
        raise
    except Exception as error:  # any part of a host's module may refuse in its own way
        raise CannotSendError(said(error)) from error
    return Packed(packer.looks, packer.tensors, file.getvalue())


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor], device: torch.device) -> None:
        super().__init__(file)
        self._tensors, self._device = tensors, device

    def persistent_load(self, pid: Any) -> Any:
        return self._device if pid == "device" else self._tensors[pid]


def unpacked(looks: Sequence[Looks], received: Sequence[Tensor], rest: bytes, device: torch.device) -> Any:
    """The value again. received: the bytes of its tensors, flat and uint8. device: to compute on. What is read was
    written by the program that has started this process."""
    tensors = [_tensor(look, flat, device) for look, flat in zip(looks, received)]
    return _Unpacker(io.BytesIO(rest), tensors, device).load()


def _tensor(look: Looks, flat: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode() if look.inference else nullcontext():
        dense = flat.view(look.dtype).view([look.shape[dim] for dim in look.order])
        back = [look.order.index(dim) for dim in range(len(look.order))]
        value = dense.permute(back).to(device if look.moved else _ON_CPU)
        if look.inference:  # received outside of it
            value = value.clone()
        return nn.Parameter(value, requires_grad=False) if look.parameter else value


def said(error: BaseException) -> str:
    """An error in a line, without a full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}"
