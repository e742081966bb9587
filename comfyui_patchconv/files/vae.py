"""VAE weights from files: which tensors make a VAE, in which layout, and what its configuration is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .packing import SIDE, Packing
from .tensors import FLOATS, Header, opened, read_metadata
from .words import listed, shape_of, short

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Shapes = dict[str, tuple[int, ...]]

State = dict[str, Tensor]

_PREFIXES = ("", "first_stage_model.", "vae.")

_QUANT, _POST_QUANT, _NORM = "quant_conv.", "post_quant_conv.", "bn."

_PARTS = ("encoder.", "decoder.", _QUANT, _POST_QUANT, _NORM)

_INSIDE = {"encoder.quant_conv.": _QUANT, "decoder.post_quant_conv.": _POST_QUANT}
"""Where the authors of Flux.2 have convolutions that others have beside encoder and decoder."""

_OF_TRAINING = ("loss.", "model_ema.")
"""What LDM's trainings leave beside a VAE, and no decode uses."""

_MEAN, _VARIANCE = "bn.running_mean", "bn.running_var"

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_LDM_NAMES = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)

_GROUPS = 32  # of every group norm; LDM's code has it fixed, and no tensor's shape shows it

GROUPS_NAME = "norm_num_groups"
"""By this name a safetensors file's metadata says that its norms have another number of groups."""

_LAYOUTS = {
    "ldm": ("encoder.down.{}.block.{}.conv1.weight", "decoder.mid.attn_1.q.weight"),
    "diffusers": ("encoder.down_blocks.{}.resnets.{}.conv1.weight", "decoder.mid_block.attentions.0.group_norm.weight"),
}


