"""Streaming a video: Wan 2.1's decoder run eagerly, by diffusers' tiles, and ours, in fresh processes.

    python benchmarks/streaming_video.py [--frames 9] [--size 256] [--rounds 2] [--device cuda] [--dtype bfloat16]

The VAE is AutoencoderKLWan at full width with seeded random weights. It decodes a latent frame, four frames of the
video, at a time; "at once" streams all of its decode, "by chunks" its decoder, call by call. Peak is memory beyond the
loaded model and the latent, "expected" what the plan said. Errors are differences to eager, relative to its range.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from harness import publish, rounds
from streaming import errors, measured, row

from comfyui_patchconv.streaming import expect, stream

METHODS = {
    "eager": "eager",
    "tiled": "diffusers enable_tiling, 128²",
    "chunks": "ours, streamed by chunks",
    "at_once": "ours, streamed at once",
}


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """One decode in this process; the result goes to a file for comparison."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    torch.manual_seed(0)
    device, dtype = torch.device(case["device"]), getattr(torch, case["dtype"])
    vae: Any = AutoencoderKLWan()
    vae = vae.to(device, dtype).eval()
    side = case["size"] // 8
    latent = torch.randn(1, 16, 1 + case["frames"] // 4, side, side).to(device, dtype)
    if case["method"] == "tiled":
        vae.enable_tiling(128, 128, 96, 96)
    part = {"chunks": "decoder.forward", "at_once": "_decode"}.get(case["method"])
    expected = 0

    def work(value: torch.Tensor) -> torch.Tensor:
        return vae.decode(value, return_dict=False)[0]

    with torch.inference_mode():
        work(latent[..., :8, :8])  # the libraries' own start-up
        if part is None:
            result, record, own = measured(work, latent, case["device"])
        else:
            expected = expect(
                vae, lambda copy, make: copy.decode(make(latent.shape, dtype)).sample, device=device, part=part
            ).peak
            owner, _, name = part.rpartition(".")
            with stream(getattr(vae.get_submodule(owner), name)):
                result, record, own = measured(work, latent, case["device"])
    torch.save(result.double().cpu(), case["result"])
    return {"peak": record.peak, "own": own, "expected": expected, "seconds": [record.seconds]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int, default=256, help="of a frame, in pixels (default: %(default)s)")
    parser.add_argument("--frames", type=int, nargs="+", default=[9])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for frames in args.frames:
            results = {method: Path(folder, f"{method}-{frames}.pt") for method in args.methods}
            shared = dict(device=args.device, dtype=args.dtype, size=args.size, frames=frames)
            cases = [shared | dict(method=method, result=str(path)) for method, path in results.items()]
            figures = rounds(cases, [[sys.executable, __file__]] * len(cases), args.rounds)
            for method, found in zip(args.methods, figures):
                rows.append([str(frames), METHODS[method], *row(found, figures[0])])
                if "error" not in found and "error" not in figures[0]:
                    rows[-1][-2:] = errors(results[method], results[args.methods[0]])
    what = ["peak MB", "own MB", "expected MB", "memory / eager", "s", "time / eager"]
    publish(
        "streaming_video",
        f"Streaming: decode of a video, {args.size}², {args.dtype}",
        "Wan 2.1's VAE, random weights. Peak is memory beyond the weights and the latent, own the part of it that is "
        "the process's own, expected what was counted beforehand; errors are differences to the first row, relative to "
        f"its range. Median of {args.rounds} interleaved rounds of fresh processes.",
        ["frames", "method", *what, "largest error", "mean error"],
        rows,
        device=args.device,
        bars=["peak MB", "s"],
        packages=["diffusers"],
    )


if __name__ == "__main__":
    main()
