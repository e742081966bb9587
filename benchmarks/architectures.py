"""What streaming does for every architecture of upscale models that `spandrel` has, small and with random weights.

    python benchmarks/architectures.py [NAMES …] [--size 256] [--rounds 1] [--full]

Each runs whole and streamed, in processes of their own, after a run at 64². Memory is what was measured beyond the
weights and the input; where eager takes only a few megabytes, what the libraries take beside it says little. `--full`
takes those of convolutions alone that a CPU computes in a minute, as published. Each row is kept as soon as it is
there; the rows of those that are not named stay as they were kept, where they are of the same size.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(Path(__file__).parents[1] / "tests")]

import torch
from harness import keep, kept_rows, publish, result_of, rounds
from upscale_architectures import ARCHITECTURES, FULL, first, made  # pyright: ignore[reportMissingImports]
from upscale_helpers import require_spandrel  # pyright: ignore[reportMissingImports]

from comfyui_patchconv.memory.recorder import Recorder
from comfyui_patchconv.streaming import Streamed, Tuning

HEAD = (
    "architecture", "eager MB", "streamed MB", "memory / eager", "eager s", "time / eager", "error", "evaluated whole",
)  # fmt: skip


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """One model in this process; the result goes to a file for comparison."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    require_spandrel()
    model = made(case["name"], case["full"])
    image = torch.rand(1, 3, case["size"], case["size"], generator=torch.Generator().manual_seed(0))
    runner = Streamed()
    with torch.inference_mode():
        model(image[..., :64, :64].clone())  # the libraries' own start-up, and ours
        if case["streamed"]:
            Streamed(tuning=Tuning(always=True)).call(model, (image[..., :64, :64].clone(),), {})
        with Recorder("cpu") as record:
            result = runner.call(model, (image,), {}) if case["streamed"] else model(image)
    torch.save(first(result).clone(), case["result"])
    return {"peak": record.peak, "seconds": [record.seconds], "whole": sorted(runner.report)}


def row(name: str, eager: dict[str, Any], ours: dict[str, Any], files: list[Path]) -> list[str]:
    """The cells of one architecture. name: as the table has it."""
    failed = [found["error"] for found in (eager, ours) if "error" in found]
    if failed:
        return [name, failed[0], *[""] * 6]
    expected, result = (torch.load(file, weights_only=True) for file in files)
    error = float((result - expected).abs().max() / (expected.max() - expected.min()))
    figures = [f"{eager['peak'] / 1e6:.0f}", f"{ours['peak'] / 1e6:.0f}", f"{ours['peak'] / eager['peak']:.2f}"]
    times = [f"{eager['seconds']:.1f}", f"{ours['seconds'] / eager['seconds']:.2f}"]
    return [name, *figures, *times, f"{error:.0e}", ", ".join(ours["whole"]) or "nothing"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES", help="such as ESRGAN.ESRGAN; all by default")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="as published, those of convolutions alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    table = {
        "name": "architectures",
        "title": f"Architectures of upscale models, {args.size}² input",
        "what": "Each at small widths with random weights, or full as published, run whole and streamed in a process "
        "of its own, on one thread. Memory is the peak beyond the weights and the input, the error is relative to the "
        "range of the result, and the last column names the operators that streaming evaluated whole.",
        "head": [*HEAD],
        "device": "cpu",
        "packages": ["spandrel"],
    }
    found = {kept[0]: kept for kept in kept_rows("architectures", table["title"])}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names or (FULL if args.full else ARCHITECTURES):
            files = [Path(folder, f"{streamed}.pt") for streamed in (False, True)]
            shared = dict(name=name, size=args.size, full=args.full)
            cases = [shared | dict(streamed=bool(number), result=str(file)) for number, file in enumerate(files)]
            eager, ours = rounds(cases, [[sys.executable, __file__]] * 2, args.rounds)
            shown = name.split(".")[1] + (", full" if args.full else "")
            found[shown] = row(shown, eager, ours, files)
            keep("architectures", result_of(**table, rows=_sorted(found)))
    publish(**table, rows=_sorted(found))


def _sorted(found: dict[str, list[str]]) -> list[list[str]]:
    return [found[name] for name in sorted(found, key=str.casefold)]


if __name__ == "__main__":
    main()
