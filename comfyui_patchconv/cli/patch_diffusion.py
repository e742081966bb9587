"""`patchconv patch-diffusion sample | train | import`."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.atomic import check_no_input, write_whole
from ..files.images import grid, levels, save_image
from ..files.tensors import existing
from ..pixel_models.patch_diffusion.checkpoints import is_foreign, load_all, save
from ..pixel_models.patch_diffusion.config import PUBLISHED
from ..pixel_models.patch_diffusion.diffusion import sample, spaced
from ..pixel_models.patch_diffusion.loss import WEIGHTS
from ..pixel_models.patch_diffusion.model import PatchUNet
from ..terminal import watched
from .arguments import device, natural, number, path_of, seed
from .options import add_trust
from .outputs import check_folder, check_output

NAMES = {**PUBLISHED, **{name.replace("lsun", "church"): PUBLISHED[name] for name in PUBLISHED if "lsun" in name}}
"""The authors call a data set by either name."""

SECTIONS = "90,60,60,20,20"
"""Steps of each fifth of the noise, of the authors' modified stride."""

_POLICIES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SUFFIXES = {"fid": ".npz", "grid": ".png", "folder": ""}


def add(commands: Any) -> None:
    """Add the command to `commands`, an argparse parser's subparsers."""
    text = "images by a U-Net that works on patches of pixels"
    jobs = commands.add_parser("patch-diffusion", help=text, description=text).add_subparsers(
        required=True, metavar="sample | train | import", dest="job"
    )
    _add_sample(jobs.add_parser("sample", help="noise to images", description=_sample.__doc__))
    _add_train(jobs.add_parser("train", help="a folder of images to a model", description=_train.__doc__))
    _add_import(jobs.add_parser("import", help="the authors' files to ours", description=_import.__doc__))


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", type=device, metavar="DEVICE", help="gpu, cpu, mps, cuda:1 …")
    parser.add_argument(
        "action", choices=_SUFFIXES, metavar="ACTION", help="fid: an .npz; grid: one .png; folder: one .png an image"
    )
    parser.add_argument(
        "dataset", metavar="DATASET", help=f"a .safetensors file, or with --model_path one of {', '.join(NAMES)}"
    )
    parser.add_argument("num_images", type=natural, metavar="NUM_IMAGES")
    parser.add_argument(
        "save_path", type=path_of, metavar="SAVE_PATH", help="each file replaces what is there once it is whole"
    )
    parser.add_argument("--batch_size", type=natural, default=16, help="images at once (default: %(default)s)")
    parser.add_argument(
        "--timesteps",
        default="1000",
        help="steps: a number, numbers with commas for equal sections of the noise, or ddim50 (default: %(default)s)",
    )
    parser.add_argument(
        "--modified_stride",
        type=_boolean,
        nargs="?",
        const=True,
        default=False,
        help=f"as --timesteps {SECTIONS}: 250 steps, most of them where there is little noise",
    )
    parser.add_argument("--guidance", type=number, default=1.5, help="with classes (default: %(default)s)")
    parser.add_argument("--label", type=natural, help="class of every image (default: drawn for each)")
    parser.add_argument("--policy", choices=_POLICIES, default="fp32", help="default: %(default)s")
    parser.add_argument("--seed", type=seed, help="default: another one each time")
    parser.add_argument("--ddim", action="store_true", help="without fresh noise in each step")
    _add_model_path(parser)
    _add_model(parser)
    add_trust(parser)
    parser.set_defaults(run=_sample, less_memory="a smaller --batch_size, --policy bf16, or the DEVICE cpu")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data_dir", type=path_of, metavar="DATA_DIR", help="images, in any folders")
    parser.add_argument("--out", type=path_of, required=True, help="folder to write to, and to go on from")
    parser.add_argument("--config", choices=NAMES, default="lsun_p4", help="model (default: %(default)s)")
    parser.add_argument(
        "--class_cond", action="store_true", help="tell the model the class: the name of the folder in DATA_DIR"
    )
    parser.add_argument(
        "--label_dropout", type=number, default=0.1, help="share of images without (default: %(default)s)"
    )
    parser.add_argument("--weight_schedule", choices=WEIGHTS, default="sqrt_snr", help="default: %(default)s")
    parser.add_argument("--part", type=natural, help="of a configuration of several models; 0 for the least noise")
    parser.add_argument("--steps", type=natural, default=300_000, help="default: %(default)s")
    parser.add_argument("--batch_size", type=natural, default=32, help="of each device (default: %(default)s)")
    parser.add_argument("--accumulate", type=natural, default=1, help="batches a step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=number, default=1e-4, help="default: %(default)s")
    parser.add_argument("--beta2", type=number, default=0.99, help="Adam's (default: %(default)s)")
    parser.add_argument("--warm_up", type=natural, default=5000, help="steps (default: %(default)s)")
    parser.add_argument("--ema_decay", type=number, default=0.99, help="default: %(default)s")
    parser.add_argument("--ema_every", type=natural, default=100, help="steps (default: %(default)s)")
    parser.add_argument("--save_every", type=natural, default=1000, help="steps (default: %(default)s)")
    parser.add_argument(
        "--samples", type=natural, default=16, help="pictures at each save, of a whole model (default: %(default)s)"
    )
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="default: %(default)s")
    parser.add_argument("--workers", type=natural, default=2, help="processes that read images (default: %(default)s)")
    parser.add_argument("--no_mirror", action="store_true", help="never mirror an image")
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    _add_model(parser)
    add_trust(parser)
    parser.set_defaults(run=_train, less_memory="a smaller --batch_size with more of --accumulate")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", choices=NAMES, metavar="DATASET", help=", ".join(NAMES))
    parser.add_argument(
        "out",
        type=path_of,
        metavar="OUT",
        help=".safetensors file to write, which replaces what is there once it is whole",
    )
    _add_model_path(parser, required=True)
    _add_model(parser)
    add_trust(parser)
    parser.set_defaults(run=_import, less_memory="a machine with more of it")


