"""AutoencoderDC: deep compression autoencoders (DC-AE), as Sana's, in the authors' layout and diffusers'."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from ...memory.errors import is_out_of_memory
from ..words import short
from .family import COUNTER, Kind, Medium, Plan, Shapes, State, Traits, VaeFile, numbered

NAMES = ("AutoencoderDC",)

MEDIUM: Medium = "image"

_MODULES = ("diffusers.models.autoencoders.autoencoder_dc",)

KIND = Kind("AutoencoderDC", "0.32", _MODULES)

KIND_LITE = Kind("AutoencoderDC", "0.35", _MODULES)

PARTS = ("encoder.", "decoder.")

_AUTHORS = ("encoder.stages.", "decoder.stages.", "encoder.project_in.", "decoder.project_in.")

_LAYER = re.compile(r"(?:encoder\.down|decoder\.up)_blocks\.[0-9]+\.[0-9]+\.")

_HEAD = 32
"""Channels of a head of attention, which shapes show where there are several scales alone; published ones have this."""


@dataclass(frozen=True)
class _Level:
    """attention: whether its blocks have it. blocks: how many. width: channels. scales: kernels of attention's further
    scales. head: channels of a head; 0 where that is not shown. counted: whether its norms have running statistics.
    sampler: the convolution that changes the size; empty where there is none."""

    attention: bool
    blocks: int
    width: int
    scales: tuple[int, ...]
    head: int
    counted: bool
    sampler: str


def claims(shapes: Shapes) -> bool:
    return any(name.startswith(_AUTHORS) or _LAYER.match(name) for name in shapes)


def plan(file: VaeFile) -> Plan:
    shapes = _shapes_of(file)
    encoder = _levels(file, shapes, "encoder.down_blocks")
    decoder = _levels(file, shapes, "decoder.up_blocks")
    inner = "decoder.conv_in.weight"
    if len(shapes.get(inner, ())) != 4 or len(encoder) != len(decoder) or len(encoder) < 2:
        raise ValueError(
            f"{file.path} has a DC-AE of {len(encoder)} levels down and {len(decoder)} up, and {inner} of the shape "
            f"{short(list(shapes.get(inner, ())), 40)}: it is incomplete, download or export it again."
        )
    lite = not decoder[0].blocks and not decoder[1].counted and not decoder[1].attention
    heads = [level.head for level in (*encoder, *decoder) if level.head]
    config: dict[str, Any] = {
        "latent_channels": shapes[inner][1],
        "attention_head_dim": heads[0] if heads else _HEAD,
        "downsample_block_type": "pixel_unshuffle" if _by_pixels(shapes, encoder, "encoder.conv_in") else "Conv",
        "upsample_block_type": "pixel_shuffle" if _by_pixels(shapes, decoder, "decoder.conv_out") else "interpolate",
        "decoder_norm_types": tuple("batch_norm" if level.counted else "rms_norm" for level in decoder),
        "decoder_act_fns": tuple("relu" if level.counted else "silu" for level in decoder),
    }
    for part, levels in (("encoder", encoder), ("decoder", decoder)):
        config |= {
            f"{part}_block_types": tuple("EfficientViTBlock" if level.attention else "ResBlock" for level in levels),
            f"{part}_block_out_channels": tuple(level.width for level in levels),
            f"{part}_layers_per_block": tuple(level.blocks for level in levels),
            f"{part}_qkv_multiscales": tuple(level.scales for level in levels),
        }
    if lite:  # DC-AE Lite, the only published one whose decoder begins so without running statistics
        config["decoder_conv_act_fn"] = "silu"
    left = tuple(name for name in file.shapes if name.endswith(COUNTER))
    return Plan(KIND_LITE if lite else KIND, config, convert=_converted, left=left)


def traits(vae: Any) -> Traits:
    levels = len(vae.config["encoder_block_out_channels"])
    return Traits(MEDIUM, vae.config["latent_channels"], 2 ** (levels - 1))


def _converted(state: State) -> State:
    """diffusers' names and shapes, by its own conversion of the authors' layout."""
    if not any(name.startswith(_AUTHORS) for name in state):
        return state
    from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers

    return convert_autoencoder_dc_checkpoint_to_diffusers(dict(state))


def _shapes_of(file: VaeFile) -> dict[str, tuple[int, ...]]:
    """The shapes by diffusers' names. Raises ValueError where they cannot be converted."""
    try:
        converted = _converted({name: torch.empty(shape, device="meta") for name, shape in file.shapes.items()})
    except ImportError:
        raise KIND.too_old(file.path) from None
    except Exception as error:  # of shapes that diffusers does not expect
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{file.path} has a DC-AE whose tensors cannot be taken apart ({short(error)}): it is incomplete, or of "
            "another kind."
        ) from None
    return {name: tuple(value.shape) for name, value in converted.items()}


def _levels(file: VaeFile, shapes: Shapes, part: str) -> list[_Level]:
    """The levels of the encoder or decoder, from the image's side. The first may be empty; then its width is nobody's,
    and said to be the second's."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(rf"{part}\.([0-9]{{1,3}})\.", name, re.ASCII))]
    levels: list[_Level] = []
    for level in reversed(range(max(numbers, default=-1) + 1)):
        found = _level(file, shapes, f"{part}.{level}")
        if found.width == 0 and levels:
            found = _Level(False, 0, levels[-1].width, (), 0, False, "")
        levels.append(found)
    return levels[::-1]


def _level(file: VaeFile, shapes: Shapes, part: str) -> _Level:
    first = 1 if f"{part}.0.conv.weight" in shapes else 0
    residual = numbered(shapes, f"{part}.{{}}.conv1.weight", first)
    attention = numbered(shapes, f"{part}.{{}}.attn.to_q.weight", first)
    blocks = residual or attention
    widths = [shapes[name][1] for name in blocks[:1] if len(shapes[name]) in (2, 4) and 0 not in shapes[name]]
    if blocks and not widths:
        raise file.other_kind("a DC-AE", blocks[0], "one for RGB images is needed")
    scale = f"{part}.{first}.attn.to_qkv_multiscale"
    inner = numbered(shapes, f"{scale}.{{}}.proj_in.weight")
    head = shapes.get(f"{scale}.0.proj_out.weight", ())
    sampler = f"{part}.{0 if first else len(blocks)}.conv.weight"
    return _Level(
        bool(attention and not residual),
        len(blocks),
        widths[0] if widths else 0,
        tuple(shapes[name][-1] for name in inner if shapes[name]),
        head[1] if len(head) == 4 else 0,
        any(f"{part}.{first}.{norm}.running_mean" in shapes for norm in ("norm", "attn.norm_out")),
        sampler if sampler in shapes else "",
    )


def _by_pixels(shapes: Shapes, levels: list[_Level], outer: str) -> bool:
    """Whether sizes change by moving pixels into channels and back, rather than by strides and interpolation."""
    down = outer.startswith("encoder.")
    if not levels[0].blocks:
        shape = shapes.get(f"{outer}.conv.weight", ())
        return bool(shape) and (shape[0] * 4 == levels[1].width if down else shape[0] == 12)
    shape = shapes.get(levels[0].sampler, ())
    return bool(shape) and (shape[0] * 4 == levels[1].width if down else shape[0] == 4 * levels[0].width)
