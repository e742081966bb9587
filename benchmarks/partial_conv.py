"""One partial convolution: `torch_pconv`, NVIDIA's and ours, each case in fresh processes, in turn.

    python benchmarks/partial_conv.py [--device cuda] [--batch 8] [--rounds 3] [--nvidia PATH/models/partialconv2d.py]

The layer of torch_pconv's README: 64 -> 128 channels, kernel 9, stride 1, padding 3, bias, 256², one mask per sample.
"peak" is memory beyond the layer and its input. "profiled" is what torch_pconv's README counts: the sum of all that is
allocated, which is not held at once. Time is of a second call. NVIDIA's code is not on PyPI: give its file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from harness import publish, rounds

from comfyui_patchconv import PConv2d
from comfyui_patchconv.memory.recorder import Recorder

LAYER: dict[str, Any] = dict(kernel_size=9, stride=1, padding=3, bias=True)
METHODS = ("torch_pconv", "nvidia", "ours", "ours, legacy")
PASSES = ("forward", "both")


def layer_of(method: str, nvidia: str) -> Any:
    """`layer(input, mask [N, H, W])` as `method` has it."""
    if method == "nvidia":
        spec = importlib.util.spec_from_file_location("partialconv2d", nvidia)
        assert spec is not None, nvidia
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.PartialConv2d(64, 128, multi_channel=True, return_mask=True, **LAYER)
    if method == "torch_pconv":
        import torch_pconv

        return torch_pconv.PConv2d(64, 128, **LAYER)
    return PConv2d(64, 128, **LAYER, legacy_behaviour=method == "ours, legacy")


def with_weights(layer: Any) -> Any:
    """The layer with weights that are the same for every method."""
    for name, parameter in layer.named_parameters():
        if "mask" not in name:
            values = torch.randn(parameter.numel(), generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.data.copy_(values.view_as(parameter).mul(0.01))
    return layer


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """Peak of the first call, seconds of the second, and the profiler's sum over a third, in this process."""
    device, batch = torch.device(case["device"]), case["batch"]
    layer = with_weights(layer_of(case["method"], case["nvidia"]).to(device))
    torch.manual_seed(1)
    input, mask = torch.randn(batch, 64, 256, 256).to(device), (torch.rand(batch, 256, 256) < 0.7).float().to(device)
    if case["method"] == "nvidia":
        mask = mask[:, None].expand(-1, 64, -1, -1)
    grad = case["work"] == "both"
    input.requires_grad_(grad)

    def call() -> torch.Tensor:
        with torch.set_grad_enabled(grad):
            output = layer(input, mask)[0]
            if grad:
                output.sum().backward()
                input.grad = None
                layer.zero_grad()
        return output.detach()

    with Recorder(device) as record:
        output = call()
    checksum = [float(output.double().sum()), float(output.double().abs().sum())]
    size = output.numel() * output.element_size()
    del output
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {
        "peak": record.peak,
        "seconds": [seconds],
        "output": size,
        "checksum": checksum,
        "profiled": profiled(call, device),
    }


def profiled(call: Any, device: torch.device) -> int:
    """Bytes allocated in all during one call, by PyTorch's profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        call()
    name = "self_device_memory_usage" if device.type == "cuda" else "self_cpu_memory_usage"
    return sum(max(getattr(event, name), 0) for event in profile.events() or ())


def row(result: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """The cells of one method, behind its name, beside those of `base`."""
    if "error" in result:
        return [result["error"], *[""] * 6]
    return [
        f"{result['peak'] / 1e6:.0f}",
        f"{result['peak'] / base['peak']:.2f}",
        f"{result['peak'] / result['output']:.2f}",
        f"{result['profiled'] / 1e6:.0f}",
        f"{result['seconds']:.2f}",
        f"{result['seconds'] / base['seconds']:.2f}",
        f"{abs(result['checksum'][0] - base['checksum'][0]) / base['checksum'][1]:.0e}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="samples (default: 8 on the CPU, 16 elsewhere)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nvidia", default="", help="models/partialconv2d.py of NVIDIA/partialconv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    batch = args.batch or (8 if args.device == "cpu" else 16)
    methods = [method for method in METHODS if method != "nvidia" or args.nvidia]
    rows = []
    for work in PASSES:
        shared = dict(device=args.device, batch=batch, nvidia=args.nvidia, work=work)
        cases = [shared | dict(method=method) for method in methods]
        found = rounds(cases, [[sys.executable, __file__]] * len(cases), args.rounds)
        base = found[0]
        for method, result in zip(methods, found):
            rows.append([work, method, *row(result, base)])
    publish(
        "partial_conv",
        "One partial convolution",
        "The layer of torch_pconv's README: 64 → 128 channels, kernel 9, padding 3, bias, 256². Peak is held at once; "
        "profiled is the sum of all that is allocated, which that README counts. The last column is relative to the "
        f"sum of magnitudes. float32, batch {batch}, median of {args.rounds} interleaved rounds of fresh processes.",
        [
            "pass",
            "method",
            "peak MB",
            "memory / torch_pconv",
            "peak / output",
            "profiled MB",
            "s",
            "time / torch_pconv",
            "difference of sums",
        ],
        rows,
        device=args.device,
        bars=["peak MB", "s"],
        packages=["torch-pconv"],
    )


if __name__ == "__main__":
    main()
