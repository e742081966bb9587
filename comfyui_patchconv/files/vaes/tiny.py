"""AutoencoderTiny: TAESD and its kin, in diffusers' layout, in ComfyUI's, and as the authors' two files."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..packing import Scaling
from .family import Kind, Medium, Missing, Plan, Shapes, State, Traits, VaeFile

NAMES = ("AutoencoderTiny",)

MEDIUM: Medium = "image"

KIND = Kind("AutoencoderTiny", "0.20", ("diffusers.models.autoencoders.autoencoder_tiny",))

_SCALE, _SHIFT = "vae_scale", "vae_shift"

ENCODER, DECODER = "taesd_encoder.", "taesd_decoder."
"""What ComfyUI has before the names of the authors' two files."""

PARTS = ("encoder.layers.", "decoder.layers.", ENCODER, DECODER, _SCALE, _SHIFT)

_MODELS = {
    "taesdxl": (4, 0.13025, 0.0),
    "taesd3": (16, 1.5305, 0.0609),
    "taesd": (4, 0.18215, 0.0),
    "taef1": (16, 0.3611, 0.1159),
}
"""By a TAESD's name: channels of its latents, and scale and shift to them from those of the model's own VAE."""

_Layers = dict[int, tuple[bool, tuple[int, ...]]]


def claims(shapes: Shapes) -> bool:
    first = ("encoder.layers.0.weight", "decoder.layers.0.weight", f"{ENCODER}0.weight", f"{DECODER}1.weight")
    return any(name in shapes for name in first)


def plan(file: VaeFile) -> Plan:
    apart = tuple(name for name in (_SCALE, _SHIFT) if name in file.shapes)
    layers = {part: _layers(file, part) for part in ("encoder", "decoder")}
    config: dict[str, Any] = {}
    for part in ("decoder", "encoder"):
        if layers[part]:
            widths, blocks, first, last = _stages(file, part, layers[part])
            config |= {f"{part}_block_out_channels": widths, f"num_{part}_blocks": blocks}
            config["latent_channels"] = last if part == "encoder" else first
            other = "encoder" if part == "decoder" else "decoder"  # which may be missing
            config.setdefault(f"{other}_block_out_channels", widths[::-1])
            config.setdefault(f"num_{other}_blocks", blocks[::-1])
    scale, shift = (1.0, 0.0) if apart else _of_model(file.path, config["latent_channels"])
    for name in apart:
        if any(size != 1 for size in file.shapes[name]):
            raise file.other_kind("a TAESD", name, "one number is needed")

    def prepare(vae: Any) -> None:
        for part, found in layers.items():
            if not found:
                setattr(vae, part, Missing(_without(file.path, part)))

    def finish(vae: Any, found: State) -> None:
        numbers = {_SCALE: scale, _SHIFT: shift, **{name: float(found[name]) for name in apart}}
        if not numbers[_SCALE]:
            raise ValueError(f"{file.path} has a {_SCALE} of 0: it is damaged, download it again.")
        vae.add_module("packing", Scaling(config["latent_channels"], numbers[_SCALE], numbers[_SHIFT]))

    return Plan(KIND, config, _renamed, apart=apart, prepare=prepare, finish=finish)


def traits(vae: Any) -> Traits:
    levels = len(vae.config["decoder_block_out_channels"])
    return Traits(MEDIUM, vae.config["latent_channels"], 2 ** (levels - 1))


def _renamed(name: str) -> str:
    """diffusers' name: the authors' decoder counts a layer without weights before the first that has some."""
    if name.startswith(ENCODER):
        return f"encoder.layers.{name[len(ENCODER) :]}"
    if not name.startswith(DECODER):
        return name
    number, _, rest = name[len(DECODER) :].partition(".")
    return f"decoder.layers.{int(number) - 1}.{rest}" if re.fullmatch(r"[0-9]{1,4}", number) else name


def _layers(file: VaeFile, part: str) -> _Layers:
    """By their number, which layers of the encoder or decoder are blocks, and the shape of their first convolution."""
    found: _Layers = {}
    for name, shape in file.shapes.items():
        match = re.fullmatch(rf"{part}\.layers\.([0-9]{{1,4}})\.(conv\.0\.)?weight", _renamed(name))
        if match is not None:
            if len(shape) != 4 or 0 in shape:
                raise file.other_kind("a TAESD", name, "convolutions of images are needed")
            found[int(match[1])] = match[2] is not None, shape
    return found


def _stages(file: VaeFile, part: str, layers: _Layers) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Channels and blocks of each stage, and the channels that come in and go out.

    A stage is a convolution and blocks; after the last stage comes a convolution more.
    """
    order = [layers[number] for number in sorted(layers)]
    convolutions = [place for place, (is_block, _) in enumerate(order) if not is_block]
    if len(convolutions) < 2 or convolutions[0] or convolutions[-1] != len(order) - 1:
        raise ValueError(
            f"{file.path} has a TAESD whose {part} does not begin and end with a convolution: it is incomplete, "
            "download or export it again."
        )
    widths = tuple(order[place][1][0] for place in convolutions[:-1])
    blocks = tuple(after - place - 1 for place, after in pairwise(convolutions))
    return widths, blocks, order[0][1][1], order[-1][1][0]


def _of_model(path: Path, channels: int) -> tuple[float, float]:
    """Scale and shift of the latents of the model that the file's name, or that of its folder, begins with.

    Raises ValueError for other names: nothing in the file says it.
    """
    for name in (path.name, path.absolute().parent.name):
        for model, (wanted, scale, shift) in _MODELS.items():
            if re.match(rf"{model}(?![a-z0-9])", name.lower()) and channels == wanted:
                return scale, shift
    known = ", ".join(model for model, (wanted, *_) in _MODELS.items() if wanted == channels) or "a name that is known"
    raise ValueError(
        f"{path} is a TAESD for latents of {channels} channels, and its name does not say of which model: begin it "
        f"with {known}."
    )


def _without(path: Path, part: str) -> str:
    other = "decoder" if part == "encoder" else "encoder"
    return (
        f"{path} has a TAESD's {other} alone: put the file of its {part} beside it, whose name has {part} in the place "
        f"of {other}."
    )
