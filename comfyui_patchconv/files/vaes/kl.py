"""AutoencoderKL: the image VAEs of Stable Diffusion, SDXL, SD3, Flux and Flux.2, in LDM's layout and diffusers'."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..packing import SIDE, Packing
from ..words import shape_of, short
from . import ldm
from .family import Kind, Medium, Plan, Shapes, State, Traits, VaeFile, incomplete, numbered, of_diffusers, renaming

NAMES = ("AutoencoderKL",)

MEDIUM: Medium = "image"

KIND = Kind("AutoencoderKL", "0.2", ("diffusers.models.autoencoders.autoencoder_kl",))

_QUANT, _POST_QUANT, _NORM = "quant_conv.", "post_quant_conv.", "bn."

PARTS = ("encoder.", "decoder.", _QUANT, _POST_QUANT, _NORM)

_MEAN, _VARIANCE, _COUNTER = "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"

_INSIDE = (
    (r"^encoder\.quant_conv\.", _QUANT),
    (r"^decoder\.post_quant_conv\.", _POST_QUANT),
)
"""Where the authors of Flux.2 have convolutions that others have beside encoder and decoder."""

_OLD_ATTENTION = (
    (r"(?<=attentions\.0\.)query(?=\.)", "to_q"),
    (r"(?<=attentions\.0\.)key(?=\.)", "to_k"),
    (r"(?<=attentions\.0\.)value(?=\.)", "to_v"),
    (r"(?<=attentions\.0\.)proj_attn(?=\.)", "to_out.0"),
)
"""Attention as diffusers had it before 0.18: published VAEs still have these names."""

_GROUPS = 32  # of every group norm; LDM's code has it fixed, and no tensor's shape shows it

GROUPS_NAME = "norm_num_groups"
"""By this name a safetensors file's metadata says that its norms have another number of groups."""

_LAYOUTS = {
    "ldm": ("encoder.down.{}.block.{}.conv1.weight", "decoder.mid.attn_1.q.weight"),
    "diffusers": ("encoder.down_blocks.{}.resnets.{}.conv1.weight", "decoder.mid_block.attentions.0.group_norm.weight"),
}


def random_vae(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", width: int = 128
) -> Any:
    """Stable Diffusion's VAE, its real architecture with weights drawn from `seed`; the global generator is kept.

    width: channels of its first level; 128 is the real one.
    """
    kind = of_diffusers("diffusers.models.autoencoders.autoencoder_kl").AutoencoderKL
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of the GPUs too
        vae = kind(**_config((width, 2 * width, 4 * width, 4 * width), layers=2, latent=4))
    nn.Module.to(vae, device=device, dtype=dtype)  # diffusers' own `to` warns of every cast
    return vae.requires_grad_(False).eval()


def claims(shapes: Shapes) -> bool:
    return "decoder.conv_in.weight" in shapes and "encoder.conv_in.weight" in shapes


def plan(file: VaeFile) -> Plan:
    inside = renaming(*_INSIDE)
    shapes = {inside(name): shape for name, shape in file.shapes.items()}
    layout, config = _detect(file, shapes, _groups(file))
    levels = len(config["block_out_channels"])
    of_layout, today = ldm.rename_of(levels) if layout == "ldm" else str, renaming(*_OLD_ATTENTION)

    def rename(name: str) -> str:
        return today(of_layout(inside(name)))

    def finish(vae: Any, apart: State) -> None:
        if not apart:
            return
        if apart[_VARIANCE].min() < 0:
            raise ValueError(
                f"{file.path}: {file.held[_VARIANCE]} has negative values: it is damaged, download it again."
            )
        vae.add_module("packing", Packing(apart[_MEAN], apart[_VARIANCE]))

    return Plan(KIND, config, rename, ldm.flat, (_COUNTER,), (_MEAN, _VARIANCE), finish=finish)


def traits(vae: Any) -> Traits:
    levels = len(vae.config["block_out_channels"])
    return Traits(MEDIUM, vae.config["latent_channels"], 2 ** (levels - 1))


def _groups(file: VaeFile) -> int:
    """The groups of the norms of the VAE in the file. Raises ValueError where its metadata names no number of them."""
    said = file.metadata.get(GROUPS_NAME, str(_GROUPS))
    if not re.fullmatch(r"[1-9][0-9]{0,3}", said):
        raise ValueError(
            f"{file.path} says that its norms have {short(said, 20)} groups: leave {GROUPS_NAME} out of its metadata "
            f"for {_GROUPS}, or say a number from 1 on."
        )
    return int(said)


def _detect(file: VaeFile, shapes: dict[str, tuple[int, ...]], groups: int) -> tuple[str, dict[str, Any]]:
    """Layout ("ldm" or "diffusers") of a VAE's tensors, and the `AutoencoderKL` configuration their shapes show.

    groups: of its norms.
    """
    layout = next((name for name, (block, _) in _LAYOUTS.items() if block.format(0, 0) in shapes), None)
    if layout is None:
        raise ValueError(
            f"{file.path} has a VAE that is laid out neither as LDM's nor as diffusers': use an image VAE."
        )
    block, attention = _LAYOUTS[layout]
    levels = numbered(shapes, block.format("{}", 0))
    layers = len(numbered(shapes, block.format(0, "{}")))
    first, last, inner = "encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.conv_in.weight"
    odd = [name for name in (first, last, inner, *levels) if len(shapes.get(name, ())) != 4 or 0 in shapes[name]]
    if not odd:
        odd = [name for name in levels if shapes[name][0] % groups]
        odd += [name for name, channels in ((first, shapes[first][1]), (last, shapes[last][0])) if channels != 3]
    if odd:
        raise file.other_kind("a VAE", odd[0], f"one for RGB images, with channels in multiples of {groups}, is needed")
    latent = shapes[inner][1]
    quant, post_quant = (f"{part}weight" in shapes for part in (_QUANT, _POST_QUANT))
    if quant != post_quant:
        there, missing = (_QUANT, _POST_QUANT) if quant else (_POST_QUANT, _QUANT)
        raise incomplete(file.path, f"{there}weight", f"{missing}weight")
    _check_norm(file, shapes, latent)
    return layout, _config(
        [shapes[name][0] for name in levels],
        layers,
        latent=latent,
        norm_num_groups=groups,
        use_quant_conv=quant,
        use_post_quant_conv=post_quant,
        mid_block_add_attention=attention in shapes,
    )


def _check_norm(file: VaeFile, shapes: Shapes, latent: int) -> None:
    """Raises ValueError for a batch norm of the latent that is not Flux.2's, which packs 2x2 pixels into one."""
    found = {name: shape for name, shape in shapes.items() if name.startswith(_NORM) and name != _COUNTER}
    wanted = dict.fromkeys((_MEAN, _VARIANCE), (latent * SIDE**2,))
    if found and found != wanted:
        held = ", ".join(f"{short(name, 40)} {shape_of(shape)}" for name, shape in list(found.items())[:2])
        raise ValueError(
            f"{file.path} normalises its latent in another way than Flux.2's VAE (it has {held}): {_MEAN} and "
            f"{_VARIANCE} of {latent * SIDE**2} channels each can be used."
        )


def _config(widths: Sequence[int], layers: int, latent: int, **rest: Any) -> dict[str, Any]:
    return {
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "latent_channels": latent,
        "norm_num_groups": _GROUPS,
        "sample_size": 512,  # diffusers tiles by it
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        **rest,
    }
