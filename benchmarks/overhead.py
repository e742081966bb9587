"""What streaming and strips cost beside the arithmetic: planning, a repeated call of a small decoder, one convolution.

    python benchmarks/overhead.py planning [--sizes 512 1024 2048 4096] [--frames 81] [--budget 1] [--rounds 5]
    python benchmarks/overhead.py calls [--sizes 256 512] [--rounds 7]
    python benchmarks/overhead.py convolution [--calls 2000]

Nothing is computed while planning, so 4096² takes no memory. All of it runs on the CPU, in one thread. planning and
calls count the processor's seconds, so that other work on the machine changes little.

planning: Stable Diffusion's decoder, and Wan 2.1's decode of a video of 832x480 in bfloat16, both at full width, each
case in fresh processes. "first" is `expect`: a copy of the model is made, its code recorded, the recording planned.
"again" is what a second call of the same shape spends before it computes anything: it records, and finds the schedule.
calls: a decoder of toy width, where each strip has little to do; eager and streamed in turn, in one process.
convolution: a converted convolution below its threshold, which runs whole, and the same one unconverted, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Optional

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from harness import publish, run_fresh
from torch import Tensor, nn

import comfyui_patchconv.streaming.estimate as estimate_module
import comfyui_patchconv.streaming.plan.choose as choose_module
from comfyui_patchconv import convert_model
from comfyui_patchconv.files.vae import random_vae
from comfyui_patchconv.memory.allocator import rare_collections
from comfyui_patchconv.streaming import Streamed, Tuning, expect
from comfyui_patchconv.streaming.call import Call

clock = time.process_time
"""Seconds of the processor: with one thread those of the clock, were there no other work beside it."""


class Timed:
    """A function, and the seconds that its calls have taken since `clear`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin = clock()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += clock() - begin


# Planning


