"""One convolution: eager, `patch_conv` and ours, each case in fresh processes, in turn.

    python benchmarks/single_conv.py [--device cuda] [--rounds 3]

Peak is memory beyond the input, in units of the output's bytes; time is relative to eager, by medians.
`patch_conv` acts from 2^30 input elements only; here its threshold is set to 0, as ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from harness import publish, rounds
from torch import nn

from comfyui_patchconv import convert_model
from comfyui_patchconv.memory.recorder import Recorder


def patch_conv_module() -> Any:
    """`patch_conv`'s own code, with its built-in threshold of 2^30 elements replaced by 0."""
    spec = importlib.util.find_spec("patch_conv.module")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("patch_conv is not installed: pip install patch_conv==0.0.1b0.")
    source = Path(spec.origin).read_text(encoding="utf-8")
    changed = source.replace("(1 << 30)", "0")
    assert changed != source, "patch_conv's threshold was not found in its source"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "patch_conv_without_threshold.py")
        path.write_text(changed, encoding="utf-8")
        changed_spec = importlib.util.spec_from_file_location(path.stem, path)
        assert changed_spec is not None
        assert changed_spec.loader is not None
        module = importlib.util.module_from_spec(changed_spec)
        changed_spec.loader.exec_module(module)
    return module


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """Peak of the first call and seconds of each, in this process."""
    device, dtype = torch.device(case["device"]), getattr(torch, case["dtype"])
    channels, size, kernel = case["channels"], case["size"], case["kernel"]
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2).to(device, dtype).requires_grad_(False)
    input = torch.empty(1, channels, size, size, dtype=dtype, device=device)
    input.copy_(torch.randn(1, channels, 1, size, generator=generator))
    model: nn.Module = nn.Sequential(conv)
    if case["method"] == "patch_conv":
        model = patch_conv_module().PatchConv2d(splits=case["splits"], conv2d=conv)
    elif case["method"] == "ours":
        convert_model(model, splits=case["splits"], threshold=0)
    if device.type == "cuda":  # the context and the libraries' handles are not the convolution's
        conv(input[..., :64, :64])
    seconds = []
    with torch.inference_mode(), Recorder(device) as record:
        output = model(input)
    size_bytes = output.numel() * output.element_size()
    del output
    seconds.append(record.seconds)
    for _ in range(case["repeat"]):
        start = time.perf_counter()
        with torch.inference_mode():
            model(input)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"peak": record.peak, "output": size_bytes, "seconds": seconds[1:] or seconds}


def row(result: dict[str, Any], eager: dict[str, Any]) -> list[str]:
    """The cells of one case, behind those that say what it is."""
    if "error" in result:
        return [result["error"], "", "", ""]
    return [
        f"{result['peak'] / 1e6:.0f}",
        f"{result['peak'] / result['output']:.3f}",
        f"{result['seconds']:.2f}",
        f"{result['seconds'] / eager['seconds']:.2f}" if "seconds" in eager else "-",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1, help="timed calls after the first one, in each process")
    parser.add_argument("--kernels", type=int, nargs="+")
    parser.add_argument("--splits", type=int, nargs="+", default=[16, 0], help="ours; patch_conv takes the first")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    if args.device == "cuda":  # the figures of patch_conv's README
        sizes, dtype, kernels = [(512, 2048), (256, 4096)], "float16", args.kernels or [3, 5, 7]
    else:
        sizes, dtype, kernels = [(64, 2048)], "float32", args.kernels or [3, 7]
    rows = []
    for channels, size in sizes:
        for kernel in kernels:
            case = dict(device=args.device, dtype=dtype, channels=channels, size=size, kernel=kernel)
            methods = [("eager", 1), ("patch_conv", args.splits[0]), *(("ours", splits) for splits in args.splits)]
            cases = [case | dict(method=m, splits=splits, repeat=args.repeat) for m, splits in methods]
            found = rounds(cases, [[sys.executable, __file__]] * len(cases), args.rounds)
            for (method, splits), result in zip(methods, found):
                label = method if method == "eager" else f"{method}, {splits or 'automatic'} splits"
                what = [f"{kernel}x{kernel}", f"{channels} -> {channels}, {size}²", label]
                rows.append([*what, *row(result, found[0])])
    publish(
        "single_conv",
        "One convolution",
        f"Peak is memory beyond the input, time relative to eager; {dtype}, median of {args.rounds} interleaved rounds "
        "of fresh processes. patch_conv acts from 2³⁰ input elements only: here its threshold is 0, as ours.",
        ["kernel", "shape", "method", "peak MB", "peak / output", "s", "time / eager"],
        rows,
        device=args.device,
        bars=["peak MB", "s"],
        packages=["patch_conv"],
    )


if __name__ == "__main__":
    main()
