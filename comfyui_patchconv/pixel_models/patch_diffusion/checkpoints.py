"""Files of Patch Diffusion models: ours, and those of the authors' two versions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from ...files.tensors import save_tensors, unpickled
from ...files.words import short
from ..state_dicts import configuration, read, with_state
from .config import Config
from .model import PatchUNet

_METADATA = "patch_diffusion"


def save(models: list[PatchUNet], path: str | Path) -> None:
    """One safetensors file with the configuration: of one model, or of several, for less noise first.

    Written whole, or what was there stays.
    """
    tensors = {
        f"{number}.{name}": value for number, model in enumerate(models) for name, value in model.state_dict().items()
    }
    save_tensors(path, tensors, {_METADATA: models[0].config.to_json()})


def load(path: str | Path) -> list[PatchUNet]:
    """The models of a file that `save` wrote. Raises ValueError for another file."""
    tensors, text = read(path, _METADATA, "Patch Diffusion")
    config = configuration(path, Config.from_json, text)
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, rest = name.partition(".")
        states.setdefault(number, {})[rest] = value
    numbers = [str(number) for number in range(len(states))]
    unknown = next((number for number in states if number not in numbers), None)
    if unknown is not None or not states:
        found = "no weights" if unknown is None else f"weights of {short(unknown)!r}"
        raise ValueError(f"{path} holds {found}: names of weights begin with the model's number, 0, 1 and so on.")
    return [with_state(partial(PatchUNet, config), states[number], path) for number in numbers]


def is_foreign(path: str | Path) -> bool:
    """Whether a file is the authors', which does not say what model it is, by its suffix."""
    return Path(path).suffix.lower() in (".pt", ".h5")


def load_all(paths: Sequence[str | Path], config: Optional[Config] = None, trust: bool = False) -> list[PatchUNet]:
    """The models of several files, for less noise first: ours, or the authors' of `config`. trust: see `unpickled`.

    Raises ValueError for files of different configurations.
    """
    models: list[PatchUNet] = []
    for path in paths:
        if not is_foreign(path):
            models += load(path)
        elif config is None:
            raise ValueError(f"{path} does not say what model it is: name its configuration.")
        else:
            keras = Path(path).suffix.lower() == ".h5"
            models.append(import_keras(path, config) if keras else import_torch(path, config, trust))
        if models[-1].config != models[0].config:
            raise ValueError(f"{path} is a model of another configuration than {paths[0]}: give models of one.")
    return models


def import_torch(path: str | Path, config: Config, trust: bool = False) -> PatchUNet:
    """The model of a bare state dict, as the PyTorch port writes it.

    config: has to be that of the model; `norm_eps` 1e-3 gives what the weights were trained for, 1e-5 what the port
    computes. trust: see `unpickled`. Raises ValueError for weights of another model.
    """
    state = unpickled(path, trust=trust)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors alone.")
    return with_state(partial(PatchUNet, config), state, path)


def import_keras(path: str | Path, config: Config) -> PatchUNet:
    """The model of the TensorFlow version's `ema_weights.h5` (Keras `save_weights`). Needs `h5py`.

    Its names depend on what else was built before, so weights go by their order. Raises ValueError for weights of
    another model.
    """
    import h5py

    model = PatchUNet(config)
    order = sorted(model.state_dict(), key=lambda name: not name.startswith("label_embs"))
    try:
        opened: Any = h5py.File(path)
        with opened as file:
            layers = [file[_text(layer)] for layer in file.attrs["layer_names"]]
            names = [(layer, _text(name)) for layer in layers for name in layer.attrs["weight_names"]]
            arrays = [torch.from_numpy(layer[name][()]) for layer, name in names]
    except FileNotFoundError:
        raise
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of Keras' save_weights ({type(error).__name__}).") from None
    if len(arrays) != len(order):
        raise ValueError(f"{path} has {len(arrays)} weights, and the configuration's model {len(order)}.")
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    state = {name: _from_keras(name, value, shapes[name]) for name, value in zip(order, arrays)}
    return with_state(partial(PatchUNet, config), state, path)


def _from_keras(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if name == "label_embs.weight" or value.dim() == 1:
        return value
    swapped = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.T
    return swapped.reshape(shape) if swapped.numel() == shape.numel() else swapped


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
