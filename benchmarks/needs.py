"""What Stable Diffusion's VAE needs on a GPU in half precision, calculated: eager, streamed, and within a budget.

    python benchmarks/needs.py [--sizes 1024 2048 4096 8192] [--budget 2GiB]

Nothing is computed and no GPU is needed: these are the feature maps as eager has them, and the plans' own figures. What
cuDNN works in, and what torch's allocator keeps, is in none of them. SDXL's VAE and Flux's have the same layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from harness import publish
from torch import Tensor

from comfyui_patchconv.files.vae import random_vae
from comfyui_patchconv.streaming import expect
from comfyui_patchconv.units import bytes_of, size_of


def decode(vae: Any, make: Callable[..., Tensor], size: int) -> Tensor:
    return vae.decode(make((1, 4, size // 8, size // 8))).sample


def encode(vae: Any, make: Callable[..., Tensor], size: int) -> Tensor:
    return vae.encode(make((1, 3, size, size))).latent_dist.mode()


def _in_gb(count: int) -> str:
    return f"{count / 1e9:.2f}" if count < 1e9 else f"{count / 1e9:.1f}"


def row(vae: Any, half: Callable[..., Tensor], size: int, budget: int) -> list[str]:
    def needed(within: Optional[int]) -> Any:
        run = partial(half, size=size)
        return expect(vae, run, device=torch.device("cuda"), dtype=torch.float16, budget=within)

    free, tight = needed(None), needed(budget)
    return [half.__name__, f"{size}²", *(_in_gb(each) for each in (free.eager, free.peak, tight.peak))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--budget", type=bytes_of, default=bytes_of("2GiB"))
    args = parser.parse_args()
    vae = random_vae()
    rows = [row(vae, half, size, args.budget) for half in (decode, encode) for size in args.sizes]
    publish(
        "needs",
        "What a decode and an encode need on a GPU, calculated",
        "Stable Diffusion's VAE in half precision, beyond the weights, in GB of 1000³ bytes, calculated from the "
        "shapes of feature maps; SDXL's and Flux's have the same. Eager is diffusers', whose "
        "activations are not in place.",
        ["half", "image", "eager GB", "stream GB", f"stream within {size_of(args.budget)}, GB"],
        rows,
        device="cpu",
        bars=["eager GB", "stream GB"],
    )


if __name__ == "__main__":
    main()
