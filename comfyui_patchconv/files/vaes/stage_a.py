"""PaellaVQModel: the stage A of Stable Cascade and Würstchen, in the authors' layout (ComfyUI's) and diffusers'."""

from __future__ import annotations

import math
from typing import Any

from .family import COUNTER, Kind, Medium, Plan, Shapes, Traits, VaeFile, numbered, renaming

NAMES = ("PaellaVQModel",)

MEDIUM: Medium = "image"

KIND = Kind(
    "PaellaVQModel",
    "0.21",
    (
        "diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model",
        "diffusers.pipelines.wuerstchen.modeling_paella_vq_model",
    ),
)

PARTS = ("in_block.", "down_blocks.", "vquantizer.", "up_blocks.", "out_block.")

_RENAME = renaming((r"^vquantizer\.codebook\.", "vquantizer.embedding."))

_CODES = "vquantizer.embedding.weight"


def claims(shapes: Shapes) -> bool:
    return any(name in shapes for name in ("vquantizer.codebook.weight", _CODES, "up_blocks.0.0.weight"))


def plan(file: VaeFile) -> Plan:
    names = {_RENAME(name): name for name in file.shapes}
    shapes = {name: file.shapes[own] for name, own in names.items()}
    into, inner, out = "in_block.1.weight", "up_blocks.0.0.weight", "out_block.0.weight"
    wanted = {into: 4, inner: 4, out: 4, _CODES: 2}
    for name, sides in wanted.items():
        if len(shapes.get(name, ())) != sides or 0 in shapes[name]:
            raise file.other_kind("a VAE like Stable Cascade's stage A", names.get(name, name), "its own are needed")
    factor = math.isqrt(shapes[into][1] // 3)
    for name, channels in ((into, shapes[into][1]), (out, shapes[out][0])):
        if channels != 3 * factor**2:
            raise file.other_kind("a VAE like Stable Cascade's stage A", names[name], "one for RGB images is needed")
    config: dict[str, Any] = {
        "up_down_scale_factor": factor,
        "levels": len(numbered(shapes, "down_blocks.{}.gammas", step=2)),
        "bottleneck_blocks": len(numbered(shapes, "up_blocks.{}.gammas", first=1)),
        "embed_dim": shapes[inner][0],
        "latent_channels": shapes[inner][1],
        "num_vq_embeddings": shapes[_CODES][0],
    }
    # Of training: how often the codes were met, and the batch norm's counter.
    left = tuple(name for name in file.shapes if name.startswith("vquantizer.ema_") or name.endswith(COUNTER))
    return Plan(KIND, config, _RENAME, left=left)


def traits(vae: Any) -> Traits:
    scale = vae.config["up_down_scale_factor"] * 2 ** (vae.config["levels"] - 1)
    return Traits(MEDIUM, vae.config["latent_channels"], scale, low=0.0)
