"""`patchconv decode`: latents to images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files.images import save_image
from ..files.latents import load_latent
from ..files.tensors import existing
from ..files.vae import load_vae
from ..memory.recorder import Recorder
from .arguments import DTYPES
from .failures import each
from .options import Choices, add_conversion, default_device, say, strips_of
from .outputs import Outputs
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
    strips = strips_of(args)
    outputs = Outputs(args.out, args.latent, [args.vae], ".png", overwrite=args.overwrite)
    if len(args.latent) == 1:
        existing(args.latent[0])
    vae = load_vae(args.vae, DTYPES[args.dtype], args.device or default_device(), args.trust)

    def one(path: Path) -> None:
        latent = load_latent(path)
        check_channels(vae, latent, path)
        for name, sample in zip(outputs.of(path, len(latent)), latent):
            if name is None:
                continue
            choices = Choices()
            with Recorder(vae.device) as recorder:
                image = decode(vae, sample[None], strips, choices)[0]
            save_image(name, image)
            say(f"{name}: {image.shape[2]}x{image.shape[1]}", recorder, choices)

    return each(args.latent, one)
