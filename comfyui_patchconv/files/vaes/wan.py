"""AutoencoderKLWan: the VAEs of Wan 2.1, Qwen-Image and Wan 2.2, in the authors' layout and diffusers'.

Qwen-Image's has the tensors of Wan 2.1's, and makes the same of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from .family import Kind, Medium, Plan, Rename, Shapes, Traits, VaeFile, check_pairs, numbered, renaming

NAMES = ("AutoencoderKLWan", "AutoencoderKLQwenImage")

MEDIUM: Medium = "video"

_MODULES = ("diffusers.models.autoencoders.autoencoder_kl_wan",)

KIND = Kind("AutoencoderKLWan", "0.33", _MODULES)

KIND_2_2 = Kind("AutoencoderKLWan", "0.35", _MODULES)

PARTS = ("encoder.", "decoder.", "conv1.", "conv2.", "quant_conv.", "post_quant_conv.")

_RATES = {16: 16.0, 48: 24.0}
"""Frames a second, by the channels of latents: Wan 2.1's and 2.2's."""

_BLOCK = (
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)

_COMMON = renaming(
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    *_BLOCK,
)

_NESTED = re.compile(r"(encoder\.down|decoder\.up)samples\.(\d{1,3})\.(?:down|up)samples\.(\d{1,3})\.(.*)", re.ASCII)

_FLAT = re.compile(r"decoder\.upsamples\.(\d{1,3})\.(.*)", re.ASCII)

_SAMPLER = ("resample.", "time_conv.")

_MIDDLE = ("middle.0.residual.0.gamma", "mid_block.resnets.0.norm1.gamma")

_WIDTH = "one of Wan 2.1, Wan 2.2 or Qwen-Image, for RGB images, is needed"


def claims(shapes: Shapes) -> bool:
    return any(f"{part}.{name}" in shapes for part in ("encoder", "decoder") for name in _MIDDLE)


def plan(file: VaeFile) -> Plan:
    check_pairs(file, ("conv1.", "conv2."), ("quant_conv.", "post_quant_conv."), ("encoder.", "decoder."))
    rename = _rename_of(file.shapes)
    names = {rename(name): name for name in file.shapes}
    shapes = {name: file.shapes[own] for name, own in names.items()}
    first, inner, last = "encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"
    for name in (first, inner, last):
        if len(shapes.get(name, ())) != 5 or 0 in shapes[name]:
            raise file.other_kind("a VAE", names.get(name, name), _WIDTH)
    residual = "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes
    levels = (_levels_2_2 if residual else _levels_2_1)(shapes)
    base, channels = shapes[first][0], shapes[first][1]
    patch = {3: None, 12: 2}.get(channels, 0)
    if patch == 0 or shapes[last][0] != channels:
        raise file.other_kind("a VAE", names[first if patch == 0 else last], _WIDTH)
    for block in (block for level in levels for block in level.blocks):
        if len(shapes[block]) != 5 or 0 in shapes[block] or shapes[block][0] % base:
            raise file.other_kind("a VAE", names[block], _WIDTH)
    widths = [shapes[level.blocks[-1]][0] // base for level in levels if level.blocks]
    if len(widths) < 2 or len(widths) != len(levels):
        raise ValueError(
            f"{file.path} has a VAE like Wan's whose encoder has {len(widths)} levels with blocks of {len(levels)}: it "
            "is incomplete, download or export it again."
        )
    config: dict[str, Any] = dict(base_dim=base, z_dim=shapes[inner][1], dim_mult=widths)
    config |= dict(num_res_blocks=len(levels[0].blocks), temperal_downsample=[one.in_time for one in levels[:-1]])
    narrow = shapes[inner][0]
    if narrow != base * widths[-1]:
        if narrow % widths[-1]:
            raise file.other_kind("a VAE", names[inner], _WIDTH)
        config["decoder_base_dim"] = narrow // widths[-1]
    if residual or patch is not None:
        config |= {"is_residual": residual, "in_channels": channels, "out_channels": channels, "patch_size": patch}
    return Plan(KIND_2_2 if residual or patch is not None or "decoder_base_dim" in config else KIND, config, rename)


def traits(vae: Any) -> Traits:
    """Of latents `[N, C, T, H, W]`; each frame but the first makes as many as time is halved."""
    config = vae.config
    in_time = sum(map(bool, config["temperal_downsample"]))
    scale = 2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1)
    return Traits(MEDIUM, config["z_dim"], scale, 2**in_time, rate=_RATES.get(config["z_dim"], 16.0))


@dataclass
class _Level:
    """blocks: the first convolution of each. in_time: whether what follows them halves the frames too."""

    blocks: list[str] = field(default_factory=list)
    in_time: bool = False


def _levels_2_1(shapes: Shapes) -> list[_Level]:
    """The encoder's levels where all of its blocks are in one list."""
    levels = [_Level()]
    for number in count():
        layer = f"encoder.down_blocks.{number}."
        if f"{layer}conv1.weight" in shapes:
            levels[-1].blocks.append(f"{layer}conv1.weight")
        elif f"{layer}resample.1.weight" in shapes:
            levels[-1].in_time = f"{layer}time_conv.weight" in shapes
            levels.append(_Level())
        else:
            return levels
    return levels


def _levels_2_2(shapes: Shapes) -> list[_Level]:
    """The encoder's levels where each has a list."""
    name = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    return [
        _Level(
            numbered(shapes, name.format(level, "{}")),
            f"encoder.down_blocks.{level}.downsampler.time_conv.weight" in shapes,
        )
        for level in range(len(numbered(shapes, name.format("{}", 0))))
    ]


def _rename_of(shapes: Shapes) -> Rename:
    """diffusers' names of the authors' tensors; its own stay."""
    blocks = numbered(shapes, "decoder.upsamples.{}.residual.2.weight")
    to_level = len(blocks) + 1

    def rename(name: str) -> str:
        name = _COMMON(name)
        nested = _NESTED.fullmatch(name)
        if nested is not None:
            way, level, place, rest = nested.groups()
            layer = f"{way.split('.')[1]}sampler" if rest.startswith(_SAMPLER) else f"resnets.{place}"
            return f"{way}_blocks.{level}.{layer}.{rest}"
        flat = _FLAT.fullmatch(name)
        if flat is not None:
            level, place = divmod(int(flat[1]), to_level)
            layer = "upsamplers.0" if flat[2].startswith(_SAMPLER) else f"resnets.{place}"
            return f"decoder.up_blocks.{level}.{layer}.{flat[2]}"
        return name.replace("encoder.downsamples.", "encoder.down_blocks.", 1)

    return rename
