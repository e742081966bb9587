"""What one sampling step costs against the size of the patches: the network of `lsun_p4`, its widths the same for each.

    python benchmarks/patch_diffusion.py [--device cuda] [--rounds 3]

Multiplications are counted by torch; peak is memory beyond the weights, time the median of steps, each case in fresh
processes, in turn. The first row is what an image of 64 pixels costs without patches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from harness import publish, rounds
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from comfyui_patchconv.memory.recorder import Recorder
from comfyui_patchconv.pixel_models.patch_diffusion.config import PUBLISHED, Config
from comfyui_patchconv.pixel_models.patch_diffusion.diffusion import sample
from comfyui_patchconv.pixel_models.patch_diffusion.model import PatchUNet

SMALL, LARGE = 64, 256
CASES = [(SMALL, 1), (LARGE, 8), (LARGE, 4), (LARGE, 2), (LARGE, 1)]
"""Pixels of a side, and of a patch's."""


def config_of(size: int, patch: int, channels: int) -> Config:
    return replace(PUBLISHED["lsun_p4"], image_size=size, patch=patch, channels=channels)


def multiplications(config: Config) -> int:
    """Multiplications, with an addition each, of one forward pass for one image."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        PatchUNet(config)(torch.empty(1, 3, config.image_size, config.image_size), torch.zeros(1))
    return counter.get_total_flops() // 2


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """Peak of all steps and seconds of each but the first, which sets things up, in this process."""
    device, dtype = torch.device(case["device"]), getattr(torch, case["dtype"])
    model = PatchUNet(config_of(case["size"], case["patch"], case["channels"])).to(device, dtype).eval()
    noise = torch.randn(1, 3, case["size"], case["size"], generator=torch.Generator().manual_seed(0)).to(device)
    moments: list[float] = []

    def on_step(done: int, steps: int, image: Tensor) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())

    with torch.inference_mode(), Recorder(device) as record:
        sample([model], noise, steps=str(case["repeat"] + 1), on_step=on_step)
    return {"peak": record.peak, "seconds": [after - before for before, after in itertools.pairwise(moments)]}


def row(result: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """The cells of one case, behind those that were counted, beside those of the first."""
    if "error" in result:
        return [result["error"], "", "", ""]
    cells = []
    for name, digits, unit in (("peak", 0, 1e6), ("seconds", 2, 1)):
        cells += [f"{result[name] / unit:.{digits}f}", f"{result[name] / first[name]:.2f}" if first.get(name) else "-"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--channels", type=int, default=256, help="base width (default: the published %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--repeat", type=int, default=10, help="timed steps of the first case; of others as many as fit"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    counts = [multiplications(config_of(size, patch, args.channels)) for size, patch in CASES]
    cases = [
        dict(
            size=size,
            patch=patch,
            channels=args.channels,
            device=args.device,
            dtype=args.dtype,
            repeat=max(2, round(args.repeat * counts[0] / count)),
        )
        for (size, patch), count in zip(CASES, counts)
    ]
    found = rounds(cases, [[sys.executable, __file__]] * len(cases), args.rounds)
    rows = []
    for (size, patch), count, result in zip(CASES, counts, found):
        counted = [f"{size}²", str(patch), f"{count / 1e9:.1f}", f"{count / counts[0]:.2f}"]
        rows.append([*counted, *row(result, found[0])])
    publish(
        "patch_diffusion",
        "Patch Diffusion: a sampling step",
        "The network of lsun_p4 with its widths the same for each patch size P. Multiplications are counted; peak is "
        f"memory beyond the weights. Base width {args.channels}, {args.dtype}, batch of 1, median of {args.rounds} "
        "interleaved rounds of fresh processes.",
        ["image", "P", "GMAC", "GMAC / 64²", "peak MB", "memory / 64²", "s", "time / 64²"],
        rows,
        device=args.device,
        bars=["GMAC", "peak MB", "s"],
    )


if __name__ == "__main__":
    main()
