"""`patchconv encode`: images to latents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files.images import load_image
from ..files.latents import save_latent
from ..files.tensors import existing
from ..files.vae import load_vae
from ..memory.recorder import Recorder
from .arguments import DTYPES
from .failures import each
from .options import Choices, add_conversion, default_device, say, strips_of
from .outputs import Outputs
from .vae import encode, scale


def add(commands: Any) -> None:
    """Add the command to `commands`, an argparse parser's subparsers."""
    parser = commands.add_parser("encode", help="images to latents", description=_run.__doc__)
    add_conversion(parser, "--image", "PNG, JPEG, WebP …", ".latent to write, which ComfyUI's LoadLatent reads")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Encode images to ComfyUI's .latent: what VAEEncode and SaveLatent would make, in less memory."""
    strips = strips_of(args)
    outputs = Outputs(args.out, args.image, [args.vae], ".latent", ".safetensors", overwrite=args.overwrite)
    if len(args.image) == 1:
        existing(args.image[0])
    vae = load_vae(args.vae, DTYPES[args.dtype], args.device or default_device(), args.trust)

    def one(path: Path) -> None:
        (name,) = outputs.of(path)
        if name is None:
            return
        image = load_image(path, multiple=scale(vae))
        choices = Choices()
        with Recorder(vae.device) as recorder:
            latent = encode(vae, image, strips, choices)
        if not latent.isfinite().all():
            raise ValueError(f"{name} is not written, the latent holds NaN or infinity: use float32 or bfloat16.")
        save_latent(name, latent)
        say(f"{name}: {list(latent.shape)}", recorder, choices)

    return each(args.image, one)
