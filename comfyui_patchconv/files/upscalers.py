"""Upscale models in files, read as weights alone and recognised by `spandrel`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..memory.errors import first_line, is_out_of_memory
from .tensors import existing, opened, unpickled
from .words import short

_PICKLES = {".pth", ".pt", ".ckpt", ".bin"}


def load_upscaler(path: str | os.PathLike[str], trust: bool = False) -> Any:
    """The model in the file `path`, in evaluation mode on the CPU, as `spandrel` describes it.

    trust: see `unpickled`.

    Raises FileNotFoundError, or ValueError for a file that holds no weights, those of no model that `spandrel` knows,
    or some that are not finite; ModuleNotFoundError without `spandrel`.
    """
    import spandrel  # pyright: ignore[reportMissingImports]

    path = existing(path)
    weights = _weights(path, trust)
    try:
        model = spandrel.ModelLoader().load_from_state_dict(spandrel.canonicalize_state_dict(weights))
    except spandrel.UnsupportedModelError:
        raise ValueError(
            f"{path} is no model that spandrel knows: give an upscale model such as ESRGAN, RealESRGAN or SPAN."
        ) from None
    except Exception as error:  # weights that look like a model's and are not
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path} cannot be read as an upscale model ({short(first_line(error))}): is it damaged?"
        ) from None
    for name, weight in model.model.state_dict().items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ValueError(f"{path}: {short(name)} holds NaN or infinity: get the model anew.")
    model.model.requires_grad_(False)
    return model.eval()


def _weights(path: Path, trust: bool) -> dict[str, Any]:
    """The tensors in a file by name, as deep in dictionaries as they lie there."""
    if path.suffix.lower() not in _PICKLES:
        header, read = opened(path)
        return {name: read(name) for name in header}
    found = _tensors(unpickled(path, trust=trust))
    if not found:
        raise ValueError(f"{path} holds no weights by name: give an upscale model as .pth or .safetensors.")
    return found


def _tensors(content: Any, depth: int = 4) -> dict[str, Any]:
    """What of `content` is a tensor or a dictionary of some, by name."""
    if not isinstance(content, dict) or not depth:
        return {}
    kept = {
        str(name): value if isinstance(value, Tensor) else _tensors(value, depth - 1) for name, value in content.items()
    }
    return {name: value for name, value in kept.items() if isinstance(value, Tensor) or value}
