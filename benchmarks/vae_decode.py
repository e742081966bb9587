"""Decoding with the SD VAE: eager, `patch_conv`, ours, diffusers' tiling, and both hosts, in fresh processes.

    python benchmarks/vae_decode.py [--sizes 512 1024] [--rounds 3] [--device cuda] [--dtype float16] [--methods …]

with the hosts that the environment names: ComfyUI's two decode nodes with COMFYUI_PATH and COMFYUI_PYTHON,
Automatic1111's decode and Tiled VAE with WEBUI_PATH, WEBUI_PYTHON and TILED_VAE_PATH, a checkout of its extension.

The VAE is AutoencoderKL at full width with seeded random weights. Peak is memory beyond the loaded model and the
latent. The error is the largest difference to eager (for a host to its own decode), relative to the range of eager's
output. `patch_conv` acts from 2^30 input elements only, which a decode of 1024² never reaches; the row "threshold 0"
is with that limit removed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from harness import latent_of, publish, rounds
from safetensors.torch import save_file
from single_conv import patch_conv_module

from comfyui_patchconv import convert_model
from comfyui_patchconv.files.vae import load_vae, random_vae
from comfyui_patchconv.memory.recorder import Recorder
from comfyui_patchconv.streaming import streamed

METHODS = {
    "eager": "eager",
    "patch_conv": "patch_conv 0.0.1b0, 4 splits",
    "patch_conv_0": "patch_conv, 4 splits, threshold 0",
    "ours_4": "ours, 4 splits",
    "ours": "ours, automatic",
    "streamed": "ours, streamed",
    "diffusers_tiled": "diffusers enable_tiling",
}
TILE = 512
"""Pixels; the default of both hosts' tiling."""

COMFYUI = {
    "comfyui": "ComfyUI VAE Decode",
    "comfyui_ours": "ComfyUI VAE Decode + Patch Conv",
    "comfyui_streamed": "ComfyUI VAE Decode + Patch Conv, stream",
    "comfyui_tiled": "ComfyUI VAE Decode (Tiled)",
}
WEBUI = {
    "webui": "Automatic1111",
    "webui_streamed": "Automatic1111 + Patch Conv, stream",
    "webui_tiled": "Automatic1111 + Tiled VAE",
}


