"""`patchconv decode`: a latent to an image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files.images import save_image
from ..files.latents import load_latent
from ..files.vae import load_vae
from ..memory.recorder import Recorder
from .arguments import DTYPES
from .options import add_mode, add_strips, check_output, default_device, say, strips_of
from .vae import check_channels, decode


def add(commands: Any) -> None:
    """Add the command to `commands`, an argparse parser's subparsers."""
    parser = commands.add_parser("decode", help="a latent to an image", description=_run.__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="VAE or checkpoint, LDM or diffusers layout")
    parser.add_argument("--latent", type=Path, required=True, help="ComfyUI's .latent, or a safetensors tensor")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write; numbered if the latent is a batch")
    add_strips(parser)
    add_mode(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    """Decode a latent to a PNG: the picture that the host would make, in less memory."""
    strips = strips_of(args)
    check_output(args.out, ".png")
    latent = load_latent(args.latent)
    vae = load_vae(args.vae, DTYPES[args.dtype], args.device or default_device())
    check_channels(vae, latent, args.latent)
    for number, sample in enumerate(latent, 1):
        name = args.out if len(latent) == 1 else args.out.with_stem(f"{args.out.stem}-{number:04}")
        with Recorder(vae.device) as recorder:
            image = decode(vae, sample[None], strips)[0]
        save_image(name, image)
        say(f"{name}: {image.shape[2]}x{image.shape[1]}", recorder)
