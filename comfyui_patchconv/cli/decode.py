"""`patchconv decode`: latents to images, videos and sounds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..files.latents import load_latent
from ..files.tensors import existing
from ..files.vae import load_vae, medium_of
from .arguments import DTYPES, rate
from .media import FORMATS, Decoding, check_installed, formats_of
from .options import add_conversion, inputs_of, of_folder, run_options
from .outputs import Outputs
from .processes import Processes, device_of, of_all, processes_of
from .vae import Halves, check_channels

LATENTS = (".latent", ".safetensors", ".pt")
"""What files of a folder are taken for latents."""


def add(commands: Any) -> None:
    """Add the command to `commands`, an argparse parser's subparsers."""
    parser = commands.add_parser("decode", help="latents to images, videos and sounds", description=_run.__doc__)
    add_conversion(
        parser,
        "--latent",
        "ComfyUI's .latent, or files of one tensor, .safetensors or .pt",
        "PNG to write, numbered if there are several; of a video PNG, MP4 or MKV; of a sound FLAC or WAV",
    )
    parser.add_argument(
        "--format",
        choices=sorted({suffix[1:] for suffixes in FORMATS.values() for suffix in suffixes}),
        help="of files in a FOLDER; default: png, and flac for sounds",
    )
    parser.add_argument(
        "--fps", type=rate, help="frames a second of an MP4 or MKV; default: what the VAE's model makes"
    )
    parser.set_defaults(
        run=_run, less_memory="a smaller --budget with --mode stream, --dtype bfloat16, or --device cpu"
    )


def _run(args: argparse.Namespace) -> int:
    """Decode latents to PNGs, videos or sounds: those that the host would make, in less memory."""
    device = device_of(args.device)
    with processes_of(args.spread, args.latent, device) as processes:
        return _decode(args, device, processes)


def _decode(args: argparse.Namespace, device: torch.device, processes: Processes) -> int:
    options, latents = run_options(args, processes), inputs_of(args.latent, args.vae, *LATENTS)
    medium = medium_of(args.vae, args.trust)
    formats = formats_of(medium, args.format)
    outputs = Outputs(args.out, latents, [args.vae], *formats, overwrite=args.overwrite, folder=of_folder(args.latent))
    if len(latents) == 1:
        existing(latents[0])
    check_installed(outputs.suffix_of(latents[0]))
    vae = load_vae(args.vae, DTYPES[args.dtype], device, args.trust)
    decoding = Decoding(Halves(vae, options), outputs, processes, args.fps)

    def one(path: Path) -> None:
        latent = load_latent(path, medium, args.trust)
        check_channels(vae, latent, path)
        decoding.of(path, latent)

    return of_all(processes, latents, one)