def decoder(
    method: str, weights: str, device: str, dtype: torch.dtype, tile: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What decodes a latent `[1, 4, H, W]` to an image `[1, 3, 8H, 8W]` by `method`.

    weights: the VAE's file. tile: pixels, for tiling.
    """
    vae: Any = load_vae(weights, dtype, device)
    if method == "ours":
        convert_model(vae.decoder, splits=0, predicate=lambda *_: True)
    elif method == "ours_4":
        convert_model(vae.decoder, splits=4, predicate=lambda *_: True)
    elif method == "streamed":
        vae.decoder.forward = streamed(vae.decoder.forward)
    elif method == "diffusers_tiled":
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // 8
    elif method == "patch_conv":
        from patch_conv import convert_model as convert_with_peer

        convert_with_peer(vae.decoder, splits=4)
    elif method == "patch_conv_0":
        replace_convolutions(vae.decoder, patch_conv_module().PatchConv2d)
    return lambda latent: vae.decode(latent, return_dict=False)[0]


def replace_convolutions(model: torch.nn.Module, wrapper: Any) -> None:
    """What `patch_conv.convert_model` does, with a wrapper of a changed threshold."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Conv2d) and min(child.kernel_size) > 1 and not isinstance(module, wrapper):
                setattr(module, name, wrapper(splits=4, conv2d=child))


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """One decode in this process; the image goes to a file for comparison."""
    latent = latent_of(case).to(case["device"], getattr(torch, case["dtype"]))
    decode = decoder(case["method"], case["vae"], case["device"], latent.dtype, case["tile"])
    with torch.inference_mode():
        decode(latent[..., :8, :8])  # the libraries' own start-up
        with Recorder(case["device"]) as record:
            image = decode(latent)
    torch.save(image.float().cpu(), case["image"])
    return {"peak": record.peak, "seconds": [record.seconds]}


def difference(path: Path, eager: Path) -> str:
    image, reference = (torch.load(file, weights_only=True) for file in (path, eager))
    return f"{(image - reference).abs().max() / (reference.max() - reference.min()):.1e}"


def commands_of(methods: Iterable[str]) -> list[list[str]]:
    """What decodes by each: this script, or for a host the one that runs in COMFYUI_PYTHON or WEBUI_PYTHON."""
    scripts = {"COMFYUI_PYTHON": "comfyui_decode.py", "WEBUI_PYTHON": "webui_decode.py"}
    hosts = {
        name: [os.environ.get(name, sys.executable), str(Path(__file__).with_name(script))]
        for name, script in scripts.items()
    }
    of = {**dict.fromkeys(COMFYUI, "COMFYUI_PYTHON"), **dict.fromkeys(WEBUI, "WEBUI_PYTHON")}
    return [hosts[of[method]] if method in of else [sys.executable, __file__] for method in methods]


def base_of(method: str) -> str:
    """The eager decode that a method is compared with."""
    return "comfyui" if method in COMFYUI else "webui" if method in WEBUI else "eager"


def row(result: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """The cells of one method, behind its name: figures beside those of `base`, and a cell for the error."""
    if "error" in result or "error" in base:
        return [result.get("error", "no eager result"), "", "", "", ""]
    return [
        f"{result['peak'] / 1e6:.0f}",
        f"{result['peak'] / base['peak']:.2f}",
        f"{result['seconds']:.1f}",
        f"{result['seconds'] / base['seconds']:.2f}",
        "",
    ]


def versions(comfyui: str | None, webui: str | None) -> dict[str, str]:
    """Versions of the hosts in these checkouts, and of the torch that Automatic1111 runs on, which may be another."""
    found = {}
    if comfyui:
        version = re.search(r'__version__ = "([^"]+)"', Path(comfyui, "comfyui_version.py").read_text(encoding="utf-8"))
        found["ComfyUI"] = version[1] if version else "unknown"
    if webui:
        version = re.search(r"## (\S+)", Path(webui, "CHANGELOG.md").read_text(encoding="utf-8"))
        found["Automatic1111"] = version[1] if version else "unknown"
        asked = [os.environ.get("WEBUI_PYTHON", sys.executable), "-c", "import torch; print(torch.__version__)"]
        found["its torch"] = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, *COMFYUI, *WEBUI], help="default: all that are there"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    comfyui, webui, extension = (os.environ.get(f"{name}_PATH") for name in ("COMFYUI", "WEBUI", "TILED_VAE"))
    labels = METHODS | (COMFYUI if comfyui else {}) | (WEBUI if webui else {})
    if not extension:
        labels.pop("webui_tiled", None)
    if args.methods:
        labels = {method: label for method, label in labels.items() if method in args.methods}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "vae.safetensors")
        save_file(random_vae(0).state_dict(), weights)
        for size in args.sizes:
            images = {method: Path(folder, f"{method}-{size}.pt") for method in labels}
            shared = dict(
                device=args.device, dtype=args.dtype, size=size, tile=TILE, vae=str(weights), extension=extension
            )
            cases = [
                shared | dict(method=method, image=str(image), checkout=webui if method in WEBUI else comfyui)
                for method, image in images.items()
            ]
            results = dict(zip(labels, rounds(cases, commands_of(labels), args.rounds)))
            for method, result in results.items():
                eager = base_of(method)
                cells = row(result, results.get(eager, {"error": "not run"}))
                if cells[1]:
                    cells[-1] = difference(images[method], images[eager])
                rows.append([f"{size}²", labels[method], *cells])
    publish(
        "vae_decode",
        "Decoding with Stable Diffusion's VAE",
        "Peak is memory beyond the weights and the latent. The error is the largest difference to eager, for a host "
        "to its own decode, relative to the range of the image; the weights are random, which makes tiling look worse "
        f"than trained ones do. {args.dtype}, median of {args.rounds} interleaved rounds of fresh processes.",
        ["image", "method", "peak MB", "memory / eager", "s", "time / eager", "largest error"],
        rows,
        device=args.device,
        bars=["peak MB", "s"],
        packages=["diffusers", "patch_conv"],
        versions=versions(comfyui, webui),
        environment=["COMFYUI_PATH", "COMFYUI_PYTHON", "WEBUI_PATH", "WEBUI_PYTHON", "TILED_VAE_PATH"],
    )


if __name__ == "__main__":
    main()
