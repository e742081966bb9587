"""AutoencoderKLCogVideoX: CogVideoX's VAE, in diffusers' layout, which is ComfyUI's too."""

from __future__ import annotations

from typing import Any

from .causal import IN_TIME, config_of
from .family import Kind, Medium, Plan, Shapes, Traits, VaeFile, check_pairs

NAMES = ("AutoencoderKLCogVideoX",)

MEDIUM: Medium = "video"

KIND = Kind("AutoencoderKLCogVideoX", "0.30", ("diffusers.models.autoencoders.autoencoder_kl_cogvideox",))

PARTS = ("encoder.", "decoder.")

_RATE = 8.0
"""Frames a second."""

_BLOCK = "encoder.down_blocks.{}.resnets.{}.conv1.conv.weight"


def claims(shapes: Shapes) -> bool:
    """Norms that the latent scales and moves, beside causal convolutions."""
    return any(
        f"decoder.{block}.resnets.0.norm1.{layer}.weight" in shapes
        for block in ("mid_block", "up_blocks.0")
        for layer in ("norm_layer", "conv_y.conv")
    )


def plan(file: VaeFile) -> Plan:
    check_pairs(file, ("encoder.", "decoder."))
    return Plan(KIND, config_of(file, "CogVideoX", _BLOCK))


def traits(vae: Any) -> Traits:
    """Two frames of a latent are decoded at a time, as it was trained; of an odd number the first three, of which the
    very first makes one."""
    config = vae.config
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    return Traits(MEDIUM, config["latent_channels"], scale, 2**IN_TIME, rate=_RATE, paired=True)
