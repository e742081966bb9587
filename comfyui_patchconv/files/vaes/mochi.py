"""AutoencoderKLMochi: Mochi 1's VAE or its decoder alone, in the authors' layout (as ComfyUI has it) and diffusers'."""

from __future__ import annotations

import re
from math import prod
from typing import Any, Optional

from torch import Tensor, nn

from .family import Kind, Medium, Missing, Plan, Rename, Shapes, State, Traits, VaeFile, incomplete, numbered, renaming

NAMES = ("AutoencoderKLMochi",)

MEDIUM: Medium = "video"

KIND = Kind("AutoencoderKLMochi", "0.32", ("diffusers.models.autoencoders.autoencoder_kl_mochi",))

PARTS = ("encoder.", "decoder.", "blocks.", "output_proj.")
"""The authors' file of a decoder alone has nothing before its names."""

_RATE = 30.0
"""Frames a second."""

_SIDE = 2
"""By how much each level makes sides smaller, which shapes show together with how it makes frames fewer."""

_BLOCK = renaming(
    (r"\.stack\.0\.", ".norm1.norm_layer."),
    (r"\.stack\.2\.", ".conv1.conv."),
    (r"\.stack\.3\.", ".norm2.norm_layer."),
    (r"\.stack\.5\.", ".conv2.conv."),
    (r"\.resnets\.(\d+)\.attn_block\.norm\.", r".norms.\1.norm_layer."),
    (r"\.resnets\.(\d+)\.attn_block\.attn\.out\.", r".attentions.\1.to_out.0."),
    (r"\.resnets\.(\d+)\.attn_block\.attn\.qkv\.", r".attentions.\1.to_qkv."),
)

_OUTER = renaming(
    (r"^decoder\.output_proj\.", "decoder.proj_out."),
    (r"^encoder\.output_proj\.", "encoder.proj_out."),
    (r"^encoder\.output_norm\.", "encoder.norm_out.norm_layer."),
)

_DECODER = re.compile(r"decoder\.blocks\.([0-9]{1,3})\.(blocks\.)?([0-9]{1,3}|proj)\.(.*)")

_ENCODER = re.compile(r"encoder\.layers\.([0-9]{1,3})\.(?:layers\.([0-9]{1,3})\.)?(.*)")

_RESIDUAL = re.compile(
    r"(?:en|de)coder\.block_(?:in|out)\.resnets\."
    r"|(?:encoder\.layers|(?:decoder\.)?blocks)\.[0-9]+\.(?:(?:layers|blocks)\.[0-9]+\.|[0-9]+\.)?stack\."
)
"""What names of residual blocks begin with, as diffusers and the authors have them."""

_WIDTH = "one like Mochi's is needed"


def claims(shapes: Shapes) -> bool:
    return any(_RESIDUAL.match(name) for name in shapes)


def plan(file: VaeFile) -> Plan:
    rename = _rename_of(file.shapes)
    names = {rename(name): name for name in file.shapes}
    shapes = {name: file.shapes[own] for name, own in names.items()}
    if not any(name.startswith("decoder.") for name in shapes):
        raise incomplete(file.path, "encoder.", "decoder.")
    inner, last = "decoder.conv_in.weight", "decoder.proj_out.weight"
    proj = numbered(shapes, "decoder.up_blocks.{}.proj.weight")
    widths = [*proj, last]  # what goes out of each level is what comes into the next
    for name, dimensions in ((inner, 5), *((name, 2) for name in widths)):
        if len(shapes.get(name, ())) != dimensions or 0 in shapes[name]:
            raise file.other_kind("a VAE like Mochi's", names.get(name, name), _WIDTH)
    moved = [shapes[name][0] / shapes[after][1] / _SIDE**2 for name, after in zip(proj, widths[1:])]
    odd = [name for name, frames in zip(proj, moved) if frames < 1 or frames % 1]
    if odd or not proj or shapes[last][0] != 3:
        raise file.other_kind("a VAE like Mochi's", names[odd[0] if odd else last], _WIDTH)
    config: dict[str, Any] = {
        "latent_channels": shapes[inner][1],
        "decoder_block_out_channels": tuple(shapes[name][1] for name in widths)[::-1],
        "layers_per_block": _layers(shapes, len(proj)),
        "temporal_expansions": tuple(int(frames) for frames in moved)[::-1],
        "spatial_expansions": (_SIDE,) * len(proj),
    }
    whole = any(name.startswith("encoder.") for name in shapes)
    config |= _encoder(file, names, shapes, len(proj)) if whole else _no_encoder(len(proj))

    def prepare(vae: Any) -> None:
        _prepared(vae)
        if not whole:
            vae.encoder = Missing(f"{file.path} has Mochi's decoder alone: give a file that has its encoder too.")

    return Plan(KIND, config, rename, _split, prepare=prepare)


