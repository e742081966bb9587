"""The families of VAEs that files are recognised as, a module each; `of_names` chooses one for a file."""

from __future__ import annotations

from typing import Any, Optional

from . import cogvideox, deep_compression, hunyuan_image, hunyuan_video, kl, ltx, mochi, oobleck, stage_a, tiny, wan
from .family import Family, Shapes, Traits

FAMILIES: tuple[Family, ...] = (
    mochi,
    tiny,
    wan,
    ltx,
    deep_compression,
    oobleck,
    stage_a,
    hunyuan_image,
    cogvideox,
    hunyuan_video,
    kl,
)
"""AutoencoderKL is last, HunyuanVideo behind CogVideoX, and TAESD behind Mochi: others have their names too."""


def of_names(shapes: Shapes) -> Optional[Family]:
    """The family that tensors of these names are of; None for one that is not known."""
    return next((family for family in FAMILIES if family.claims(shapes)), None)


def traits_of(vae: Any) -> Traits:
    """What `vae` makes of latents. Raises TypeError for a class of diffusers that is of no family."""
    name = type(vae).__name__
    for family in FAMILIES:
        if name in family.NAMES:
            return family.traits(vae)
    raise TypeError(f"{name} is no VAE that is known here: use one that load_vae loads.")