def decode_of(case: dict[str, Any]) -> tuple[nn.Module, Callable[[Any, Any], object], torch.dtype]:
    """A model, the decode that is planned, and its type."""
    if case["model"] == "sd":
        side = case["size"] // 8
        return random_vae().decoder, lambda copy, make: copy(make((1, 4, side, side))), torch.float32
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    with torch.device("meta"):
        vae: Any = AutoencoderKLWan().eval()
    shape = (1, 16, 1 + case["frames"] // 4, 60, 104)
    return vae, lambda copy, make: copy.decode(make(shape)).sample, torch.bfloat16


def planning(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one planning in this process, and of what it consists of; then of planning the same again."""
    torch.set_num_threads(1)
    model, run, dtype = decode_of(case)
    budget = round(case["budget"] * 2**30) if case["budget"] else None
    device = torch.device("cpu")
    started(dtype)
    copying, choosing, storing, eager = (
        Timed(estimate_module.phantom_copy), Timed(choose_module.in_strips), Timed(Call.evaluate),
        Timed(choose_module.eager_schedule),
    )  # fmt: skip
    estimate_module.phantom_copy, choose_module.in_strips, choose_module.eager_schedule = copying, choosing, eager
    setattr(Call, "evaluate", lambda call, *args: storing(call, *args))  # noqa: B010  (another signature)
    begin = clock()
    expected = expect(model, run, device=device, dtype=dtype, budget=budget)
    first = clock() - begin
    found = {
        "first": first, "copy": copying.seconds, "record": first - copying.seconds - storing.seconds,
        "choose": choosing.seconds, "compare": eager.seconds, "peak": expected.peak, "eager": expected.eager,
    }  # fmt: skip
    copy = estimate_module.phantom_copy(model, device=device, dtype=dtype)
    schedules: OrderedDict[Any, Any] = OrderedDict()
    again = [recorded_and_found(copy, run, dtype, budget, schedules) for _ in range(1 + case["again"])]
    return found | {"again": min(again[1:])}


def recorded_and_found(
    copy: Any, run: Callable[[Any, Any], object], dtype: torch.dtype, budget: Optional[int],
    schedules: OrderedDict[Any, Any],
) -> float:  # fmt: skip
    """Seconds that a call spends before it computes anything, where `schedules` may have its schedule."""
    begin = clock()
    with torch.no_grad():  # as the caller of a decode is
        call = Call(budget, {}, None, Tuning(), schedules, phantom=True)
    recorder = call.recorder

    def make(shape: Sequence[int], dtype: torch.dtype = dtype) -> Tensor:
        like = estimate_module.Spec.of(torch.empty(tuple(shape), dtype=dtype, device="meta"))
        return recorder.phantom_of(like, torch.device("cpu"))

    with torch.no_grad(), recorder, rare_collections():
        result: Any = run(copy, make)
        recorder.store([result.view_.cell.value])
    return clock() - begin


def started(dtype: torch.dtype) -> None:
    """What a process does once, at its first call, is done."""
    small = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Upsample(scale_factor=2.0))
    expect(small, lambda copy, make: copy(make((1, 4, 64, 64))), device=torch.device("cpu"), dtype=dtype)


def plan_cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = [{"model": "sd", "size": size, "what": f"SD {size}²"} for size in args.sizes]
    cases += [{"model": "wan", "frames": frames, "what": f"Wan {frames} frames"} for frames in args.frames]
    return [case | {"budget": budget, "again": args.rounds} for case in cases for budget in (0, args.budget)]


def publish_planning(args: argparse.Namespace) -> None:
    rows = []
    for case in plan_cases(args):
        rounds = [run_fresh(case, [sys.executable, __file__, "planning"]) for _ in range(args.rounds)]
        print(f"  {case} -> {rounds}", file=sys.stderr, flush=True)
        name = [case["what"], f"{case['budget']:g} GiB" if case["budget"] else "none"]
        if bad := next((found["error"] for found in rounds if "error" in found), ""):
            rows.append([*name, bad, *[""] * 7])
            continue
        times = [
            spread([one[key] for one in rounds]) for key in ("first", "copy", "record", "choose", "compare", "again")
        ]
        rows.append([*name, *times, *(f"{rounds[0][key] / 1e6:.0f}" for key in ("peak", "eager"))])
    parts = ["of it: copy", "record", "choose", "compare"]
    publish(
        "overhead_planning",
        "Overhead: planning",
        "Seconds to plan a decode before its input exists (`expect`): a copy of the model is made, its code recorded "
        "once, a schedule chosen, and eager's counted to compare; and what a second call of the same shape spends "
        "before it computes anything. The decoder of Stable Diffusion's VAE in float32, and Wan 2.1's decode of "
        "832x480 in bfloat16, at full width. Seconds of the processor, one thread: the least of "
        f"{args.rounds} fresh processes, and their median in brackets.",
        ["decode", "budget", "first s", *parts, "again s", "expected MB", "eager MB, counted"],
        rows,
        device="cpu",
        packages=["diffusers"],
    )


# Calls


def toy_decoder() -> nn.Module:
    """The decoder of Stable Diffusion's VAE with 4 to 16 channels instead of 128 to 512."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 2, "latent_channels": 4,
    }  # fmt: skip
    vae: Any = AutoencoderKL(**config)
    return vae.eval().requires_grad_(False).decoder


def publish_calls(args: argparse.Namespace) -> None:
    decoder, rows = toy_decoder(), []
    tunings = {"ours, streamed always": Tuning(always=True), "ours, streamed": Tuning()}
    for size in args.sizes:
        latent = torch.randn(1, 4, size // 8, size // 8)
        runners = {name: Streamed(tuning=tuning) for name, tuning in tunings.items()}
        methods: dict[str, Callable[[], Tensor]] = {"eager": lambda latent=latent: decoder(latent)}
        for name, runner in runners.items():
            methods[name] = lambda latent=latent, runner=runner: runner.call(decoder, (latent,), {})
        with torch.inference_mode():
            results = {name: method() for name, method in methods.items()}  # schedules are made
            seconds: dict[str, list[float]] = {name: [] for name in methods}
            for _ in range(args.rounds):
                for name, method in methods.items():
                    begin = clock()
                    method()
                    seconds[name].append(clock() - begin)
        eager, exact = seconds["eager"], results["eager"]
        for name, found in seconds.items():
            ratios = [f"{kind(found) / kind(eager):.2f}" for kind in (statistics.median, min)]
            error = (results[name] - exact).abs().max() / (exact.max() - exact.min())
            rows.append([f"{size}²", name, ran(runners.get(name)), *milliseconds(found), *ratios, f"{error:.1e}"])
    publish(
        "overhead_calls",
        "Overhead: a repeated call of a small decoder",
        "The decoder of Stable Diffusion's VAE with 4, 8, 16 and 16 channels, where strips have little to compute, in "
        "float32 and one thread. The schedule is there from a call before. `always` streams even where eager would do; "
        "otherwise eager's schedule is run where it takes less memory, or fits and is faster by a quarter. "
        f"Milliseconds of the processor; {args.rounds} rounds in one process, the methods in turn.",
        ["image", "method", "ran", "median ms", "least ms", "median / eager", "least / eager", "largest error"],
        rows,
        device="cpu",
        packages=["diffusers"],
    )


def ran(runner: Optional[Streamed]) -> str:
    """How the last call ran: in strips, by how many, or as eager does."""
    if runner is None or runner.last is None:
        return "eager"
    steps = [step for _, schedule in runner._schedules.values() for step in schedule.steps]
    strips = sum(-(-step.height // step.strip_rows) for step in steps if hasattr(step, "strip_rows"))
    return f"{strips} strips" if strips else "eager's schedule"


# One convolution


def publish_convolution(args: argparse.Namespace) -> None:
    eager = nn.Conv2d(4, 8, 3, padding=1).requires_grad_(False)
    converted = convert_model(deepcopy(eager), threshold=10**9)
    input, methods = torch.randn(1, 4, 32, 32), {"eager": eager, "ours, below the threshold": converted}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with torch.inference_mode():
        for number in range(args.calls + 200):
            for name, method in methods.items():
                begin = time.perf_counter()
                method(input)
                if number >= 200:
                    seconds[name].append(time.perf_counter() - begin)
    rows = []
    for name, found in seconds.items():
        both = [kind(found) * 1e6 for kind in (statistics.median, min)]
        more = [both[0] - statistics.median(seconds["eager"]) * 1e6, both[1] - min(seconds["eager"]) * 1e6]
        rows.append([name, *(f"{value:.1f}" for value in (*both, *more))])
    publish(
        "overhead_convolution",
        "Overhead: a converted convolution below its threshold",
        "`convert_model(nn.Conv2d(4, 8, 3, padding=1), threshold=10**9)` on an input of 1x4x32x32, in float32, one "
        f"thread and inference mode: {args.calls} calls, the two in turn. The machine had other work.",
        ["method", "median µs", "least µs", "more by the median, µs", "more by the least, µs"],
        rows,
        device="cpu",
    )


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.3f} ({statistics.median(values):.3f})"


def milliseconds(values: Sequence[float]) -> list[str]:
    return [f"{kind(values) * 1e3:.1f}" for kind in (statistics.median, min)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["planning", "calls", "convolution"])
    parser.add_argument("--sizes", type=int, nargs="+", help="of images (default: 512 to 4096; 256 and 512 for calls)")
    parser.add_argument("--frames", type=int, nargs="*", default=[81], help="of Wan's videos (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=1.0, help="GiB of the bounded plans (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="default: 5; 7 for calls")
    parser.add_argument("--calls", type=int, default=2000, help="of the convolution (default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(planning(json.loads(args.worker))))
        return
    torch.set_num_threads(1)
    if args.part == "planning":
        args.sizes, args.rounds = args.sizes or [512, 1024, 2048, 4096], args.rounds or 5
        publish_planning(args)
    elif args.part == "calls":
        args.sizes, args.rounds = args.sizes or [256, 512], args.rounds or 7
        publish_calls(args)
    else:
        publish_convolution(args)


if __name__ == "__main__":
    main()
