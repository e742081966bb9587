"""Stable Diffusion's full width around the small VAE of the demo, so that a host loads it: every channel many times.

    python benchmarks/widened.py OUT.safetensors [--dtype float16]

What hosts load has Stable Diffusion's widths, and 32 groups in a norm. The small VAE has fewer groups: each is there
several times, and in it each channel. That changes neither mean nor variance, and convolutions that read copies divide
by their number: the same function, but for rounding, at the memory and the time of the full width. The file has the
names of Stable Diffusion's own code: Automatic1111 knows no others.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1])]

import torch
from torch import Tensor
from vae_helpers import ldm_state  # pyright: ignore[reportMissingImports]

from comfyui_patchconv.cli.demo import SMALL_VAE
from comfyui_patchconv.files.tensors import save_tensors
from comfyui_patchconv.files.vae import load_vae, random_vae

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

_GROUPS = 32


def widened(small: AutoencoderKL) -> AutoencoderKL:
    """Stable Diffusion's VAE at full width that computes what `small` does.

    small: of Stable Diffusion's kind, of one width at all levels, with as many blocks a level or fewer, and with a
    number of groups that divides 32. Raises ValueError for another.
    """
    wide = random_vae()
    widths, groups = small.config["block_out_channels"], small.config["norm_num_groups"]
    if len(set(widths)) > 1 or widths[0] > 4 * groups or _GROUPS % groups:
        raise ValueError(
            f"the VAE has the widths {widths} and {groups} groups: one width at all levels, of up to 4 channels a "
            f"group, and a number of groups that divides {_GROUPS} can be widened."
        )
    held = small.state_dict()
    made = {name: _tensor(name, value, held, widths[0], groups) for name, value in wide.state_dict().items()}
    wide.load_state_dict(made)
    return wide


def _tensor(name: str, like: Tensor, held: dict[str, Tensor], width: int, groups: int) -> Tensor:
    """The tensor `name` of the wide VAE, in the shape of `like`."""
    if name in held:
        small = held[name]
    elif ".conv_shortcut." in name:  # from one number of copies to another
        small = torch.eye(width)[..., None, None] if name.endswith("weight") else torch.zeros(width)
    else:  # a block that the small VAE has not: nothing is added to what it is given
        return torch.zeros_like(like)
    for axis in range(min(small.dim(), 2)):
        if small.shape[axis] != like.shape[axis]:
            copied = _copied(like.shape[axis], small.shape[axis], groups)
            small = small.index_select(axis, copied) / (like.shape[axis] // small.shape[axis] if axis else 1)
    if ".to_q." in name or ".to_k." in name:  # their product is divided by the root of their channels
        small = small / (like.shape[0] / width) ** 0.25
    return small.to(like)


def _copied(count: int, width: int, groups: int) -> Tensor:
    """Which of the `width` channels, in `groups`, each of `count` channels in 32 groups is a copy of."""
    channel, own, of = torch.arange(count), count // _GROUPS, width // groups
    return channel // own * groups // _GROUPS * of + channel % own * of // own


def save(path: Path, vae: Path = SMALL_VAE, dtype: torch.dtype = torch.float32) -> None:
    """Write the VAE in the file `vae`, widened, for any host. Raises ValueError as `widened` does."""
    state = ldm_state(widened(load_vae(vae)))
    save_tensors(path, {name: value.to(dtype) for name, value in state.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vae", type=Path, default=SMALL_VAE, help="default: the demo's")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float32")
    args = parser.parse_args()
    save(args.out, args.vae, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
