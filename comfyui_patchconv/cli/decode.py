"""`patchconv decode`: latents to images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..files.images import save_image
from ..files.latents import load_latent
from ..files.tensors import existing
from ..files.vae import load_vae
from ..memory.recorder import Recorder
from .arguments import DTYPES
from .options import Choices, add_conversion, inputs_of, of_folder, say, strips_of
from .outputs import Outputs
from .team import Team, device_of, of_all, team_of
from .vae import check_channels, decode


def add(commands: Any) -> None:
    """Add the command to `commands`, an argparse parser's subparsers."""
    parser = commands.add_parser("decode", help="latents to images", description=_run.__doc__)
    add_conversion(
        parser,
        "--latent",
        "ComfyUI's .latent, or safetensors files of one tensor",
        "PNG to write, numbered if a latent is a batch",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Decode latents to PNGs: the pictures that the host would make, in less memory."""
    device = device_of(args.device)
    with team_of(args.spread, args.latent, device) as team:
        return _decode(args, device, team)


def _decode(args: argparse.Namespace, device: torch.device, team: Team) -> int:
    strips, latents = strips_of(args, team), inputs_of(args.latent, args.vae, ".latent", ".safetensors")
    outputs = Outputs(args.out, latents, [args.vae], ".png", overwrite=args.overwrite, folder=of_folder(args.latent))
    if len(latents) == 1:
        existing(latents[0])
    vae = load_vae(args.vae, DTYPES[args.dtype], device, args.trust)

    def one(path: Path) -> None:
        latent = load_latent(path)
        check_channels(vae, latent, path)
        for name, sample in zip(team.as_first_has_it(lambda: outputs.of(path, len(latent))), latent):
            if name is None:
                continue
            choices = Choices()
            with Recorder(vae.device) as recorder:
                image = decode(vae, sample[None], strips, choices)[0]
            if team.writes:
                save_image(name, image)
            say(f"{name}: {image.shape[2]}x{image.shape[1]}", recorder, choices)

    return of_all(team, latents, one)
