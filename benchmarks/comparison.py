"""Draws docs/comparison.png: one photograph decoded eagerly, in tiles and in strips, and what the last two differ by.

    COMFYUI_PATH=… COMFYUI_PYTHON=… python benchmarks/comparison.py [--size 512] [--tile 256] [--device cuda]

Without COMFYUI_PATH diffusers alone is compared. The VAE is the demo's at Stable Diffusion's full width (`widened.py`):
hosts load no other width. The photograph is the demo's, which the VAE was not trained on.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from harness import ROOT, machine, rounds
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from vae_decode import commands_of
from widened import widened

from comfyui_patchconv.cli.demo import PHOTOGRAPH, SMALL_VAE
from comfyui_patchconv.cli.side_by_side import GAIN, Column, draw
from comfyui_patchconv.files.images import save_picture
from comfyui_patchconv.files.latents import load_latent
from comfyui_patchconv.files.vae import load_vae

COLUMNS = {
    "comfyui": "ComfyUI, VAE Decode",
    "eager": "eager",
    "comfyui_tiled": "ComfyUI, VAE Decode (Tiled)",
    "diffusers_tiled": "diffusers, enable_tiling",
    "comfyui_streamed": "Patch Conv, stream",
    "streamed": "Patch Conv, stream",
}
"""From left to right; the first that is there is what the others are compared with."""


MIDDLE = 38, 84
"""Row and column of the raccoon's face in the latent."""


def part(latent: Tensor, side: int) -> Tensor:
    """A square of the latent `[1, C, H, W]`, `side` of its pixels wide, with the raccoon's face in the middle."""
    top, left = (max(min(at - side // 2, n - side), 0) for at, n in zip(MIDDLE, latent.shape[2:]))
    return latent[..., top : top + side, left : left + side].contiguous()


def decoded(args: argparse.Namespace, methods: list[str], folder: Path) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """The image `[3, H, W]` by each of the methods, each in a process of its own, and what was measured there."""
    weights, file = folder / "vae.safetensors", folder / "latent.pt"
    save_file(widened(load_vae(SMALL_VAE)).state_dict(), weights)
    torch.save(part(load_latent(PHOTOGRAPH), args.size // 8), file)
    shared: dict[str, Any] = dict(device=args.device, dtype="float32", tile=args.tile)
    shared |= dict(latent=str(file), vae=str(weights), checkout=os.environ.get("COMFYUI_PATH"))
    cases = [shared | dict(method=method, image=str(folder / f"{method}.pt")) for method in methods]
    measured = rounds(cases, commands_of(methods), 1)
    for case, found in zip(cases, measured):
        if "error" in found:
            raise SystemExit(f"comparison.py: {case['method']}: {found['error']}")
    images = [torch.load(case["image"], weights_only=True)[0] for case in cases]
    # ComfyUI's images are from 0 to 1.
    images = [
        image * 2 - 1 if method.startswith("comfyui") else image.clamp(-1, 1) for method, image in zip(methods, images)
    ]
    return dict(zip(methods, zip(images, measured)))


def picture(found: dict[str, tuple[Tensor, dict[str, Any]]], args: argparse.Namespace) -> Image.Image:
    """The images in a row, below each a closer look, and below each but the first how it differs from eager's."""
    columns: list[Column] = []
    for method in (method for method in COLUMNS if method in found):
        image, measured = found[method]
        caption = f"{measured['peak'] / 1e6:.0f} MB"
        reference = columns[0].image if columns else None
        columns.append(Column(COLUMNS[method], image, reference, caption, method.endswith("streamed")))
    height, width = columns[0].image.shape[1:]
    lines = (
        *(f"A photograph of {width}x{height} pixels,", f"tiles of {args.tile}. The VAE is a small one,"),
        *("brought to Stable Diffusion's width", "without changing what it computes.", ""),
        *("Above: what is framed, enlarged,", "where tiles change most.", ""),
        *("Beside: the difference to the", f"first, {GAIN} times. Errors are relative", "to the range of the image."),
    )
    note = "\n".join(lines)
    return draw(columns, note, foot=f"float32, peak of memory beyond the weights; {machine(args.device)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="pixels of a part's sides, up to 768 (%(default)s)")
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "comparison.png", help="default: docs/")
    args = parser.parse_args()
    host = ["comfyui", "comfyui_tiled", "diffusers_tiled", "comfyui_streamed"]
    methods = host if os.environ.get("COMFYUI_PATH") else ["eager", "diffusers_tiled", "streamed"]
    with tempfile.TemporaryDirectory() as folder:
        save_picture(args.out, picture(decoded(args, methods, Path(folder)), args))


if __name__ == "__main__":
    main()
