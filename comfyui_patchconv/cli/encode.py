"""`patchconv encode`: images to latents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..files.images import IMAGES, load_image
from ..files.latents import save_latent
from ..files.tensors import existing
from ..files.vae import load_vae, medium_of
from ..memory.recorder import Recorder
from .arguments import DTYPES
from .options import Choices, add_conversion, inputs_of, of_folder, run_options, say
from .outputs import Outputs
from .processes import Processes, device_of, of_all, processes_of
from .vae import Halves, scale


def add(commands: Any) -> None:
    """Add the command to `commands`, an argparse parser's subparsers."""
    parser = commands.add_parser("encode", help="images to latents", description=_run.__doc__)
    add_conversion(parser, "--image", "PNG, JPEG, WebP …", ".latent to write, which ComfyUI's LoadLatent reads")
    parser.set_defaults(
        run=_run, less_memory="a smaller --budget with --mode stream, --dtype bfloat16, or --device cpu"
    )


def _run(args: argparse.Namespace) -> int:
    """Encode images to ComfyUI's .latent: what VAEEncode and SaveLatent would make, in less memory."""
    device = device_of(args.device)
    with processes_of(args.spread, args.image, device) as processes:
        return _encode(args, device, processes)


def _encode(args: argparse.Namespace, device: torch.device, processes: Processes) -> int:
    options, images = run_options(args, processes), inputs_of(args.image, args.vae, *IMAGES)
    if medium_of(args.vae, args.trust) == "sound":
        raise ValueError(
            f"--vae is {args.vae}, which is of sounds: encode takes images, give the VAE of an image model."
        )
    outputs = Outputs(
        args.out, images, [args.vae], ".latent", ".safetensors", overwrite=args.overwrite, folder=of_folder(args.image)
    )
    if len(images) == 1:
        existing(images[0])
    vae = load_vae(args.vae, DTYPES[args.dtype], device, args.trust)
    halves = Halves(vae, options)

    def one(path: Path) -> None:
        (name,) = processes.as_first_has_it(lambda: outputs.of(path))
        if name is None:
            return
        image = load_image(path, multiple=scale(vae))
        choices = Choices()
        with Recorder(vae.device) as recorder:
            latent = halves.encode(image, choices)
        if not latent.isfinite().all():
            raise ValueError(f"{name} is not written, the latent holds NaN or infinity: use float32 or bfloat16.")
        if processes.writes:
            save_latent(name, latent)
        say(f"{name}: {list(latent.shape)}", recorder, choices)

    return of_all(processes, images, one)
