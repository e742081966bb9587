"""AutoencoderOobleck: Stable Audio's sounds, in the authors' layout (as ComfyUI has it) and diffusers'."""

from __future__ import annotations

import math
import re
from typing import Any

from torch.nn.utils import remove_weight_norm

from .family import Kind, Medium, Plan, Rename, Shapes, State, Traits, VaeFile, numbered, renaming

NAMES = ("AutoencoderOobleck",)

MEDIUM: Medium = "sound"

KIND = Kind("AutoencoderOobleck", "0.30", ("diffusers.models.autoencoders.autoencoder_oobleck",))

PARTS = ("encoder.", "decoder.")

_RATE, _OTHER_RATE = 44100, {1920: 48000}
"""Samples a second; and by the samples to a latent's one, where it is another (ACE-Step's)."""

_NORM = renaming(
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)
"""Weight norm as torch has it since 2.0; diffusers has the older one."""

_UNIT = ("snake1", "conv1", "snake2", "conv2")

_BLOCKS = {
    "encoder": ("res_unit1", "res_unit2", "res_unit3", "snake1", "conv1"),
    "decoder": ("snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3"),
}
"""The layers of a block, in the authors' order."""

_LAYER = re.compile(r"(encoder|decoder)\.layers\.([0-9]{1,3})\.(?:layers\.([0-4])\.(?:layers\.([0-3])\.)?)?([a-z_]+)")


def claims(shapes: Shapes) -> bool:
    return any(re.match(r"(?:encoder|decoder)\..*\.(?:alpha|beta)$", name) for name in shapes)


def plan(file: VaeFile) -> Plan:
    rename = _rename_of(file.shapes)
    names = {rename(name): name for name in file.shapes}
    shapes = {name: file.shapes[own] for name, own in names.items()}
    samplers = numbered(shapes, "encoder.block.{}.conv1.weight_v")
    first, inner, last = "encoder.conv1.weight_v", "decoder.conv1.weight_v", "decoder.conv2.weight_v"
    for name in (first, inner, last, *samplers):
        if len(shapes.get(name, ())) != 3 or 0 in shapes[name]:
            raise file.other_kind("a sound's VAE", names.get(name, name), "one like Stable Audio's is needed")
    width = shapes[first][0]
    for name in samplers:
        if shapes[name][2] % 2 or shapes[name][0] % width:
            raise file.other_kind(
                "a sound's VAE", names[name], "an even kernel, and a multiple of its width, is needed"
            )
    if 2 * shapes[inner][1] != width:  # the encoder makes a mean and a deviation, together as many as its first layer
        raise file.other_kind("a sound's VAE", names[inner], f"latents of {width // 2} channels are needed")
    ratios = [shapes[name][2] // 2 for name in samplers]
    config: dict[str, Any] = {
        "encoder_hidden_size": width,
        "downsampling_ratios": ratios,
        "channel_multiples": [shapes[name][0] // width for name in samplers],
        "decoder_channels": shapes[last][1],
        "decoder_input_channels": shapes[inner][1],
        "audio_channels": shapes[first][1],
        "sampling_rate": _OTHER_RATE.get(math.prod(ratios), _RATE),
    }
    return Plan(KIND, config, rename, _shaped, finish=_folded)


def traits(vae: Any) -> Traits:
    config = vae.config
    scale = math.prod(config["downsampling_ratios"])
    return Traits(MEDIUM, config["decoder_input_channels"], scale, rate=float(config["sampling_rate"]))


def _rename_of(shapes: Shapes) -> Rename:
    """diffusers' names of the authors' tensors; its own stay."""
    blocks = {part: 0 for part in _BLOCKS}
    for name in shapes:
        found = _LAYER.match(name)
        if found is not None and found[3] is not None:
            blocks[found[1]] = max(blocks[found[1]], int(found[2]))

    def rename(name: str) -> str:
        name = _NORM(name)
        found = _LAYER.match(name)
        if found is None:
            return name
        part, layer, inside, unit, _ = found.groups()
        rest = name[found.start(5) :]
        if inside is None:
            outer = {0: "conv1", blocks[part] + 1: "snake1", blocks[part] + 2: "conv2"}
            return f"{part}.{outer.get(int(layer), f'layers.{layer}')}.{rest}"
        block = f"{part}.block.{int(layer) - 1}.{_BLOCKS[part][int(inside)]}"
        return f"{block}.{rest}" if unit is None else f"{block}.{_UNIT[int(unit)]}.{rest}"

    return rename


def _shaped(state: State) -> State:
    """diffusers has snakes' parameters as `[1, C, 1]`, the authors as `[C]`."""
    return {
        name: value[None, :, None] if name.endswith((".alpha", ".beta")) and value.dim() == 1 else value
        for name, value in state.items()
    }


def _folded(vae: Any, _: State) -> None:
    """Make the weights of weight norm once, rather than at every call: the same, and no memory of a call's."""
    for module in list(vae.modules()):
        if hasattr(module, "weight_g"):
            remove_weight_norm(module)