def _add_model_path(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--model_path",
        type=lambda text: text.split(","),
        required=required,
        help="the model's file: .safetensors, the PyTorch port's .pt or the TensorFlow version's .h5; of several "
        "models all, with commas, that of the least noise first",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model", "what to change in the configuration, as the authors' port calls it")
    for flag, (field, kind, text) in _MODEL.items():
        group.add_argument(f"--{flag}", dest=f"config_{field}", type=kind, default=None, help=text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not True or False")
    return text.lower() == "true"


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(number(part) for part in text.split(",") if text)


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(natural(part) for part in text.split(",") if text)


def _beta_max(text: str) -> float:
    try:
        return number(text.removeprefix("linear") or "0.02")
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not linear, or linear0.025 and the like") from None


_MODEL: dict[str, tuple[str, Any, str]] = {
    "image_size": ("image_size", natural, "pixels of a side"),
    "patch_size": ("patch", natural, "pixels of a patch's side"),
    "num_channels": ("channels", natural, "base width"),
    "channel_mult": ("mults", _numbers, "widths of the levels, times it: 1,2,2"),
    "num_res_blocks": ("blocks", natural, "residual blocks of a level"),
    "classes": ("classes", natural, "number of classes; 0 for none"),
    "attention_resolutions": ("attention", _whole_numbers, "positions of a side: 16,8"),
    "num_head_channels": ("head_channels", natural, "width of an attention head; 0 for --num_heads"),
    "num_heads": ("heads", natural, "attention heads"),
    "use_new_attention_order": ("new_attention_order", _boolean, "True or False"),
    "learn_sigma": ("learn_sigma", _boolean, "True or False"),
    "dropout": ("dropout", number, "share"),
    "norm_eps": ("norm_eps", number, "1e-3 as trained in TensorFlow, 1e-5 as the port computes"),
    "noise_schedule": ("beta_max", _beta_max, "linear, linear0.025 …"),
    "snr_splits": ("snr_splits", _numbers, "where one model takes over from another"),
}


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    found = {field: getattr(args, f"config_{field}") for field, _, _ in _MODEL.values()}
    return {field: value for field, value in found.items() if value is not None}


def _sample(args: argparse.Namespace) -> None:
    """Sample images, and write them as the authors' scripts do."""
    if not args.num_images or not args.batch_size:
        raise ValueError("there is no image to sample: use a NUM_IMAGES and a --batch_size of 1 or more.")
    out = _output(args.save_path, args.action, args.num_images)
    check_no_input(out, [Path(args.dataset), *map(Path, args.model_path or ())], "SAVE_PATH")
    steps = SECTIONS if args.modified_stride else args.timesteps
    spaced(steps)
    models = [model.to(args.device, _POLICIES[args.policy]) for model in _models(args)]
    classes = models[0].config.classes
    if args.label is not None and args.label >= classes:
        raise ValueError(f"--label is {args.label} and the model has {classes} classes: use a smaller one, or none.")
    seed = random.randrange(2**32) if args.seed is None else args.seed
    generator = torch.Generator().manual_seed(seed)
    print(f"{args.num_images} images with seed {seed}")
    batches = _batches(models, steps, args, generator)
    if args.action == "folder":
        out.mkdir(exist_ok=True)
        for start, (images, _) in zip(range(0, args.num_images, args.batch_size), batches):
            for number, image in enumerate(images, start):
                save_image(out / _name(number), image)
        return
    if args.action == "grid":
        save_image(out, grid(torch.cat([images for images, _ in batches])))
    else:
        import numpy as np

        pixels, labels = zip(*((levels(images), labels) for images, labels in batches))
        arrays = [torch.cat(pixels).numpy()] + ([torch.cat(labels).numpy()] if classes else [])
        write_whole(out, lambda file: np.savez(file, *arrays))


def _name(number: int) -> str:
    return f"{number:06}.png"


def _output(path: Path, action: str, count: int) -> Path:
    """The path to write to, of so many images. Raises ValueError or OSError where that is impossible, before there is
    anything to lose."""
    if action != "folder" and path.suffix != _SUFFIXES[action] and path.name not in ("", ".."):
        path = path.with_name(path.name + _SUFFIXES[action])
    if action == "folder":
        check_folder(path, map(_name, range(count)), "SAVE_PATH")
    else:
        check_output(path, option="SAVE_PATH")
    return path


def _models(args: argparse.Namespace) -> list[PatchUNet]:
    if args.dataset in NAMES:
        if not args.model_path:
            raise ValueError(
                f"the weights that the authors published for {args.dataset} are lost: name a model of your own with "
                "--model_path, or a .safetensors file instead of the data set."
            )
        return _load(args, args.dataset)
    if args.model_path or _changes(args):
        raise ValueError(f"{args.dataset} says what model it is: leave out --model_path and the model's options.")
    return load_all([existing(args.dataset)])


def _load(args: argparse.Namespace, name: str) -> list[PatchUNet]:
    """The models of --model_path, where it is the authors' files with the configuration that `name` and options say."""
    paths, changes = [existing(path) for path in args.model_path], _changes(args)
    if changes and not any(map(is_foreign, paths)):
        raise ValueError(f"{paths[0]} says what model it is: leave out the model's options.")
    return load_all(paths, replace(NAMES[name], **changes), args.trust)


def _batches(
    models: list[PatchUNet], steps: str, args: argparse.Namespace, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images `[n, 3, H, W]` in -1..1 and their classes `[n]`, on the CPU, until there are as many as asked for."""
    from tqdm import tqdm

    config, count = models[0].config, args.num_images
    total = -(-count // args.batch_size) * len(spaced(steps))
    with tqdm(total=total, unit="step", disable=not watched()) as bar:
        for start in range(0, count, args.batch_size):
            number = min(args.batch_size, count - start)
            noise = torch.randn(number, 3, config.image_size, config.image_size, generator=generator)
            drawn = torch.randint(max(config.classes, 1), (number,), generator=generator)
            labels = drawn if args.label is None else torch.full_like(drawn, args.label)
            images = sample(
                models,
                noise.to(args.device),
                labels.to(args.device) if config.classes else None,
                steps=steps,
                guidance=args.guidance,
                ddim=args.ddim,
                generator=generator,
                on_step=lambda *_: bar.update(),
            )
            if images.isnan().any():
                raise ValueError(f"--policy is {args.policy} and gives NaN for an image: use bf16 or fp32.")
            yield images.cpu(), labels


def _train(args: argparse.Namespace) -> None:
    """Train a model on the images of a folder. Run again after an interruption, it goes on from the last save. For
    several devices: accelerate launch -m comfyui_patchconv.cli patch-diffusion train …"""
    from ..pixel_models.patch_diffusion.loss import Loss
    from ..pixel_models.patch_diffusion.train import LOSSES, MODEL, STATE, train
    from ..pixel_models.training.images import ImageFolder
    from ..pixel_models.training.loop import Options, begin

    check_folder(args.out, (MODEL, STATE, LOSSES), parents=True)
    changes = _changes(args)
    size = changes.get("image_size", NAMES[args.config].image_size)
    images = ImageFolder(args.data_dir, (size, size), labelled=args.class_cond, written=args.out)
    config = replace(NAMES[args.config], **{"classes": len(images.classes), **changes})
    if bool(config.classes) != args.class_cond or config.classes < len(images.classes):
        raise ValueError(
            f"--classes is {config.classes}, and --class_cond {'finds' if args.class_cond else 'is not given to find'} "
            f"the classes in {args.data_dir}{f', {len(images.classes)}' * args.class_cond}: leave out --classes."
        )
    options = Options(
        steps=args.steps,
        batch=args.batch_size,
        accumulate=args.accumulate,
        learning_rate=args.learning_rate,
        betas=(0.9, args.beta2),
        warm_up=args.warm_up,
        ema_decay=args.ema_decay,
        ema_every=args.ema_every,
        every=args.save_every,
        seed=args.seed,
        workers=args.workers,
        mirror=not args.no_mirror,
    )
    loss = Loss(config, args.weight_schedule, args.label_dropout, args.part)
    accelerator = begin(args.mixed_precision)
    classes = f", classes {', '.join(images.classes)}" if images.classes else ""
    accelerator.print(f"{len(images)} images{classes}")
    shown = 0 if config.snr_splits else args.samples
    train(images, args.out, config, options, loss, accelerator, shown, args.trust)


def _import(args: argparse.Namespace) -> None:
    """Write the authors' files as one of ours, with its configuration inside: what the ComfyUI nodes load."""
    check_output(args.out, ".safetensors", option="OUT")
    check_no_input(args.out, map(Path, args.model_path), "OUT")
    models = _load(args, args.config)
    save(models, args.out)
    print(f"{args.out}: {len(models)} x {sum(weight.numel() for weight in models[0].parameters()) / 1e6:.1f} M weights")
