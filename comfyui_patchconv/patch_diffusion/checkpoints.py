"""Files of Patch Diffusion models: ours, and those of the authors' two versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import Config
from .model import PatchUNet

_METADATA = "patch_diffusion"


def save(models: list[PatchUNet], path: str | Path) -> None:
    """One safetensors file with the configuration: of one model, or of several, for less noise first."""
    tensors = {
        f"{number}.{name}": value.contiguous()
        for number, model in enumerate(models)
        for name, value in model.state_dict().items()
    }
    save_file(tensors, path, {_METADATA: models[0].config.to_json()})


def load(path: str | Path) -> list[PatchUNet]:
    """The models of a file that `save` wrote. Raises ValueError for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if _METADATA not in metadata:
        raise ValueError(f"{path} has no Patch Diffusion configuration: import the authors' checkpoints first.")
    config = Config.from_json(metadata[_METADATA])
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, rest = name.partition(".")
        states.setdefault(number, {})[rest] = value
    return [_with_state(config, states[number], path) for number in sorted(states, key=int)]


def import_torch(path: str | Path, config: Config) -> PatchUNet:
    """The model of a bare state dict, as the PyTorch port writes it.

    config: has to be that of the model; `norm_eps` 1e-3 gives what the weights were trained for, 1e-5 what the port
    computes. Raises ValueError for weights of another model.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors alone.")
    return _with_state(config, state, path)


def import_keras(path: str | Path, config: Config) -> PatchUNet:
    """The model of the TensorFlow version's `ema_weights.h5` (Keras `save_weights`). Needs `h5py`.

    Its names depend on what else was built before, so weights go by their order. Raises ValueError for weights of
    another model.
    """
    import h5py

    model = PatchUNet(config)
    order = sorted(model.state_dict(), key=lambda name: not name.startswith("label_embs"))
    opened: Any = h5py.File(path)
    with opened as file:
        layers = [file[_text(layer)] for layer in file.attrs["layer_names"]]
        arrays = [torch.from_numpy(layer[_text(name)][()]) for layer in layers for name in layer.attrs["weight_names"]]
    if len(arrays) != len(order):
        raise ValueError(f"{path} has {len(arrays)} weights, and the configuration's model {len(order)}.")
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    state = {name: _from_keras(name, value, shapes[name]) for name, value in zip(order, arrays)}
    return _with_state(config, state, path)


def _from_keras(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if name == "label_embs.weight" or value.dim() == 1:
        return value
    swapped = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.T
    return swapped.reshape(shape) if swapped.numel() == shape.numel() else swapped


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _with_state(config: Config, state: dict[str, Tensor], path: str | Path) -> PatchUNet:
    with torch.device("meta"):
        model = PatchUNet(config)
    wanted = model.state_dict()
    wrong = [name for name, value in wanted.items() if name not in state or state[name].shape != value.shape]
    wrong += [name for name in state if name not in wanted]
    if wrong:
        raise ValueError(
            f"{path} is not a model of this configuration: {wrong[0]} is "
            f"{tuple(state[wrong[0]].shape) if wrong[0] in state else 'missing'} there, and "
            f"{tuple(wanted[wrong[0]].shape) if wrong[0] in wanted else 'nothing'} in the configuration."
        )
    model = PatchUNet(config)
    model.load_state_dict(state)
    return model.eval()
