"""Streaming with the SD VAE: eager, streamed, and streamed within a budget, in fresh processes.

    python benchmarks/streaming.py [--sizes 1024 2048] [--budget 1] [--rounds 3] [--encode] [--dtype bfloat16]
                                   [--methods exact eager streamed bounded] [--device cuda] [--name NAME]

The VAE is AutoencoderKL at full width with seeded random weights. Peak is memory beyond the loaded model and the input;
on the CPU "own" is the part of it that is the process's own (anonymous), without the pages of files, read every 10 ms.
"expected" is what the plan said. Ratios are to the first method but `exact`, which is eager in float64: errors are
relative to its range where it is run, else to that of the first.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from harness import publish, rounds
from torch import nn

from comfyui_patchconv.files.vae import random_vae
from comfyui_patchconv.memory.recorder import Recorder
from comfyui_patchconv.streaming import expect, stream

METHODS = {
    "exact": "eager, float64",
    "eager": "eager",
    "streamed": "ours, streamed",
    "bounded": "ours, streamed, {budget:g} GiB",
}


class Anonymous(threading.Thread):
    """The most anonymous memory of this process, in bytes beyond what it had at first; 0 where it cannot be read."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._end, self.peak, self._first = threading.Event(), 0, self._now()

    def run(self) -> None:
        while not self._end.wait(0.01):
            self.peak = max(self.peak, self._now() - self._first)

    def stop(self) -> int:
        self._end.set()
        self.join()
        return self.peak

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status")
        found = (
            re.search(r"^RssAnon:\s+(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE)
            if status.exists()
            else None
        )
        return int(found[1]) * 1024 if found else 0


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """One decode or encode in this process; the result goes to a file for comparison."""
    torch.manual_seed(0)
    dtype, size, eager = getattr(torch, case["dtype"]), case["size"], case["method"] in ("exact", "eager")
    vae: Any = random_vae(0, dtype, case["device"])
    module = vae.encoder if case["encode"] else vae.decoder
    shape = (1, 3, size, size) if case["encode"] else (1, 4, size // 8, size // 8)
    input = torch.rand(shape).mul(2).sub(1) if case["encode"] else torch.randn(shape)
    input = input.to(case["device"], dtype)
    if case["method"] == "exact":
        vae, input = nn.Module.to(vae, torch.float64), input.double()

    def work(value: torch.Tensor) -> torch.Tensor:
        return vae.encode(value).latent_dist.mode() if case["encode"] else vae.decode(value, return_dict=False)[0]

    budget = round(case["budget"] * 2**30) if case["method"] == "bounded" else None
    expected = 0
    with torch.inference_mode():
        work(input[..., :64, :64])  # the libraries' own start-up
        if eager:
            result, record, own = measured(work, input, case["device"])
        else:
            expected = expect(
                module, lambda copy, make: copy(make(input.shape, dtype)), device=input.device, budget=budget
            ).peak
            with stream(module, budget=budget):
                result, record, own = measured(work, input, case["device"])
    torch.save(result.double().cpu(), case["result"])
    return {"peak": record.peak, "own": own, "expected": expected, "seconds": [record.seconds]}


def measured(work: Any, input: torch.Tensor, device: str) -> tuple[torch.Tensor, Recorder, int]:
    with Recorder(device) as record:
        anonymous = Anonymous()
        anonymous.start()
        result = work(input)
        own = anonymous.stop()
    return result, record, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024])
    parser.add_argument("--budget", type=float, default=1.0, help="GiB of the bounded runs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encode", action="store_true", help="encode an image instead of decoding a latent")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["eager", "streamed"])
    parser.add_argument("--name", help="of the table that is kept (default: streaming or streaming_encode)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    rows, first = [], next((method for method in args.methods if method != "exact"), "exact")
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            results = {method: Path(folder, f"{method}-{size}.pt") for method in args.methods}
            shared = dict(device=args.device, dtype=args.dtype, size=size, budget=args.budget, encode=args.encode)
            cases = [shared | dict(method=method, result=str(path)) for method, path in results.items()]
            figures = rounds(cases, [[sys.executable, __file__]] * len(cases), args.rounds)
            done = {method: found for method, found in zip(args.methods, figures) if "error" not in found}
            base = done.get(first, {"error": ""})
            for method, found in zip(args.methods, figures):
                rows.append([f"{size}²", METHODS[method].format(budget=args.budget), *row(found, base)])
                if method in done and args.methods[0] in done:
                    rows[-1][-2:] = errors(results[method], results[args.methods[0]])
    work = "encode" if args.encode else "decode"
    what = ["peak MB", "own MB", "expected MB", f"memory / {first}", "s", f"time / {first}"]
    publish(
        args.name or ("streaming_encode" if args.encode else "streaming"),
        f"Streaming: {work}, {args.dtype}" + (f", within {args.budget:g} GiB" if "bounded" in args.methods else ""),
        "Stable Diffusion's VAE, random weights. Peak is memory beyond the weights and the input, own the part of it "
        "that is the process's own, expected what the plan said beforehand; errors are differences to the first row, "
        f"relative to its range. Median of {args.rounds} interleaved rounds of fresh processes.",
        ["image", "method", *what, "largest error", "mean error"],
        rows,
        device=args.device,
        bars=["peak MB", "s"],
        packages=["diffusers"],
    )


def errors(path: Path, reference: Path) -> list[str]:
    """Largest and root mean square difference, relative to the reference's range."""
    result, expected = (torch.load(file, weights_only=True) for file in (path, reference))
    difference, span = result - expected, expected.max() - expected.min()
    return [f"{value / span:.2e}" for value in (difference.abs().max(), difference.square().mean().sqrt())]


def row(found: dict[str, Any], base: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [found["error"], *[""] * 7]
    ratios = ["", ""] if "error" in base else [f"{found[key] / base[key]:.2f}" for key in ("peak", "seconds")]
    megabytes = [f"{found[key] / 1e6:.0f}" if found[key] else "" for key in ("peak", "own", "expected")]
    return [*megabytes, ratios[0], f"{found['seconds']:.1f}", ratios[1], "", ""]


if __name__ == "__main__":
    main()
