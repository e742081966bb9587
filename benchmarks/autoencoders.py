"""What streaming does for every autoencoder that ComfyUI can load: memory counted at the size that people use, the
error and what was evaluated whole of a narrow one that ran.

    COMFYUI_PATH=… COMFYUI_PYTHON=… python benchmarks/autoencoders.py [NAMES …] [--device meta]

COMFYUI_PATH is a checkout, COMFYUI_PYTHON the Python that runs it, this one by default. A class that the checkout has
not is left out, and so are the halves of sounds that need torchaudio where that cannot be imported.
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

HEAD = [
    "family", "what", "half", "size", "eager MB", "streamed MB", "memory / eager", "within a quarter MB", "error",
    "evaluated whole",
]  # fmt: skip


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """Of each family that is asked for, its halves by the name of their method, or the error in its way; of what the
    checkout has not, nothing."""
    torch.set_num_threads(1)
    sys.path[:0] = [os.environ["COMFYUI_PATH"]]
    prepare()
    sys.argv = ["autoencoders", "--cpu", *FLAGS]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("comfy.sd")

    def load(name: str) -> Any:
        return importlib.import_module(f"comfyui_patchconv.{name}")

    found: dict[str, Any] = {}
    for family in FAMILIES:
        if case["names"] and family.name not in case["names"]:
            continue
        for method in halves(family):
            try:
                one = row(load, family, method, case["device"])
            except NotHereError as error:
                print(error, file=sys.stderr, flush=True)
                break
            except Exception as error:
                one = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            print(f"{family.name} {method} -> {one}", file=sys.stderr, flush=True)
            found.setdefault(family.name, {})[method] = one
    return found


def cells(family: Family, method: str, found: dict[str, Any]) -> list[str]:
    """The cells of one half."""
    head = [family.name, family.what, method, family.size]
    other = "" if found.get("device") != "cpu" else " (for a CPU)"
    if "error" in found:
        return [*head, found["error"], *[""] * 5]
    if found["in_strips"] is None:
        return [*head, "", "left alone: it has no convolution", *[""] * 4]
    eager, streamed = found["eager"], found["streamed"]
    figures = [f"{eager / 1e6:.0f}{other}", f"{streamed / 1e6:.0f}" if found["in_strips"] else "as eager"]
    whole = sorted({*found["whole"], *found["ran"]["whole"]})
    ratio, tight = f"{streamed / eager:.2f}", f"{found['tight'] / 1e6:.0f}"
    return [*head, *figures, ratio, tight, f"{found['ran']['error']:.0e}", ", ".join(whole) or "nothing"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES", help="such as Mochi; all by default")
    parser.add_argument(
        "--device", default="meta", help="to count for: cpu, cuda, or meta, a GPU that is not here; default: meta"
    )
    parser.add_argument("--name", default="autoencoders", help="of what is kept; default: autoencoders")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    if "COMFYUI_PATH" not in os.environ:
        parser.error("COMFYUI_PATH is not set: it names the ComfyUI checkout whose classes are counted.")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    found = run_fresh(dict(names=args.names, device=args.device), [python, __file__])
    if "error" in found:
        parser.exit(1, f"{found['error']}\n")
    families = [family for family in FAMILIES if family.name in found]
    rows = [cells(family, method, one) for family in families for method, one in found[family.name].items()]
    publish(
        args.name,
        "Every autoencoder that ComfyUI can load",
        "MB beside the weights, counted for a GPU at the size and in the type that people use, as Patch Conv "
        "(VAE) streams it, without a budget and with one of a quarter of eager's: nothing was run at these sizes. The "
        "error is that of a narrow one with random weights that ran in strips on a CPU in float32, relative to the "
        "range of eager's result. The last column names the operators that streaming evaluates whole.",
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
