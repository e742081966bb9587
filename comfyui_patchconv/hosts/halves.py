"""Tells a VAE's decoder from its encoder by the names that hosts give their parts."""

from __future__ import annotations

from torch import nn

HALVES = ("decoder", "encoder")

_OF_ENCODER = ("quant_conv", "in_block", "down_blocks", "pre_block", "mean_proj", "logs_proj")
"""Encoder parts that do not say so: of the KL VAEs, of Stable Cascade's stage A, and of MiniMax H3's sounds."""

_ENCODER_OUTPUT = "conv1"
"""Behind Wan's encoder, beside it in the model; `conv2` is in front of the decoder."""


def half_of(name: str) -> str:
    """`"decoder"` or `"encoder"` for a dotted module name inside a VAE; the first part that tells decides.

    What no part tells about is the decoder's (`vocoder`, `previewer`, `up_blocks`, a VAE that can only decode).
    """
    if name == _ENCODER_OUTPUT:
        return "encoder"
    for part in name.split("."):
        if "decoder" in part:
            return "decoder"
        if "encoder" in part.replace("autoencoder", "") or part in _OF_ENCODER:
            return "encoder"
    return "decoder"


def part_of(model: nn.Module, half: str, method: str) -> str:
    """The name of the method of `model` to stream: its decoder's or encoder's, or else the whole `method`."""
    return f"{half}.forward" if isinstance(getattr(model, half, None), nn.Module) else method
