"""`patchconv encode`: an image to a latent."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files.images import load_image
from ..files.latents import save_latent
from ..files.vae import load_vae
from ..memory.recorder import Recorder
from .arguments import DTYPES
from .options import add_mode, add_strips, check_output, default_device, say, strips_of
from .vae import encode, scale


def add(commands: Any) -> None:
    """Add the command to `commands`, an argparse parser's subparsers."""
    parser = commands.add_parser("encode", help="an image to a latent", description=_run.__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="VAE or checkpoint, LDM or diffusers layout")
    parser.add_argument("--image", type=Path, required=True, help="PNG, JPEG, WebP …")
    parser.add_argument("--out", type=Path, required=True, help=".latent to write, which ComfyUI's LoadLatent reads")
    add_strips(parser)
    add_mode(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    """Encode an image to ComfyUI's .latent: what VAEEncode and SaveLatent would make, in less memory."""
    strips = strips_of(args)
    check_output(args.out, ".latent", ".safetensors")
    vae = load_vae(args.vae, DTYPES[args.dtype], args.device or default_device())
    image = load_image(args.image, multiple=scale(vae))
    with Recorder(vae.device) as recorder:
        latent = encode(vae, image, strips)
    save_latent(args.out, latent)
    say(f"{args.out}: {list(latent.shape)}", recorder)
