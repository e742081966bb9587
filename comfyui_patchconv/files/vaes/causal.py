"""The configuration of VAEs of videos that are LDM's with causal convolutions, as diffusers names it."""

from __future__ import annotations

from typing import Any

from .family import VaeFile, numbered

IN_TIME = 2
"""How many levels halve the frames."""


def config_of(file: VaeFile, model: str, block: str) -> dict[str, Any]:
    """What the file's tensors say of a VAE. Raises ValueError, naming a tensor, for one of another shape.

    model: whose VAE it is, as diffusers' blocks are named. block: the first convolution of an encoder's block, with
    places for its level and its number.
    """
    shapes = file.shapes
    levels = numbered(shapes, block.format("{}", 0))
    first, inner, last = (f"{name}.conv.weight" for name in ("encoder.conv_in", "decoder.conv_in", "decoder.conv_out"))
    odd = [name for name in (first, inner, last, *levels) if len(shapes.get(name, ())) != 5 or 0 in shapes[name]]
    if not odd:
        odd = [name for name, channels in ((first, shapes[first][1]), (last, shapes[last][0])) if channels != 3]
    if odd or len(levels) <= IN_TIME:
        wanted = f"one for RGB videos, with more than {IN_TIME} levels, is needed"
        raise file.other_kind(f"a VAE like {model}'s", odd[0] if odd else first, wanted)
    return {
        "latent_channels": shapes[inner][1],
        "block_out_channels": tuple(shapes[name][0] for name in levels),
        "down_block_types": (f"{model}DownBlock3D",) * len(levels),
        "up_block_types": (f"{model}UpBlock3D",) * len(levels),
        "layers_per_block": len(numbered(shapes, block.format(0, "{}"))),
        "temporal_compression_ratio": 2**IN_TIME,
    }
