"""AutoencoderKLHunyuanVideo: HunyuanVideo 1.0's VAE, in the authors' layout (as ComfyUI has it) and diffusers'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ldm
from .causal import config_of
from .family import Kind, Medium, Plan, Shapes, Traits, VaeFile, check_pairs

NAMES = ("AutoencoderKLHunyuanVideo",)

MEDIUM: Medium = "video"

KIND = Kind("AutoencoderKLHunyuanVideo", "0.32", ("diffusers.models.autoencoders.autoencoder_kl_hunyuan_video",))

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

_RATE = 24.0
"""Frames a second."""

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
    block = next((block for block in _BLOCKS if block.format(0, 0) in file.shapes), _BLOCKS[0])
    config = config_of(file, "HunyuanVideo", block)
    levels = len(config["block_out_channels"])
    config["spatial_compression_ratio"] = 2 ** (levels - 1)
    rename = str if block == _BLOCKS[0] else ldm.rename_of(levels)
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
