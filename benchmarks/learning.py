"""That the two trainings learn: small models of landscapes drawn by code, on a CPU, as their command lines train them.

    python benchmarks/learning.py patch-diffusion
    python benchmarks/learning.py patch-ddpm

Each goes on from where it was interrupted, in --folder. They write the models of the example workflows, and pictures of
the loss and of samples into docs/.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import landscapes
import matplotlib
import numpy as np
import torch
from harness import machine
from PIL import Image

from comfyui_patchconv import cli
from comfyui_patchconv.files.images import grid, levels, load_image
from comfyui_patchconv.pixel_models.patch_ddpm import checkpoints as ddpm_checkpoints
from comfyui_patchconv.pixel_models.patch_ddpm.diffusion import sample as ddpm_sample
from comfyui_patchconv.pixel_models.patch_diffusion import checkpoints, diffusion
from comfyui_patchconv.pixel_models.training.loop import read_losses

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
IMAGES, SIZE, SHOWN = 4000, 64, 16


def train_patch_diffusion(folder: Path, images: Path) -> tuple[Path, list[Path]]:
    """The trained file, and the grids of samples on the way."""
    arguments = (
        "--config lsun_p4 --image_size 64 --num_channels 64 --channel_mult 1,1 --num_res_blocks 1 "
        "--attention_resolutions 8 --num_head_channels 32 --steps 2500 --learning_rate 1e-3 --warm_up 100 "
        "--ema_decay 0.95 --ema_every 10 --save_every 500 --workers 0"
    )
    _run("patch-diffusion", "train", str(images), "--out", str(folder), *arguments.split())
    return folder / "model.safetensors", sorted(folder.glob("samples-*.png"))


def train_patch_ddpm(folder: Path, images: Path) -> tuple[Path, list[Path]]:
    config = {
        "model": {"dim": 24, "dim_mults": [1, 2, 3], "patch_divider": 2, "image_size": 32},
        "diffusion": {"loss_type": "l2", "objective": "pred_x0"},
        "trainer": {
            "train_dataset_dir": str(images),
            "log_dir": str(folder),
            "train_batch_size": 16,
            "train_lr": 1e-3,
            "train_num_steps": 4000,
            "ema_decay": 0.99,
            "step_start_ema": 100,
            "save_and_sample_every": 500,
            "num_workers": 0,
            "seed": 0,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _run("patch-ddpm", "train", "--config", str(folder / "config.json"))
    return folder / "checkpoints" / "model-last.safetensors", sorted((folder / "samples").glob("*.png"))


def sample_patch_diffusion(path: Path) -> torch.Tensor:
    models = checkpoints.load(path)
    size, generator = models[0].config.image_size, torch.Generator().manual_seed(1)
    return diffusion.sample(models, torch.randn(SHOWN, 3, size, size, generator=generator), generator=generator)


def sample_patch_ddpm(path: Path) -> torch.Tensor:
    model, config = ddpm_checkpoints.load(path)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(SHOWN, 3, *model.config.image_sides, generator=generator)
    return ddpm_sample(model, config, noise, generator=generator) * 2 - 1


KINDS = {
    "patch-diffusion": (train_patch_diffusion, sample_patch_diffusion, "250 ancestral steps"),
    "patch-ddpm": (train_patch_ddpm, sample_patch_ddpm, "1000 ancestral steps"),
}
"""How to train and to sample."""


def picture(path: Path, losses: list[tuple[int, float]], panels: dict[str, np.ndarray], title: str) -> None:
    """The loss beside square pictures."""
    figure, axes = pyplot.subplots(1, 1 + len(panels), figsize=(4 + 3.4 * len(panels), 3.8), dpi=110)
    steps, values = zip(*losses)
    smooth = [math.exp(np.mean(np.log(values[max(0, end - 10) : end]))) for end in range(1, len(values) + 1)]
    axes[0].plot(steps, values, color="#c9d8ea", label="each 50 steps")
    axes[0].plot(steps, smooth, color="#1668c7", label="mean of ten")
    axes[0].set(yscale="log", xlabel="step", title="loss")
    axes[0].legend(frameon=False)
    for axis, (name, pixels) in zip(axes[1:], panels.items()):
        axis.imshow(pixels, interpolation="nearest")
        axis.set(title=name)
        axis.axis("off")
    figure.suptitle(title, fontsize=9, color="#555")
    figure.tight_layout()
    figure.savefig(path)


def _run(*arguments: str) -> None:
    if code := cli.main(arguments):
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--folder", type=Path, default=Path("learning"), help="default: %(default)s")
    args = parser.parse_args()
    train, sample, how = KINDS[args.kind]
    images, name = args.folder / "images", args.kind.replace("-", "_")
    if not images.exists():
        landscapes.write(images, IMAGES, SIZE)
    model, grids = train(args.folder / name, images)
    losses = read_losses(args.folder / name / "loss.csv")
    kept = ROOT / "example_workflows" / "models" / name / "landscapes.safetensors"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, kept)
    drawn = torch.stack([load_image(path, 1)[0] for path in sorted(images.iterdir())[:SHOWN]])
    panels = {
        f"{int(grid.stem.rpartition('-')[2])} steps": np.asarray(Image.open(grid)) for grid in (grids[0], grids[-1])
    }
    panels[f"{losses[-1][0]} steps, {how}"] = levels(grid(sample(kept))).numpy()
    panels["training images"] = levels(grid(drawn)).numpy()
    made = f"{kept.stat().st_size / 1e6:.1f} MB of weights; {machine('cpu')}"
    picture(ROOT / "docs" / f"learning_{name}.png", losses, panels, made)


if __name__ == "__main__":
    main()
