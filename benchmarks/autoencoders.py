"""What streaming does for every autoencoder that ComfyUI can load: memory counted at the size that people use, the
error and what was evaluated whole of a narrow one that ran.

    COMFYUI_PATH=… COMFYUI_PYTHON=… python benchmarks/autoencoders.py [NAMES …] [--device cuda]

COMFYUI_PATH is a checkout, COMFYUI_PYTHON the Python that runs it, this one by default. A class that the checkout has
not is left out. Each is counted and run in a process of its own, with random weights; no device is needed to count for
it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "tests" / "comfyui"),
]

import torch
from families import (  # pyright: ignore[reportMissingImports]
    FAMILIES,
    Family,
    NotHereError,
    halves,
)
from harness import publish, run_fresh
from launch import prepare  # pyright: ignore[reportMissingImports]
from table import FLAGS, row  # pyright: ignore[reportMissingImports]

HEAD = ["family", "what", "half", "size", "eager MB", "streamed MB", "memory / eager", "error", "evaluated whole"]


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """The halves of one family, by the name of their method; nothing where the checkout has none."""
    torch.set_num_threads(1)
    sys.path[:0] = [os.environ["COMFYUI_PATH"]]
    prepare()
    sys.argv = ["autoencoders", "--cpu", *FLAGS]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("comfy.sd")
    family = next(one for one in FAMILIES if one.name == case["name"])

    def load(name: str) -> Any:
        return importlib.import_module(f"comfyui_patchconv.{name}")

    try:
        return {method: row(load, family, method, case["device"]) for method in halves(family)}
    except NotHereError as error:
        print(error, file=sys.stderr)
        return {}


def cells(family: Family, method: str, found: dict[str, Any]) -> list[str]:
    """The cells of one half."""
    head = [family.name, family.what, method, family.size]
    if found["in_strips"] is None:
        return [*head, "", "left alone: it has no convolution", *[""] * 3]
    eager, streamed = found["eager"], found["streamed"]
    figures = [f"{eager / 1e6:.0f}", f"{streamed / 1e6:.0f}" if found["in_strips"] else "as eager"]
    whole = sorted({*found["whole"], *found["ran"]["whole"]})
    return [*head, *figures, f"{streamed / eager:.2f}", f"{found['ran']['error']:.0e}", ", ".join(whole) or "nothing"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES", help="such as Mochi; all by default")
    parser.add_argument("--device", default="cuda", help="to count for; default: cuda")
    parser.add_argument("--name", default="autoencoders", help="of what is kept; default: autoencoders")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    if "COMFYUI_PATH" not in os.environ:
        parser.error("COMFYUI_PATH is not set: it names the ComfyUI checkout whose classes are counted.")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    rows = []
    for family in FAMILIES:
        if args.names and family.name not in args.names:
            continue
        found = run_fresh(dict(name=family.name, device=args.device), [python, __file__])
        print(f"  {family.name} -> {found}", file=sys.stderr, flush=True)
        if "error" in found:
            rows.append([family.name, family.what, "", family.size, found["error"], *[""] * 4])
            continue
        rows += [cells(family, method, one) for method, one in found.items()]
    publish(
        args.name,
        "Every autoencoder that ComfyUI can load",
        "MB beside the weights, counted for a CUDA device at the size and in the type that people use, as Patch Conv "
        "(VAE) streams it: nothing was run at these sizes. The error is that of a narrow one with random weights that "
        "ran in strips on a CPU in float32, relative to the range of eager's result. The last column names the "
        "operators that streaming evaluates whole.",
        HEAD,
        rows,
        device="cpu",
        versions={"ComfyUI": version()},
        environment=["COMFYUI_PATH", "COMFYUI_PYTHON"],
    )


def version() -> str:
    """Of the checkout."""
    text = Path(os.environ["COMFYUI_PATH"], "comfyui_version.py").read_text(encoding="utf-8")
    return text.rpartition("=")[2].strip().strip('"')


if __name__ == "__main__":
    main()
