"""One sampling step of a patch-based DDPM, by the number of patches; each case in fresh processes, in turn.

    python benchmarks/patch_ddpm.py [--sizes 128 256] [--dividers 1 2 4 8] [--batch 1] [--rounds 1] [--device cuda]

The published model of CelebA, 126.85 million parameters at 4 x 4 patches, with random weights. A divider of 1 is the
model that works on the whole image. "all at once" is how the authors' code runs, "one by one" is `patches_at_once=1`;
A step is one call of the model. "peak" is memory beyond the weights, with what the library's convolutions lay out anew
in it, weights too; "tensors" is counted: the most bytes of tensors alive at once. Time is of a second step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from harness import publish, rounds

from comfyui_patchconv.hosts.eager_needs import made_like
from comfyui_patchconv.memory.recorder import Recorder
from comfyui_patchconv.pixel_models.patch_ddpm.config import ModelConfig
from comfyui_patchconv.pixel_models.patch_ddpm.model import PatchDenoiser
from comfyui_patchconv.streaming import peak_activations


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """Peak and seconds of a step, and a checksum of what it gives, in this process."""
    device, size = torch.device(case["device"]), case["size"]
    torch.manual_seed(0)
    model = PatchDenoiser(ModelConfig(128, patch_divider=case["divider"], image_size=size)).to(device).eval()
    image = torch.randn(case["batch"], 3, size, size).to(device)
    steps = torch.full((case["batch"],), 500, device=device)

    @torch.inference_mode()
    def step() -> float:
        return float(model(image, steps, case["at_once"]).double().abs().mean())

    with Recorder(device) as record:
        checksum = step()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    tensors = peak_activations(
        model, lambda copy, make: copy(*made_like((image, steps), make), case["at_once"]), device=device
    )
    return {"peak": record.peak, "seconds": [seconds], "checksum": checksum, "tensors": tensors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--dividers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    cases = [
        dict(device=args.device, size=size, batch=args.batch, divider=divider, at_once=at_once)
        for size in args.sizes
        for divider in args.dividers
        for at_once in sorted({divider**2, 1}, reverse=True)
    ]
    found = rounds(cases, [[sys.executable, __file__]] * len(cases), args.rounds)
    whole = {case["size"]: result for case, result in zip(cases, found) if case["divider"] == 1}
    rows = [row(case, result, whole.get(case["size"], {})) for case, result in zip(cases, found)]
    publish(
        "patch_ddpm",
        "Patch-based DDPM: a sampling step",
        f"The published CelebA model (126.85 M parameters at 4 x 4) with random weights, float32, batch {args.batch}. "
        "Peak beyond the weights, with what convolutions work in; tensors are counted, the most bytes alive at once. "
        f"Fresh processes, {args.rounds} of each, in turn.",
        ["image", "patches", "method", "tensors MB", "tensors / whole", "peak MB", "peak / whole", "s", "time / whole"],
        rows,
        device=args.device,
        bars=["tensors MB", "peak MB", "s"],
    )


def row(case: dict[str, Any], result: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    divider = case["divider"]
    method = "whole image" if divider == 1 else "one by one" if case["at_once"] == 1 else "all at once"
    shown = [f"{case['size']}²", f"{divider} x {divider}", method]
    if "error" in result:
        return [*shown, result["error"], *[""] * 5]
    for kind, unit, digits in (("tensors", 1e6, 0), ("peak", 1e6, 0), ("seconds", 1, 2)):
        value = result[kind]
        shown += [f"{value / unit:.{digits}f}", f"{value / whole[kind]:.2f}" if kind in whole else ""]
    return shown


if __name__ == "__main__":
    main()
