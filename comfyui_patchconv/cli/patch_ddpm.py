"""`patchconv patch-ddpm sample | train | import`."""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ..files.atomic import check_no_input
from ..files.images import save_image
from ..files.tensors import existing
from ..pixel_models.patch_ddpm.checkpoints import import_torch, load, save
from ..pixel_models.patch_ddpm.config import Config, DiffusionConfig
from ..pixel_models.patch_ddpm.diffusion import SAMPLERS, sample
from ..pixel_models.patch_ddpm.model import PatchDenoiser
from ..pixel_models.training.images import derived_seed
from ..terminal import watched
from .arguments import DTYPES, device, natural, path_of, seed
from .options import add_trust
from .outputs import check_folder, check_output

_WRITTEN = {"checkpoints": ("model-last.pt", "model-last.safetensors"), "samples": ()}
"""Folders that a training writes to, and the files in them that it writes again and again."""


_MOST_SAMPLES = 10**8
"""Whose names have eight digits, and are in order."""


def add(commands: Any) -> None:
    """Add the command to `commands`, an argparse parser's subparsers."""
    text = "images by a U-Net that works patch by patch"
    jobs = commands.add_parser("patch-ddpm", help=text, description=text).add_subparsers(
        required=True, metavar="sample | train | import", dest="job"
    )
    _add_sample(jobs.add_parser("sample", help="noise to images", description=_sample.__doc__))
    _add_train(jobs.add_parser("train", help="a folder of images to a model", description=_train.__doc__))
    _add_import(jobs.add_parser("import", help="the authors' files to ours", description=_import.__doc__))


def _add_sample(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--out-dir",
        type=path_of,
        required=True,
        help="folder for sample-00000000.png and so on; each replaces what is there once it is whole",
    )
    parser.add_argument("--n-samples", type=natural, default=16, help="images (default: %(default)s)")
    parser.add_argument("--batch-size", type=natural, default=64, help="images at once (default: %(default)s)")
    parser.add_argument("--steps", type=natural, help="default: as many as the model was trained with")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ancestral", help="default: %(default)s")
    parser.add_argument(
        "--patches-at-once", type=natural, default=0, help="of each image; 0 for as many as fit (default)"
    )
    parser.add_argument("--seed", type=seed, help="default: another one each time")
    parser.add_argument("--device", type=device, help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.set_defaults(
        run=_sample, less_memory="a smaller --batch-size or --patches-at-once, --dtype bfloat16, or --device cpu"
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=path_of, required=True, help="JSON with model, diffusion and trainer")
    parser.add_argument(
        "--restart-step", type=natural, help="step to go on from; 1 to begin anew (default: the last that was saved)"
    )
    add_trust(parser)
    parser.set_defaults(run=_train, less_memory="a smaller trainer.train_batch_size in the file of --config")


def _add_import(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--out",
        type=path_of,
        required=True,
        help=".safetensors file to write, which replaces what is there once it is whole",
    )
    parser.set_defaults(run=_import, less_memory="a machine with more of it")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", type=path_of, required=True, help="model-*.pt of a training, or a .safetensors file")
    parser.add_argument("--config", type=path_of, help="JSON of the training, for a file that does not hold it")
    add_trust(parser)


def _config(path: Path) -> Config:
    try:
        return Config.from_json(existing(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text: give the configuration's JSON file.") from None


def _model(args: argparse.Namespace) -> tuple[PatchDenoiser, DiffusionConfig]:
    path = existing(args.ckpt)
    config = _config(args.config) if args.config else None
    return load(path, config) if path.suffix.lower() == ".safetensors" else import_torch(path, config, trust=args.trust)


def _sample(args: argparse.Namespace) -> None:
    """Sample images. For several devices: accelerate launch -m comfyui_patchconv.cli patch-ddpm sample …"""
    if not args.n_samples or not args.batch_size:
        raise ValueError("there is no image to sample: use an --n-samples and a --batch-size of 1 or more.")
    if args.n_samples > _MOST_SAMPLES:
        raise ValueError(f"--n-samples is {args.n_samples}: use {_MOST_SAMPLES} or less, as many as names have digits.")
    names = (_name(number) for number in range(args.n_samples))
    check_folder(args.out_dir, names, "--out-dir", parents=True)
    model, diffusion = _model(args)
    steps = diffusion.timesteps if args.steps is None else args.steps
    if not 1 <= steps <= diffusion.timesteps:
        raise ValueError(f"--steps is {steps}: use 1 to {diffusion.timesteps}, as many as the model was trained with.")
    process, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    where = args.device or _device_of_process()
    model = model.to(where, DTYPES[args.dtype])
    drawn = _drawn_seed(processes) if args.seed is None else args.seed
    args.out_dir.mkdir(parents=True, exist_ok=True)
    starts = range(0, args.n_samples, args.batch_size)[process::processes]
    if process == 0:
        print(f"{args.n_samples} images with seed {drawn}")
    from tqdm import tqdm

    with tqdm(total=len(starts) * steps, unit="step", disable=process > 0 or not watched()) as bar:
        for start in starts:
            count = min(args.batch_size, args.n_samples - start)
            generator = torch.Generator().manual_seed(derived_seed(drawn, start))
            shape = (count, model.config.channels, *model.config.image_sides)
            images = sample(
                model,
                diffusion,
                torch.randn(shape, generator=generator).to(where),
                steps=steps,
                sampler=args.sampler,
                generator=generator,
                patches_at_once=args.patches_at_once,
                on_step=lambda *_: bar.update(),
            )
            for number, image in enumerate(images, start):
                save_image(args.out_dir / _name(number), image * 2 - 1)


def _name(number: int) -> str:
    return f"sample-{number:08}.png"


def _drawn_seed(processes: int) -> int:
    """A seed that is another one each time, and the same in all processes."""
    held = [random.randrange(2**32)]
    if processes > 1:
        distributed.init_process_group("gloo")
        distributed.broadcast_object_list(held)
        distributed.destroy_process_group()
    return held[0]


def _device_of_process() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _train(args: argparse.Namespace) -> None:
    """Train a model. Run again after an interruption, it goes on from the last checkpoint. For several devices:
    accelerate launch -m comfyui_patchconv.cli patch-ddpm train …"""
    from ..pixel_models.patch_ddpm.train import train

    config = _config(args.config)
    if config.trainer is not None:
        check_folder(Path(config.trainer.log_dir), ("loss.csv",), "trainer.log_dir", parents=True)
        for name, inside in _WRITTEN.items():
            check_folder(Path(config.trainer.log_dir, name), inside, "a folder in trainer.log_dir", parents=True)
    train(config, args.restart_step, args.trust)


def _import(args: argparse.Namespace) -> None:
    """Write a checkpoint of the authors' trainer as one of ours, with its configuration: what the nodes load."""
    check_output(args.out, ".safetensors")
    check_no_input(args.out, (args.ckpt, args.config))
    model, diffusion = _model(args)
    save(model, diffusion, args.out)
    weights = sum(weight.numel() for weight in model.parameters()) / 1e6
    print(f"{args.out}: {weights:.1f} M weights, divider {model.config.patch_divider}")