def random_vae(seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> AutoencoderKL:
    """Stable Diffusion's VAE, its real architecture with weights drawn from `seed`; the global generator is kept."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of the GPUs too
        vae = AutoencoderKL(**_config((128, 256, 512, 512), layers=2, latent=4))
    nn.Module.to(vae, device=device, dtype=dtype)  # diffusers' own `to` warns of every cast
    return vae.requires_grad_(False).eval()


def load_vae(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust: bool = False,
) -> AutoencoderKL:
    """The image VAE in the file `path`, ready for inference. Only its own tensors are read.

    path: a VAE, or a whole checkpoint that has one, in LDM layout (`decoder.mid.attn_1…`: ComfyUI, Automatic1111) or
        diffusers layout (`decoder.mid_block.attentions.0…`), with any number of latent channels. safetensors, or a
        pickle (.ckpt, .pt, .pth, .bin) as far as `torch.load(weights_only=True)` reads it. Flux.2's has a
        `packing_of`.
    trust: a pickle; see `tensors.unpickled`.

    Norms have 32 groups, or as many as a safetensors file's metadata says by `GROUPS_NAME`.

    Raises FileNotFoundError, or ValueError if the file is damaged, has no such VAE, or has tensors that none has.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    path = Path(path)
    header, read = opened(path, trust)
    names = _vae_names(path, header)
    shapes = {name: header[held][1] for name, held in names.items()}
    layout, config = _detect(path, shapes, _groups(path))
    state = {
        name: _cast(path, held, read(held), torch.float32 if name.startswith(_NORM) else dtype).to(device)
        for name, held in names.items()
    }
    mean, variance = state.pop(_MEAN, None), state.pop(_VARIANCE, None)
    if layout == "ldm":
        state = _from_ldm(state, len(config["block_out_channels"]))
    state = _today(state)
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    _check_state(path, state, vae)
    vae.load_state_dict(state, assign=True)
    if mean is not None and variance is not None:
        if variance.min() < 0:
            raise ValueError(f"{path}: {names[_VARIANCE]} has negative values: it is damaged, download it again.")
        vae.add_module("packing", Packing(mean, variance))
    return vae.requires_grad_(False).eval()


def _vae_names(path: Path, header: Header) -> dict[str, str]:
    """The names of the VAE's tensors in the file, by their names in a VAE's own."""
    for prefix in _PREFIXES:
        if f"{prefix}decoder.conv_in.weight" in header and f"{prefix}encoder.conv_in.weight" in header:
            break
    else:
        raise ValueError(
            f"{path} has no VAE with an encoder and a decoder (first of its tensors: {listed(header)}): give a VAE "
            "file, or a checkpoint that has one built in."
        )
    own = {name[len(prefix) :]: name for name in header if name.startswith(prefix)}
    unknown = [held for name, held in own.items() if not name.startswith((*_PARTS, *_OF_TRAINING))]
    if unknown:
        raise ValueError(
            f"{path} has tensors beside its VAE's that may change what it makes ({listed(unknown)}): give a file "
            "without them, or the VAE of a model that is known here."
        )
    names: dict[str, str] = {}
    for name, held in own.items():
        dtype, _ = header[held]
        if name.startswith(_OF_TRAINING) or name == "bn.num_batches_tracked":
            continue
        if dtype not in FLOATS:
            raise ValueError(
                f"{path}: {short(held)} is of type {short(dtype, 20)}: float32, float16 or bfloat16 can be used."
            )
        inside = next((part for part in _INSIDE if name.startswith(part)), "")
        names[_INSIDE.get(inside, "") + name[len(inside) :]] = held
    return names


def _cast(path: Path, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`. Raises ValueError where it holds NaN or infinity, which would be those of every picture."""
    cast = value.to(dtype)
    if not cast.isfinite().all():
        if value.isfinite().all():
            raise ValueError(f"{path}: {short(name)} has values that {dtype} cannot hold: use float32 or bfloat16.")
        raise ValueError(f"{path}: {short(name)} holds NaN or infinity: it is damaged, download or export it again.")
    return cast


def _groups(path: Path) -> int:
    """The groups of the norms of the VAE in the file. Raises ValueError where its metadata names no number of them."""
    said = read_metadata(path).get(GROUPS_NAME, str(_GROUPS))
    if not re.fullmatch(r"[1-9][0-9]{0,3}", said):
        raise ValueError(
            f"{path} says that its norms have {short(said, 20)} groups: leave {GROUPS_NAME} out of its metadata for "
            f"{_GROUPS}, or say a number from 1 on."
        )
    return int(said)


def _detect(path: Path, shapes: Shapes, groups: int) -> tuple[str, dict[str, Any]]:
    """Layout ("ldm" or "diffusers") of a VAE's tensors, and the `AutoencoderKL` configuration their shapes show.

    groups: of its norms.
    """
    layout = next((name for name, (block, _) in _LAYOUTS.items() if block.format(0, 0) in shapes), None)
    if layout is None:
        raise ValueError(f"{path} has a VAE that is laid out neither as LDM's nor as diffusers': use an image VAE.")
    block, attention = _LAYOUTS[layout]
    levels = list(takewhile(shapes.__contains__, (block.format(level, 0) for level in count())))
    layers = len(list(takewhile(shapes.__contains__, (block.format(0, layer) for layer in count()))))
    first, last, inner = "encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.conv_in.weight"
    odd = [name for name in (first, last, inner, *levels) if len(shapes.get(name, ())) != 4 or 0 in shapes[name]]
    if not odd:
        odd = [name for name in levels if shapes[name][0] % groups]
        odd += [name for name, channels in ((first, shapes[first][1]), (last, shapes[last][0])) if channels != 3]
    if odd:
        raise ValueError(
            f"{path} has a VAE of another kind ({short(odd[0], 60)} has the shape {shape_of(shapes.get(odd[0], ()))}): "
            f"one for RGB images, with channels in multiples of {groups}, is needed."
        )
    latent = shapes[inner][1]
    quant, post_quant = (f"{part}weight" in shapes for part in (_QUANT, _POST_QUANT))
    if quant != post_quant:
        there, missing = (_QUANT, _POST_QUANT) if quant else (_POST_QUANT, _QUANT)
        raise ValueError(
            f"{path} has {there}weight and no {missing}weight, which belong together: it is incomplete, download or "
            "export it again."
        )
    _check_norm(path, shapes, latent)
    return layout, _config(
        [shapes[name][0] for name in levels],
        layers,
        latent=latent,
        norm_num_groups=groups,
        use_quant_conv=quant,
        use_post_quant_conv=post_quant,
        mid_block_add_attention=attention in shapes,
    )


def _check_norm(path: Path, shapes: Shapes, latent: int) -> None:
    """Raises ValueError for a batch norm of the latent that is not Flux.2's, which packs 2x2 pixels into one."""
    found = {name: shape for name, shape in shapes.items() if name.startswith(_NORM)}
    wanted = dict.fromkeys((_MEAN, _VARIANCE), (latent * SIDE**2,))
    if found and found != wanted:
        held = ", ".join(f"{short(name, 40)} {shape_of(shape)}" for name, shape in list(found.items())[:2])
        raise ValueError(
            f"{path} normalises its latent in another way than Flux.2's VAE (it has {held}): {_MEAN} and {_VARIANCE} "
            f"of {latent * SIDE**2} channels each can be used."
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


def _from_ldm(state: State, levels: int) -> State:
    """The tensors of an LDM VAE by diffusers' names; LDM counts the decoder's levels from the image's side."""

    def renamed(name: str) -> str:
        for pattern, replacement in _LDM_NAMES:
            name = re.sub(pattern, replacement, name, flags=re.ASCII)
        return re.sub(r"(?<=\.up_blocks\.)\d{1,3}", lambda level: str(levels - 1 - int(level[0])), name)

    return {renamed(name): value for name, value in state.items()}


def _today(state: State) -> State:
    """Attention as diffusers has it since 0.18: published VAEs still have `query` and `proj_attn`, LDM convolutions."""
    pattern = re.compile(rf"(?<=attentions\.0\.)({'|'.join(_OLD_ATTENTION)})(?=\.)")
    renamed = {pattern.sub(lambda match: _OLD_ATTENTION[match[0]], name): value for name, value in state.items()}
    return {
        name: value.flatten(1) if ".attentions.0.to_" in name and value.dim() > 2 else value
        for name, value in renamed.items()
    }


def _check_state(path: Path, state: State, vae: AutoencoderKL) -> None:
    """Raises ValueError unless `state` has exactly the tensors of `vae`, in its shapes."""
    expected = vae.state_dict()
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        what, names = ("lacks", missing) if missing else ("has tensors that no such VAE has:", unknown)
        raise ValueError(f"{path} {what} {listed(sorted(names))}: it is incomplete, or a VAE of another kind.")
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"{path}: {name} has the shape {shape_of(state[name].shape)} where {list(value.shape)} is needed: it "
                "is a VAE of another kind."
            )
