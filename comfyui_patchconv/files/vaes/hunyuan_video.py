"""AutoencoderKLHunyuanVideo: HunyuanVideo 1.0's VAE, in the authors' layout (as ComfyUI has it) and diffusers'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ldm
from .family import Kind, Medium, Plan, Shapes, Traits, VaeFile, check_pairs, numbered

NAMES = ("AutoencoderKLHunyuanVideo",)

MEDIUM: Medium = "video"

KIND = Kind("AutoencoderKLHunyuanVideo", "0.32", ("diffusers.models.autoencoders.autoencoder_kl_hunyuan_video",))

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

_IN_TIME, _RATE = 2, 24.0
"""How many levels halve the frames, and frames a second."""

_MIDDLE = ("mid.block_1", "mid_block.resnets.0")

_BLOCKS = ("encoder.down_blocks.{}.resnets.{}.conv1.conv.weight", "encoder.down.{}.block.{}.conv1.conv.weight")
"""The first convolution of an encoder's block, as diffusers and the authors have it."""


def claims(shapes: Shapes) -> bool:
    """Group norms beside causal convolutions; HunyuanVideo 1.5 has others."""
    return any(
        f"{part}.{middle}.norm1.weight" in shapes and f"{part}.{middle}.conv1.conv.weight" in shapes
        for part in ("encoder", "decoder")
        for middle in _MIDDLE
    )


def plan(file: VaeFile) -> Plan:
    check_pairs(file, ("quant_conv.", "post_quant_conv."), ("encoder.", "decoder."))
    shapes = file.shapes
    block = next((block for block in _BLOCKS if block.format(0, 0) in shapes), _BLOCKS[0])
    levels = numbered(shapes, block.format("{}", 0))
    first, inner, last = (f"{name}.conv.weight" for name in ("encoder.conv_in", "decoder.conv_in", "decoder.conv_out"))
    odd = [name for name in (first, inner, last, *levels) if len(shapes.get(name, ())) != 5 or 0 in shapes[name]]
    if not odd:
        odd = [name for name, channels in ((first, shapes[first][1]), (last, shapes[last][0])) if channels != 3]
    if odd or len(levels) <= _IN_TIME:
        raise file.other_kind(
            "a VAE like HunyuanVideo's",
            odd[0] if odd else first,
            f"one for RGB videos, with more than {_IN_TIME} levels, is needed",
        )
    config: dict[str, Any] = {
        "latent_channels": shapes[inner][1],
        "block_out_channels": tuple(shapes[name][0] for name in levels),
        "down_block_types": ("HunyuanVideoDownBlock3D",) * len(levels),
        "up_block_types": ("HunyuanVideoUpBlock3D",) * len(levels),
        "layers_per_block": len(numbered(shapes, block.format(0, "{}"))),
        "spatial_compression_ratio": 2 ** (len(levels) - 1),
        "temporal_compression_ratio": 2**_IN_TIME,
    }
    rename = str if block == _BLOCKS[0] else ldm.rename_of(len(levels))
    return Plan(KIND, config, rename, ldm.flat, prepare=_whole)


def traits(vae: Any) -> Traits:
    config = vae.config
    frames, scale = config["temporal_compression_ratio"], config["spatial_compression_ratio"]
    return Traits(MEDIUM, config["latent_channels"], scale, frames, rate=_RATE)


def _whole(vae: Any) -> None:
    """Have it decode all frames at once, as it was trained, rather than in tiles of 16 that are blended; and without
    the mask of attention, which has a value for each two pixels of a latent."""
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    for half in (vae.encoder, vae.decoder):
        half.mid_block = _Middle(half.mid_block.resnets, half.mid_block.attentions)


class _Middle(nn.Module):
    """The blocks between encoder and decoder: of latents `[N, C, T, H, W]`, in which each frame sees itself and those
    before it."""

    def __init__(self, resnets: nn.ModuleList, attentions: nn.ModuleList) -> None:
        super().__init__()
        self.resnets, self.attentions = resnets, attentions

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.resnets[0](hidden)
        for attention, resnet in zip(self.attentions, self.resnets[1:]):
            hidden = resnet(hidden + _attended(attention, hidden))
        return hidden


def _attended(attention: Any, hidden: Tensor) -> Tensor:
    """What a frame of `hidden` `[N, C, T, H, W]` takes from itself and those before it; attention has one head."""
    size, frames = hidden.shape, hidden.shape[2]
    pixels = attention.group_norm(hidden).flatten(2).mT  # [N, T * H * W, C]
    query, key, value = (layer(pixels)[:, None] for layer in (attention.to_q, attention.to_k, attention.to_v))
    of_frame = query.shape[2] // frames
    found = [
        F.scaled_dot_product_attention(
            query[:, :, (number - 1) * of_frame : number * of_frame],
            key[:, :, : number * of_frame],
            value[:, :, : number * of_frame],
        )
        for number in range(1, frames + 1)
    ]
    return attention.to_out[0](torch.cat(found, 2)[:, 0]).mT.reshape(size)
