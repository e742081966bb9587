"""Weights from files into models, with a sentence for what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..files.tensors import is_usable, read_header
from ..files.words import short

Model = TypeVar("Model", bound=nn.Module)

Config = TypeVar("Config")

Said = TypeVar("Said")

_TYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
"""Of weights."""


def read(path: str | Path, key: str, kind: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file, and the configuration that its metadata hold at `key`.

    Raises FileNotFoundError, or ValueError for another file. kind: what models these are, for its sentence.
    """
    names = read_header(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if key not in metadata:
            raise ValueError(f"{path} has no {kind} configuration: import the authors' checkpoints first.")
        return {name: file.get_tensor(name) for name in names}, metadata[key]


def configuration(path: str | Path, read_said: Callable[[Said], Config], said: Said) -> Config:
    """What `read_said` makes of what a file says; its ValueError names the file."""
    try:
        return read_said(said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def with_state(build: Callable[[], Model], state: Mapping[str, Tensor], path: str | Path) -> Model:
    """What `build` makes, with these weights, for inference. Raises ValueError if any is missing, of another shape,
    one too many, of a type that no weights have, or holds NaN or infinity, before memory is taken. path: of the file,
    for its sentence."""
    odd = next((name for name, value in state.items() if not is_usable(value) or value.dtype not in _TYPES), None)
    if odd is not None:
        raise ValueError(
            f"{path}: {short(odd)} is no ordinary tensor of float32, float16 or bfloat16, as weights are: export it so."
        )
    with torch.device("meta"):
        wanted = build().state_dict()
    wrong = [name for name, value in wanted.items() if name not in state or state[name].shape != value.shape]
    wrong += [name for name in state if name not in wanted]
    if wrong:
        raise ValueError(
            f"{path} is not a model of this configuration: {short(wrong[0])} is "
            f"{short(tuple(state[wrong[0]].shape), 40) if wrong[0] in state else 'missing'} there, and "
            f"{short(tuple(wanted[wrong[0]].shape), 40) if wrong[0] in wanted else 'nothing'} in the configuration."
        )
    for name, value in state.items():
        if not value.to(wanted[name].dtype).isfinite().all():
            raise ValueError(f"{path}: {short(name)} holds NaN or infinity: take an earlier checkpoint, or train anew.")
    model = build()
    model.load_state_dict(state)
    return model.eval()
