"""AutoencoderKLCogVideoX: CogVideoX's VAE, in diffusers' layout, which is ComfyUI's too."""

from __future__ import annotations

from typing import Any

from .family import Kind, Medium, Plan, Shapes, Traits, VaeFile, check_pairs, numbered

NAMES = ("AutoencoderKLCogVideoX",)

MEDIUM: Medium = "video"

KIND = Kind("AutoencoderKLCogVideoX", "0.30", ("diffusers.models.autoencoders.autoencoder_kl_cogvideox",))

PARTS = ("encoder.", "decoder.")

_IN_TIME, _RATE = 2, 8.0
"""How many levels halve the frames, and frames a second."""

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
    shapes = file.shapes
    levels = numbered(shapes, _BLOCK.format("{}", 0))
    first, inner, last = (f"{name}.conv.weight" for name in ("encoder.conv_in", "decoder.conv_in", "decoder.conv_out"))
    odd = [name for name in (first, inner, last, *levels) if len(shapes.get(name, ())) != 5 or 0 in shapes[name]]
    if not odd:
        odd = [name for name, channels in ((first, shapes[first][1]), (last, shapes[last][0])) if channels != 3]
    if odd or len(levels) <= _IN_TIME:
        raise file.other_kind(
            "a VAE like CogVideoX's",
            odd[0] if odd else first,
            f"one for RGB videos, with more than {_IN_TIME} levels, is needed",
        )
    config: dict[str, Any] = {
        "latent_channels": shapes[inner][1],
        "block_out_channels": tuple(shapes[name][0] for name in levels),
        "down_block_types": ("CogVideoXDownBlock3D",) * len(levels),
        "up_block_types": ("CogVideoXUpBlock3D",) * len(levels),
        "layers_per_block": len(numbered(shapes, _BLOCK.format(0, "{}"))),
        "temporal_compression_ratio": 2**_IN_TIME,
    }
    return Plan(KIND, config)


def traits(vae: Any) -> Traits:
    """Two frames of a latent are decoded at a time, as it was trained; of an odd number the first three, of which the
    very first makes one."""
    config = vae.config
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    return Traits(MEDIUM, config["latent_channels"], scale, 2**_IN_TIME, rate=_RATE, paired=True)
