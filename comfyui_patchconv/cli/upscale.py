"""`patchconv upscale`: pictures made larger by a model, without tiles."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.image_rows import READ, SUFFIXES, Picture, empty_levels, levels_of, open_picture, save_levels
from ..files.tensors import existing
from ..files.upscalers import load_upscaler
from ..hosts.streamed import StreamedForward
from ..hosts.upscale import check_model, name_of
from ..memory.recorder import Recorder
from ..memory.usage import free
from ..streaming import USUAL
from ..terminal import watched
from .arguments import DTYPES, device, path_of, size
from .line import cleared, percent
from .options import add_spread, add_trust, inputs_of, of_folder, say
from .outputs import Outputs, add_out
from .processes import Processes, device_of, of_all, processes_of

_SUPPORTED = {torch.float16: "supports_half", torch.bfloat16: "supports_bfloat16"}
"""What says whether a model can be computed in a precision."""


def add(commands: Any) -> None:
    """Add the command to `commands`, an argparse parser's subparsers."""
    parser = commands.add_parser("upscale", help="pictures made larger by a model", description=_run.__doc__)
    parser.add_argument(
        "--model",
        type=path_of,
        required=True,
        help="ESRGAN, RealESRGAN, SPAN …: what spandrel knows, .pth or .safetensors",
    )
    parser.add_argument(
        "--image",
        type=path_of,
        nargs="+",
        required=True,
        metavar="FILE",
        help="PNG, JPEG, WebP, TIFF …, or a folder of them; one that fails does not end the others",
    )
    add_out(parser, "PNG or TIFF to write, 8 or 16 bits a channel as the image has")
    parser.add_argument("--device", type=device, default=None, help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument(
        "--budget",
        type=size,
        help="memory beside the weights to stay within, such as 2GiB or 800MB; default: the most of what is free",
    )
    parser.add_argument(
        "--alpha",
        choices=("keep", "drop"),
        default="keep",
        help="keep: the alpha channel, smoothly scaled (default); drop: the colours alone",
    )
    add_trust(parser)
    add_spread(parser)
    parser.set_defaults(run=_run, less_memory="a smaller --budget, --dtype bfloat16, or --device cpu")


def _run(args: argparse.Namespace) -> int:
    """Upscale pictures with a model, each as a whole: no tiles, no seams."""
    where = device_of(args.device)
    with processes_of(args.spread, args.image, where) as processes:
        return _upscale(args, where, processes)


def _upscale(args: argparse.Namespace, where: torch.device, processes: Processes) -> int:
    images = inputs_of(args.image, args.model, *READ)
    outputs = Outputs(args.out, images, [args.model], *SUFFIXES, overwrite=args.overwrite, folder=of_folder(args.image))
    if len(images) == 1:
        existing(images[0])
    model = load_upscaler(args.model, args.trust)
    check_model(model)
    dtype = DTYPES[args.dtype]
    _check_precision(model, dtype)
    model.model.to(where, dtype)
    run = _Streamed(args, processes)

    def one(path: Path) -> None:
        (name,) = processes.as_first_has_it(lambda: outputs.of(path))
        if name is None:
            return
        picture = open_picture(path)
        with Recorder(where) as recorder:
            levels = run(model, picture, where, dtype)
            if processes.writes:
                save_levels(name, levels, picture, args.alpha == "keep")
        say(f"{name}: {levels.shape[3]}x{levels.shape[2]}", recorder)

    return of_all(processes, images, one)


def _check_precision(model: Any, dtype: torch.dtype) -> None:
    """Raises ValueError for a precision that the model does not support, and for channels that no picture has."""
    name = name_of(model)
    if dtype in _SUPPORTED and not getattr(model, _SUPPORTED[dtype], True):
        raise ValueError(f"This upscale model ({name}) does not support {str(dtype)[6:]}: use --dtype float32.")
    if model.input_channels not in (1, 3):
        raise ValueError(f"This upscale model ({name}) takes {model.input_channels} channels: choose one for 3 or 1.")


class _Streamed:
    """Upscales pictures as the options have it, for what `processes` does."""

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        self._budget, self._beside = args.budget or 0, processes.beside
        self._group = processes.group if processes.rows else None
        self._tuning = replace(USUAL, silent_seconds=float(args.silent_seconds))
        self._watched = watched() and processes.rank == 0 and (processes.rows or processes.count == 1)

    def __call__(self, model: Any, picture: Picture, where: torch.device, dtype: torch.dtype) -> Tensor:
        """The levels `[1, C, H, W]` of `picture`, upscaled; see `levels_of`."""
        channels, scale = model.input_channels, int(model.scale)
        levels = empty_levels((1, channels, scale * picture.height, scale * picture.width), picture.bits)

        def run(pixels: Tensor) -> None:
            # Computed where it is copied to, which is a file where it is large; what is returned would lie in memory.
            levels.copy_(levels_of(model(pixels), picture.bits))

        shown = percent if self._watched else None
        streamed = StreamedForward(run, self._budget, self._free, shown, group=self._group, tuning=self._tuning)
        with cleared() if self._watched else nullcontext():
            streamed(picture.pixels(channels).to(where, dtype))
        return levels

    def _free(self, device: torch.device) -> int:
        return free(device) // self._beside