def traits(vae: Any) -> Traits:
    config = vae.config
    frames, scale = prod(config["temporal_expansions"]), prod(config["spatial_expansions"])
    return Traits(MEDIUM, config["latent_channels"], scale, frames, rate=_RATE)


def _prepared(vae: Any) -> None:
    """Have each level drop the frames that it makes before the first, as the authors and ComfyUI do. diffusers drops
    all of them at the end, so that its first frames are made of what is before the first."""
    vae.drop_last_temporal_frames = False
    for block in vae.decoder.up_blocks:
        block.register_forward_hook(_without_first)


def _without_first(block: nn.Module, _: Any, made: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return made[0][:, :, int(block.temporal_expansion) - 1 :], made[1]  # pyright: ignore[reportArgumentType]


def _layers(shapes: Shapes, levels: int) -> tuple[int, ...]:
    """How many blocks each part of the decoder has, from the image's side."""
    parts = ("block_out", *(f"up_blocks.{level}" for level in reversed(range(levels))), "block_in")
    return tuple(len(numbered(shapes, f"decoder.{part}.resnets.{{}}.conv1.conv.weight")) for part in parts)


def _encoder(file: VaeFile, names: dict[str, str], shapes: Shapes, levels: int) -> dict[str, Any]:
    """Its part of the configuration."""
    first = "encoder.proj_in.weight"
    inner = [f"encoder.down_blocks.{level}.conv_in.conv.weight" for level in range(levels)]
    for name, dimensions in ((first, 2), *((name, 5) for name in inner)):
        if len(shapes.get(name, ())) != dimensions or 0 in shapes[name]:
            raise file.other_kind("a VAE like Mochi's", names.get(name, name), _WIDTH)
    parts = ("block_in", *(f"down_blocks.{level}" for level in range(levels)), "block_out")
    return {
        "in_channels": shapes[first][1],
        "encoder_block_out_channels": tuple(shapes[name][0] for name in (first, *inner)),
        "add_attention_block": tuple(f"encoder.{part}.attentions.0.to_out.0.weight" in shapes for part in parts),
    }


def _no_encoder(levels: int) -> dict[str, Any]:
    """The configuration of the smallest encoder, which is left out."""
    return {"encoder_block_out_channels": (32,) * (levels + 1), "add_attention_block": (False,) * (levels + 2)}


def _split(state: State) -> State:
    """Attention's weights each by itself: the authors have them in one matrix."""
    found: State = {}
    for name, value in state.items():
        if ".to_qkv." in name:
            for part, own in zip("qkv", value.tensor_split(3)):
                found[name.replace(".to_qkv.", f".to_{part}.")] = own
        else:
            found[name] = value
    return found


def _rename_of(shapes: Shapes) -> Rename:
    """diffusers' names of the authors' tensors."""
    alone = not any(name.startswith("decoder.") for name in shapes)
    down = [int(found[1]) for name in shapes if (found := _ENCODER.fullmatch(name)) and found[2] is not None]

    def of_decoder(block: int, nested: bool, place: str, rest: str) -> str:
        if place == "proj" or nested:
            return f"decoder.up_blocks.{block - 1}.{'proj' if place == 'proj' else f'resnets.{place}'}.{rest}"
        if block == 0:
            return f"decoder.conv_in.{rest}" if place == "0" else f"decoder.block_in.resnets.{int(place) - 1}.{rest}"
        return f"decoder.block_out.resnets.{place}.{rest}"

    def of_encoder(layer: int, place: Optional[str], rest: str) -> str:
        if place is not None:
            own = "conv_in.conv" if place == "0" else f"resnets.{int(place) - 1}"
            return f"encoder.down_blocks.{layer - min(down)}.{own}.{rest}"
        if layer == 0:
            return f"encoder.proj_in.{rest}"
        after = bool(down) and layer > max(down)
        return f"encoder.block_{'out' if after else 'in'}.resnets.{layer - (max(down) if after else 0) - 1}.{rest}"

    def rename(name: str) -> str:
        if alone and name.startswith(("blocks.", "output_proj.")):
            name = f"decoder.{name}"
        found = _DECODER.fullmatch(name)
        if found is not None:
            name = of_decoder(int(found[1]), found[2] is not None, found[3], found[4])
        found = _ENCODER.fullmatch(name)
        if found is not None:
            name = of_encoder(int(found[1]), found[2], found[3])
        return _BLOCK(_OUTER(name))

    return rename
