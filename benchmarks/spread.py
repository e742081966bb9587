"""One decode over several processes: what each takes, what it sends to the others, and how long it all takes.

    python benchmarks/spread.py measured [--size 256] [--ranks 1 2 3 4] [--rounds 3]
    python benchmarks/spread.py beside [--size 256] [--ranks 2 3 4] [--rounds 1] [--by ours ours_on_gpus theirs]
    python benchmarks/spread.py reckoned [--sizes 1024 2048] [--ranks 1 2 4 8 16 32 64]

The decoder of Stable Diffusion's VAE at full width, with random weights, in float32.

measured: the ranks are processes of one thread on this machine, which talk over Gloo, and beside them is one process of
as many threads as there are cores; each number of them runs in fresh processes, whose first decode is not measured. The
largest peak of a rank is the kernel's mark of its resident memory beyond what was in use before (the weights and the
latent), and beside it what was planned. What is sent stands beside what is reckoned for it.
beside: the same decode by DistVAE, which has to be there (`pip install --no-deps distvae==0.1.0`). What it sends is
counted at its calls of `torch.distributed`: a message to one rank once; of `all_gather`, what a rank has as often as
there are others; of `all_reduce`, twice that share which is another's.
reckoned: nothing is computed. The plan for so many ranks that are GPUs, and the rows that its passes read of others'
bands, give each rank's peak, bytes and messages; `LINKS` what these take.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
import torch.distributed as dist
from harness import kept_rows, latent_of, publish, run_fresh
from torch import Tensor, nn

import comfyui_patchconv.streaming.call as calls_module
from comfyui_patchconv.files.vae import random_vae
from comfyui_patchconv.memory.recorder import Recorder
from comfyui_patchconv.streaming import Streamed, Tuning, expect
from comfyui_patchconv.streaming.graph.node import Node
from comfyui_patchconv.streaming.plan.bands import band
from comfyui_patchconv.streaming.plan.everywhere import worth_a_byte
from comfyui_patchconv.streaming.plan.schedule import InTurn, Pass, Schedule
from comfyui_patchconv.streaming.spread.moves import moves_before
from comfyui_patchconv.streaming.spread.together import BYTES_AT_ONCE

MB = 1e6
ALWAYS = Tuning(always=True)
AS_ON_GPUS = replace(ALWAYS, worth_a_byte=worth_a_byte(ALWAYS, "cuda"))
"""What is little to compute beside the bytes that are sent else is computed on all ranks, which a CPU leaves."""


class Ours:
    """A decode by Patch Conv. sent, messages: see `Streamed`."""

    def __init__(self, decoder: nn.Module, tuning: Tuning) -> None:
        self._decoder, self._runner = decoder, Streamed(group=dist.group.WORLD, tuning=tuning)

    def __call__(self, latent: Tensor) -> Tensor:
        return self._runner.call(self._decoder, (latent,), {})

    @property
    def sent(self) -> int:
        return self._runner.sent

    @property
    def messages(self) -> int:
        return self._runner.messages

    @property
    def planned(self) -> int:
        assert self._runner.last is not None
        return self._runner.last.peak


class Theirs:
    """A decode by DistVAE. sent, messages: bytes and pieces that it has this rank send, however Gloo goes about it."""

    planned = 0

    def __init__(self, decoder: nn.Module) -> None:
        adapters = importlib.import_module("distvae.modules.adapters.vae.decoder_adapters")
        self.sent = self.messages = 0
        self._decoder = adapters.DecoderAdapter(decoder, dist.group.WORLD)
        others = dist.get_world_size() - 1
        self._count("all_gather", lambda buffers, tensor: (others * tensor.nbytes, others))
        self._count("all_reduce", lambda tensor: (2 * others * tensor.nbytes // (others + 1), 2 * others))
        self._count("batch_isend_irecv", _of_messages)

    def __call__(self, latent: Tensor) -> Tensor:
        return self._decoder(latent)

    def _count(self, name: str, size_of: Callable[..., tuple[int, int]]) -> None:
        called = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            size, messages = size_of(*args)
            self.sent, self.messages = self.sent + size, self.messages + messages
            return called(*args, **kwargs)

        setattr(dist, name, counted)


def _of_messages(operations: Any) -> tuple[int, int]:
    sizes = [one.tensor.nbytes for one in operations if one.op is dist.isend]
    return sum(sizes), len(sizes)


def measured(decoder: nn.Module, latent: Tensor, rounds: int, by: str) -> dict[str, Any]:
    """What one rank found. by: one of `NAMES`."""
    error, plain = 0.0, copy.deepcopy(decoder) if by == "theirs" else decoder  # that changes the decoder itself
    tuning = AS_ON_GPUS if by == "ours_on_gpus" else ALWAYS
    decode = Theirs(decoder) if by == "theirs" else Ours(decoder, tuning)
    decode(latent)
    sent, messages, seconds, peaks = decode.sent, decode.messages, [], []
    for _ in range(rounds):
        dist.barrier()
        with Recorder() as recorder:
            result = decode(latent)
        seconds.append(recorder.seconds)
        peaks.append(recorder.peak)
    found = {"sent": (decode.sent - sent) / rounds, "messages": (decode.messages - messages) / rounds}
    if dist.get_rank() == 0:
        eager = plain(latent)
        error = float((result - eager).abs().max() / (eager.max() - eager.min()))
    return found | {"seconds": min(seconds), "peak": max(peaks), "planned": decode.planned, "error": error}


def worker(case: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of the ranks found, which share the weights' memory."""
    torch.set_num_threads(case.get("threads", 1))
    decoder, latent, ranks = random_vae().decoder, latent_of(case), case["ranks"]
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(ranks):
            process = os.fork()
            if not process:
                store = dist.FileStore(str(Path(folder, "store")), ranks)  # type: ignore[reportPrivateImportUsage]
                dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
                with torch.inference_mode():
                    found = measured(decoder, latent, case["rounds"], case.get("by", "ours"))
                Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
                dist.destroy_process_group()
                os._exit(0)
            processes.append(process)
        codes = [os.waitpid(process, 0)[1] for process in processes]
        if any(codes):
            raise SystemExit(f"a rank ended with {max(codes)}")
        return [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


# Reckoned


LINKS = {"NVLink 4": (450e9, 10e-6), "PCIe 4.0 x16": (25e9, 20e-6), "100 Gbit/s": (12.5e9, 50e-6)}
"""Bytes in a second, one way, and seconds for a message, assumed for each kind of link."""


def planned(size: int, ranks: int, tuning: Tuning = ALWAYS) -> Schedule:
    """The schedule of a decode that `ranks` do together."""
    found: list[Schedule] = []
    choose = calls_module.choose

    def kept(roots: Any, keep: Any, tuning: Tuning, budget: Any, held: int, room: Any, _: int) -> Schedule:
        found.append(choose(roots, keep, tuning, budget, held, room, ranks))
        return found[-1]

    calls_module.choose = kept
    try:
        side = size // 8
        expect(random_vae().decoder, lambda copy, make: copy(make((1, 4, side, side))), device=torch.device("cpu"),
               tuning=tuning)  # fmt: skip
    finally:
        calls_module.choose = choose
    return found[0]


def traffic(schedule: Schedule, ranks: int) -> tuple[list[int], list[int]]:
    """Bytes and messages that each rank sends for the passes of a schedule: rows beside others' bands, statistics, and
    its band of what is stored whole."""
    size, messages = [0] * ranks, [0] * ranks
    stored: dict[Node, None] = {}
    for step in schedule.steps:
        if isinstance(step, Pass):
            if step.everywhere:
                continue
            moves = moves_before(step, stored, ranks)
            for move in moves:
                size[move.owner] += move.bytes
            for rank in range(ranks):
                messages[rank] += len({move.reader for move in moves if move.owner == rank})
            gathered = [node for target in step.targets for node in target.reductions]
            whole = [target.node for target in step.targets if target.stored and target.whole]
            for rank in range(ranks):
                # A group norm's result is four numbers for each channel, and its state two for each of 32 groups.
                size[rank] += (ranks - 1) * sum(8 * (1 + 2 * 32) for _ in gathered)
                messages[rank] += (ranks - 1) * bool(gathered)
                for node in whole:
                    first, last = band(node.rows, rank, ranks)
                    size[rank] += (ranks - 1) * (last - first) * node.row_bytes
                    messages[rank] += (ranks - 1) * -(-(last - first) // max(BYTES_AT_ONCE // node.row_bytes, 1))
            stored |= {target.node: None for target in step.targets if target.stored and not target.whole}
        elif isinstance(step, InTurn):
            _, *moving = step.target.node.inputs
            for rank in range(ranks):
                for owner in range(ranks):
                    first, last = band(moving[0].rows, owner, ranks)
                    if owner != (rank - 1) % ranks:  # whose pieces have come all round
                        size[rank] += (last - first) * sum(node.row_bytes for node in moving)
                        messages[rank] += -(-(last - first) // step.keys)
            stored[step.target.node] = None
        for node in step.freed:
            stored.pop(node, None)
    return size, messages


def publish_reckoned(args: argparse.Namespace) -> None:
    rows = []
    for size in args.sizes:
        one = planned(size, 1).peak
        for ranks in args.ranks:
            schedule = planned(size, ranks, AS_ON_GPUS)
            sent, messages = (max(found) for found in traffic(schedule, ranks))
            times = [1e3 * (messages * each + sent / bandwidth) for bandwidth, each in LINKS.values()]
            peaks = f"{schedule.peak / MB:.0f}", f"{schedule.peak / one:.3f}"
            rows.append(
                [f"{size}²", str(ranks), *peaks, f"{sent / MB:.1f}", str(messages), *(f"{t:.2f}" for t in times)]
            )
    links = "; ".join(
        f"{name}: {bandwidth / 1e9:g} GB/s, {1e6 * each:g} µs" for name, (bandwidth, each) in LINKS.items()
    )
    publish(
        "spread_reckoned",
        "One decode over many devices, reckoned",
        "A decode by the decoder of Stable Diffusion's VAE at full width, in float32: the peak that is planned for "
        "each rank, what the rank that sends most sends, and how long its messages take one after the other, were "
        f"nothing computed meanwhile. Assumed, for a byte one way and for a message: {links}. Nothing of it was run.",
        ["image", "ranks", "peak MB", "peak / one rank's", "sent MB", "messages", *(f"{name} ms" for name in LINKS)],
        rows,
        device="cpu",
        packages=["diffusers"],
    )


# Both


def row(
    ranks: int, threads: int, found: list[dict[str, Any]], one: list[dict[str, Any]], reckoned: list[int]
) -> list[str]:
    """The cells of one line. one: of one rank of one thread."""

    def most(key: str, of: list[dict[str, Any]] = found) -> float:
        return max(rank[key] for rank in of)

    sent = [rank["sent"] / MB for rank in found]
    return [
        str(ranks),
        str(threads),
        *(f"{most(key) / MB:.1f}" for key in ("peak", "planned")),
        f"{most('peak') / most('peak', one):.3f}",
        f"{min(sent):.2f} to {max(sent):.2f}",
        f"{min(reckoned) / MB:.2f} to {max(reckoned) / MB:.2f}",
        f"{most('messages'):.0f}",
        f"{most('seconds'):.2f}",
        f"{most('seconds', one) / most('seconds'):.2f}",
        f"{most('error'):.1e}",
    ]


def publish_measured(args: argparse.Namespace) -> None:
    if not hasattr(os, "fork"):
        raise SystemExit("This system has no os.fork, by which ranks share the weights' memory: run `reckoned`.")
    rows, one = [], []
    cores = os.cpu_count() or 1
    for ranks, threads in [*((ranks, 1) for ranks in args.ranks), *([(1, cores)] if cores > 1 else [])]:
        case = {"size": args.size, "ranks": ranks, "rounds": args.rounds, "threads": threads}
        found = run_fresh(case, [sys.executable, __file__])
        print(f"  {case} -> {found}", file=sys.stderr, flush=True)
        if "error" in found:
            raise SystemExit(found["error"])
        one = one or found["ranks"]
        reckoned, _ = traffic(planned(args.size, ranks), ranks)
        rows.append(row(ranks, threads, found["ranks"], one, reckoned))
    publish(
        "spread",
        "One decode over several processes",
        f"A decode of {args.size}² by the decoder of Stable Diffusion's VAE at full width, in float32, over processes "
        f"of so many threads each on one machine of {cores} cores, by Gloo. Peaks are the largest of a rank, "
        "beyond weights and latent; what is sent is each rank's, the result's band to all others included, and beside "
        f"it what is reckoned for it. Seconds are the least of {args.rounds} decodes.",
        [
            "ranks", "threads", "peak MB", "planned MB", "peak / one rank's", "sent MB", "reckoned MB", "messages", "s",
            "speed / one rank's", "largest error",
        ],
        rows,
        device="cpu",
        packages=["diffusers"],
    )  # fmt: skip


NAMES = {"ours": "Patch Conv", "ours_on_gpus": "Patch Conv, as on GPUs", "theirs": "DistVAE 0.1.0"}


def row_beside(ranks: int, by: str, found: list[dict[str, Any]]) -> list[str]:
    each = {key: [rank[key] for rank in found] for key in found[0]}
    peaks, sent = ([value / MB for value in each[key]] for key in ("peak", "sent"))
    return [
        str(ranks), NAMES[by], f"{max(peaks):.1f}", f"{min(sent):.2f} to {max(sent):.2f}",
        f"{max(each['messages']):.0f}", f"{max(each['error']):.1e}",
    ]  # fmt: skip


def publish_beside(args: argparse.Namespace) -> None:
    """The rows that are asked for, beside those that are kept of the same size, each as soon as it is there."""
    title = f"One decode of {args.size}² over several processes, beside DistVAE"
    rows = {(one[0], one[1]): one for one in kept_rows("spread_beside", title)}
    for ranks in args.ranks:
        for by in args.by:
            case = {"size": args.size, "ranks": ranks, "rounds": args.rounds, "by": by}
            found = run_fresh(case, [sys.executable, __file__])
            print(f"  {case} -> {found}", file=sys.stderr, flush=True)
            if "error" in found:
                raise SystemExit(found["error"])
            rows[str(ranks), NAMES[by]] = row_beside(ranks, by, found["ranks"])
            keep_beside(
                title, [rows[key] for key in sorted(rows, key=lambda key: (key[0], key[1] == NAMES["theirs"], key[1]))]
            )


def keep_beside(title: str, rows: list[list[str]]) -> None:
    publish(
        "spread_beside",
        title,
        "By the decoder of Stable Diffusion's VAE at full width, in float32, over processes of one thread each on one "
        f"machine of {os.cpu_count()} cores, by Gloo. Peaks are the largest of a rank, beyond weights and latent; what "
        "is sent is each rank's, the result's band to all others included. What DistVAE sends is counted at its calls "
        "of torch.distributed. As on GPUs: what leads to the attention's keys and values is computed on all ranks.",
        ["ranks", "by", "peak MB", "sent MB", "messages", "largest error"],
        rows,
        device="cpu",
        packages=["diffusers", "distvae"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    tables = parser.add_subparsers()
    measures = tables.add_parser("measured")
    measures.add_argument("--size", type=int, default=256)
    measures.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    measures.add_argument("--rounds", type=int, default=3)
    measures.set_defaults(publish=publish_measured)
    besides = tables.add_parser("beside")
    besides.add_argument("--size", type=int, default=256)
    besides.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    besides.add_argument("--rounds", type=int, default=1)
    besides.add_argument("--by", nargs="+", choices=NAMES, default=[*NAMES])
    besides.set_defaults(publish=publish_beside)
    reckons = tables.add_parser("reckoned")
    reckons.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    reckons.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    reckons.set_defaults(publish=publish_reckoned)
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps({"ranks": worker(args.worker)}))
    else:
        args.publish(args)


if __name__ == "__main__":
    main()
