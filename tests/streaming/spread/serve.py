"""Ranks that run what they are asked to, one thing after the other, and have nothing left to import.

A line of JSON comes in: the name of a case in `cases`, its arguments, how many ranks run it, and options of `streamed`.
A line goes out: what each of these ranks found.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[3]), str(Path(__file__).parent)]

import torch  # noqa: E402

torch.set_num_threads(1)

import torch.distributed as dist  # noqa: E402
from allocations import allocated  # noqa: E402
from cases import CASES  # noqa: E402

from comfyui_patchconv.streaming import Band, InBands, Streamed, Tuning, gathered  # noqa: E402
from comfyui_patchconv.streaming.execute import pass_loop  # noqa: E402
from comfyui_patchconv.streaming.plan import choose  # noqa: E402
from streaming.comparing import assert_alike, copied, seed_all, tensors_in  # noqa: E402

RANKS = 4
c10d: Any = dist


@contextmanager
def rows_at_once(most: int) -> Iterator[None]:
    """Within the block memory runs out where a strip has more rows of a step."""
    compute = pass_loop.PassLoop._compute

    def limited(self: Any, works: list[Any]) -> Any:
        if any(work.rows[1] - work.rows[0] > most for work in works):
            raise MemoryError("no more")
        return compute(self, works)

    pass_loop.PassLoop._compute = limited
    try:
        yield
    finally:
        pass_loop.PassLoop._compute = compute


@contextmanager
def in_turn_at_all_costs() -> Iterator[None]:
    """Within the block keys and values that a budget has no room for go in turn, whatever that saves."""
    saves = choose._saves
    choose._saves = lambda *args: True
    try:
        yield
    finally:
        choose._saves = saves


def bands_in(value: Any) -> list[Band]:
    """The bands in a result."""
    if isinstance(value, Band):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [band for part in parts for band in bands_in(part)]


def on_one(result: Any, expected: Any, group: Any) -> Any:
    """A result put together from the bands of all ranks on each in turn, or on the first alone where others find it as
    it should be."""
    if isinstance(result, Band):
        assert isinstance(expected, torch.Tensor)
        rows = expected.narrow(result.dim, result.first, result.values.shape[result.dim])
        assert_alike(result.values, rows, strides=False)
        wholes = [gathered(result, group, rank) for rank in range(dist.get_world_size(group))]
        whole = wholes.pop(dist.get_rank(group))
        assert whole is not None
        assert not any(one is not None for one in wholes)
        return torch.empty_strided(expected.shape, expected.stride(), dtype=whole.dtype).copy_(whole)
    if isinstance(result, dict):
        return {key: on_one(one, expected[key], group) for key, one in result.items()}
    if isinstance(result, (list, tuple)):
        return type(result)(on_one(one, other, group) for one, other in zip(result, expected))
    return result


def found(asked: dict[str, Any], groups: dict[int, Any]) -> dict[str, Any]:
    """What one rank has to say of a case: `error` tells how it differs from eager, and is empty where it does not."""
    seed_all()
    function, args = CASES[asked["case"]](*asked.get("arguments", ()))
    others = copied(args)
    seed_all()
    expected = function(*args)
    always = asked.get("always", True)
    settings = ("strip_bytes", "allocator_bytes", "worth_an_exchange", "worth_a_byte")
    tuning = Tuning(always=always, **{name: asked[name] for name in settings if name in asked})
    budget = asked.get("budget")
    if isinstance(budget, list):
        budget = budget[dist.get_rank()]
    group = groups[asked["ranks"]]
    runner = Streamed(budget, tuning=tuning, group=InBands(group) if asked.get("in_bands") else group)
    seed_all()
    short = asked.get("short_of_memory") == dist.get_rank()
    if asked.get("measured"):
        result, memory = allocated(lambda: runner.call(function, others, {}))
        peak = memory.peak
    else:
        costly = in_turn_at_all_costs() if asked.get("at_all_costs") else nullcontext()
        with rows_at_once(2) if short else nullcontext(), costly:
            result, peak = runner.call(function, others, {}), 0
    error, planned = "", runner.last
    try:
        bands = bands_in(result)
        if asked.get("in_bands"):
            result = on_one(result, expected, group)
        assert_alike(result, expected, asked.get("tolerance"), strides=asked.get("strides", True))
        assert_alike(others, args, path="arguments")
    except AssertionError as differs:
        error = str(differs)
    written = hashlib.sha256(b"".join(str(one.double().tolist()).encode() for one in tensors_in(result))).hexdigest()
    call = planned
    assert call is not None
    return {
        "error": error, "result": written, "peak": peak, "sent": runner.sent, "messages": runner.messages,
        "planned": call.peak, "offloaded": call.offloaded, "in_strips": call.in_strips, "report": runner.report,
        "parts": call.parts, "in_turn": call.in_turn,
        "bands": [(list(one.values.shape), one.dim, one.first, one.rows) for one in bands],
    }  # fmt: skip


def serve(rank: int, store: str, asked: TextIO, answers: TextIO) -> None:
    """Be a rank until there is nothing more to do."""
    dist.init_process_group("gloo", store=c10d.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    groups: dict[int, Any] = {count: dist.new_group(list(range(count))) for count in range(1, RANKS)}
    groups[RANKS] = dist.group.WORLD
    for line in asked:
        wanted = json.loads(line)
        answer: Any = None
        if rank < wanted["ranks"]:
            try:
                with torch.inference_mode(wanted.get("inference", False)), torch.no_grad():
                    answer = found(wanted, groups)
            except Exception:
                answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        asking: list[TextIO] = []
        answering: list[TextIO] = []
        processes: list[int] = []
        gc.collect()
        gc.freeze()  # ranks that look for garbage need not go through what was imported
        for rank in range(RANKS):
            to_read, to_write = os.pipe()
            answer_read, answer_write = os.pipe()
            process = os.fork()
            if not process:
                for other in (*asking, *answering):
                    other.close()
                os.close(to_write)
                os.close(answer_read)
                with open(to_read) as asked, open(answer_write, "w") as answers:
                    serve(rank, str(Path(folder, "store")), asked, answers)
                os._exit(0)
            os.close(to_read)
            os.close(answer_write)
            asking.append(open(to_write, "w"))  # noqa: SIM115
            answering.append(open(answer_read))  # noqa: SIM115
            processes.append(process)
        for line in sys.stdin:
            for one in asking:
                one.write(line)
                one.flush()
            answers = [json.loads(one.readline() or '{"error": "it has ended"}') for one in answering]
            print(json.dumps([answer for answer in answers if answer is not None]), flush=True)
        for one in asking:
            one.close()
        for process in processes:
            with suppress(ChildProcessError):
                os.waitpid(process, 0)


if __name__ == "__main__":
    main()
