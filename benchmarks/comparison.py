"""Draws docs/comparison.png: one decode run eagerly, in tiles and in strips, and ten times what the last two differ by.

    COMFYUI_PATH=… COMFYUI_PYTHON=… python benchmarks/comparison.py [--size 512] [--tile 256] [--device cuda]

Without COMFYUI_PATH diffusers alone is compared. The VAE has random weights, so the latent is a drawn landscape and the
colours of its decode mean nothing; the differences are those that each decode has to the eager one of the same host.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import landscapes
import matplotlib
import torch
from harness import ROOT, machine, rounds
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from vae_decode import commands_of

from comfyui_patchconv.files.vae import random_vae

matplotlib.use("Agg")
from matplotlib import pyplot

GAIN = 10
COLUMNS = {
    "comfyui": "ComfyUI, VAE Decode",
    "eager": "eager",
    "comfyui_tiled": "ComfyUI, VAE Decode (Tiled)",
    "diffusers_tiled": "diffusers, enable_tiling",
    "comfyui_streamed": "Patch Conv, stream",
    "streamed": "Patch Conv, stream",
}
"""From left to right; with ComfyUI its own eager and streamed decode are shown, without it the library's."""


def latent(size: int) -> Tensor:
    """A drawn landscape as a latent for an image of `size` pixels: its colours, then their mean, `[1, 4, H, W]`."""
    image = F.adaptive_avg_pool2d(landscapes.draw(landscapes.Scene(), 2 * size), size // 8)
    flat = ((image - image.mean((2, 3), keepdim=True)) / image.std((2, 3), keepdim=True)).tanh()
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([flat, flat.mean(1, keepdim=True)], 1) + 0.1 * noise[:, :1]


def decoded(args: argparse.Namespace, methods: list[str], folder: Path) -> dict[str, Tensor]:
    """The image `[3, H, W]` by each of the methods, each in a process of its own."""
    weights, file = folder / "vae.safetensors", folder / "latent.pt"
    save_file(random_vae(0).state_dict(), weights)
    torch.save(latent(args.size), file)
    shared: dict[str, Any] = dict(device=args.device, dtype="float32", size=args.size, tile=args.tile)
    shared |= dict(latent=str(file), vae=str(weights), checkout=os.environ.get("COMFYUI_PATH"))
    cases = [shared | dict(method=method, image=str(folder / f"{method}.pt")) for method in methods]
    for case, found in zip(cases, rounds(cases, commands_of(methods), 1)):
        if "error" in found:
            raise SystemExit(f"comparison.py: {case['method']}: {found['error']}")
    return {case["method"]: torch.load(case["image"], weights_only=True)[0] for case in cases}


def draw(images: dict[str, Tensor], args: argparse.Namespace, path: Path) -> None:
    """The images in a row, and below each but the first `GAIN` times its difference to eager."""
    with_host = "comfyui" in images
    shown = [method for method in COLUMNS if method in images and not (with_host and method in ("eager", "streamed"))]
    figure, axes = pyplot.subplots(2, len(shown), figsize=(3.3 * len(shown), 7.4), dpi=110, facecolor="white")
    for axis in axes.flat:
        axis.axis("off")
    for (top, bottom), method in zip(axes.T, shown):
        eager = images["comfyui" if method.startswith("comfyui") else "eager"]
        low, high = (eager.flatten(1).quantile(share, 1)[:, None, None] for share in (0.005, 0.995))
        top.set_title(COLUMNS[method], fontsize=11, fontweight="bold" if method.endswith("streamed") else "normal")
        top.imshow(((images[method] - low) / (high - low)).clamp(0, 1).movedim(0, -1), interpolation="nearest")
        if method == shown[0]:
            continue
        error = (images[method] - eager).abs() / (eager.max() - eager.min())
        bottom.imshow((GAIN * error).clamp(0, 1).movedim(0, -1), interpolation="nearest")
        bottom.set_title(f"largest error {error.max():.1e}", fontsize=10, color="#444")
    text = (
        f"Difference to eager, x {GAIN}\n\n{args.size}² pixels, tiles of {args.tile},\nStable Diffusion's VAE with\n"
        "random weights: the colours\nmean nothing, and tiles\nlook worse than with\ntrained ones.\n\n"
        "Errors are relative to the\nrange of the image."
    )
    axes[1, 0].text(0.02, 0.97, text, va="top", fontsize=11, color="#222", linespacing=1.35)
    figure.text(0.995, 0.008, machine(args.device), ha="right", fontsize=7, color="#777")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.955, bottom=0.03, wspace=0.03, hspace=0.1)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "comparison.png", help="default: docs/")
    args = parser.parse_args()
    methods = ["eager", "diffusers_tiled"]
    host = ["comfyui", "comfyui_tiled", "comfyui_streamed"]
    methods += host if os.environ.get("COMFYUI_PATH") else ["streamed"]
    with tempfile.TemporaryDirectory() as folder:
        draw(decoded(args, methods, Path(folder)), args, args.out)


if __name__ == "__main__":
    main()
