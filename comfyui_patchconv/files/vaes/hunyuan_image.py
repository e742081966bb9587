"""AutoencoderKLHunyuanImage: HunyuanImage 2.1's VAE, in the authors' layout (as ComfyUI has it) and diffusers'."""

from __future__ import annotations

import re
from itertools import count
from typing import Any

from .family import Kind, Medium, Plan, Rename, Shapes, Traits, VaeFile, numbered, renaming

NAMES = ("AutoencoderKLHunyuanImage",)

MEDIUM: Medium = "image"

KIND = Kind("AutoencoderKLHunyuanImage", "0.36", ("diffusers.models.autoencoders.autoencoder_kl_hunyuanimage",))

PARTS = ("encoder.", "decoder.")

_SIDES = (("encoder", "down"), ("decoder", "up"))

_MIDDLE = renaming(
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.proj."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.norm."),
)

_AUTHORS = re.compile(r"(encoder|decoder)\.(?:down|up)\.([0-9]{1,3})\.(block\.([0-9]{1,3})|(?:down|up)sample)\.(.*)")


def claims(shapes: Shapes) -> bool:
    """The authors' names are LDM's, whose samplers leave channels as they are: here they have a quarter, or four times
    as many."""
    for part, way in _SIDES:
        if len(shapes.get(f"{part}.{way}_blocks.0.conv1.weight", ())) == 4:
            return True
        sampler = shapes.get(f"{part}.{way}.0.{way}sample.conv.weight", ())
        if len(sampler) == 4 and sampler[0] != sampler[1] and "post_quant_conv.weight" not in shapes:
            return True
    return False


def plan(file: VaeFile) -> Plan:
    rename = _rename_of(file.shapes)
    names = {rename(name): name for name in file.shapes}
    shapes = {name: file.shapes[own] for name, own in names.items()}
    first, inner, last = "encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"
    levels: list[list[str]] = [[]]
    for number in count():
        layer = f"encoder.down_blocks.{number}."
        if f"{layer}conv1.weight" in shapes:
            levels[-1].append(f"{layer}conv1.weight")
        elif f"{layer}conv.weight" in shapes:
            levels.append([])
        else:
            break
    blocks = [level[0] for level in levels if level]
    odd = [name for name in (first, inner, last, *blocks) if len(shapes.get(name, ())) != 4 or 0 in shapes[name]]
    if not odd:
        odd = [name for name, channels in ((first, shapes[first][1]), (last, shapes[last][0])) if channels != 3]
    if odd or len(blocks) != len(levels):
        name = odd[0] if odd else first
        raise file.other_kind(
            "a VAE like HunyuanImage's",
            names.get(name, name),
            f"one for RGB images, with blocks in each of its {len(levels)} levels, is needed",
        )
    config: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": shapes[inner][1],
        "block_out_channels": tuple(shapes[name][0] for name in blocks),
        "layers_per_block": len(levels[0]),
        "spatial_compression_ratio": 2 ** (len(levels) - 1),
        "sample_size": 384,  # diffusers tiles by it
    }
    return Plan(KIND, config, rename)


def traits(vae: Any) -> Traits:
    return Traits(MEDIUM, vae.config["latent_channels"], vae.config["spatial_compression_ratio"])


def _rename_of(shapes: Shapes) -> Rename:
    """diffusers' names of the authors' tensors, which has the blocks and samplers of all levels in one list."""
    starts: dict[str, list[int]] = {}
    for part, way in _SIDES:
        starts[part] = [0]
        for level in range(len(numbered(shapes, f"{part}.{way}.{{}}.block.0.conv1.weight"))):
            name = f"{part}.{way}.{level}."
            blocks = numbered(shapes, f"{name}block.{{}}.conv1.weight")
            sampled = f"{name}{way}sample.conv.weight" in shapes
            starts[part].append(starts[part][-1] + len(blocks) + sampled)

    def rename(name: str) -> str:
        found = _AUTHORS.fullmatch(name)
        if found is None:
            return _MIDDLE(name)
        part, level, _, block, rest = found.groups()
        if int(level) + 1 >= len(starts[part]):
            return name
        place = starts[part][int(level)] + int(block) if block is not None else starts[part][int(level) + 1] - 1
        return f"{part}.{'down' if part == 'encoder' else 'up'}_blocks.{place}.{rest}"

    return rename
