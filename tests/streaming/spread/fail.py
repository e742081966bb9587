"""Three ranks that make a call together, and of which one fails: `python fail.py HOW SECONDS`.

How: raises, is_killed, is_stopped (by a signal, as a machine that hangs), stays_away, has_left, has_another_input,
does_something_else, asks_for_less, runs_out_of_room, fails_in_its_code. SECONDS may pass until it is missed. A line of
JSON for each rank that comes back says what it raised, and what the next call raises.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[3]), str(Path(__file__).parent)]

import torch  # noqa: E402

torch.set_num_threads(1)

import torch.distributed as dist  # noqa: E402
from toys import Decoder, drawn, seeded  # noqa: E402

from comfyui_patchconv.streaming import Streamed, Tuning  # noqa: E402
from comfyui_patchconv.streaming.execute import to_file  # noqa: E402

RANKS, BAD = 3, 1
c10d: Any = dist


def failing(how: str) -> Callable[[int, int], None]:
    """An `on_progress` that fails after some strips."""
    strips = 0

    def on_progress(done: int, work: int) -> None:
        nonlocal strips
        strips += 1
        if strips == 20 and how == "raises":
            raise KeyError("no such key")
        if strips == 20 and how in ("is_killed", "is_stopped"):
            os.kill(os.getpid(), signal.SIGKILL if how == "is_killed" else signal.SIGSTOP)

    return on_progress


def failing_behind(function: Callable[..., Any], left: list[Any]) -> Callable[..., Any]:
    """A program that fails and leaves what it has in `left`."""

    def run(x: Any) -> Any:
        left.append(function(x))
        raise LookupError("nothing is there")

    return run


def asking(function: Callable[..., Any], often: int) -> Callable[..., Any]:
    """A program that looks at so many values."""

    def run(x: Any) -> Any:
        y = function(x)
        return sum(float((y * number).sum()) for number in range(1, often + 1))

    return run


def full(size: int) -> Any:
    raise OSError(f"no room for {size} bytes")


def outcome(how: str, rank: int, runner: Streamed) -> Optional[str]:
    """What a call raised; None for the bad one where it does not come back."""
    function, args = seeded(Decoder), (drawn(1, 4, 13, 9),)
    left: list[Any] = []
    if rank == BAD:
        if how == "stays_away":
            signal.pause()
        if how == "has_left":
            return None
        if how == "has_another_input":
            args = (drawn(1, 4, 13, 9) + 1e-6,)
        if how == "does_something_else":
            args = (drawn(1, 4, 13, 10),)
        if how == "fails_in_its_code":
            function = failing_behind(function, left)
        if how == "runs_out_of_room":
            to_file.StripsInFile.offload = lambda self, strip: full(strip.nbytes)
    if how == "asks_for_less":
        function = asking(function, 1 if rank == BAD else 2)
    try:
        with torch.no_grad():
            runner.call(function, args, {})
    except BaseException as error:
        with torch.no_grad():
            assert all(torch.allclose(one, seeded(Decoder)(args[0]), atol=1e-5) for one in left)
        return f"{type(error).__name__}: {error}"
    if how == "asks_for_less" and rank == BAD:
        signal.pause()
    return "nothing"


def be(rank: int, store: str, how: str, seconds: float) -> None:
    """One rank."""
    dist.init_process_group("gloo", store=c10d.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    budget = 20_000 if how == "runs_out_of_room" else None
    tuning = Tuning(strip_bytes=1, always=True, silent_seconds=seconds, allocator_bytes=0)
    on_progress = failing(how) if rank == BAD else None
    runner = Streamed(budget, tuning=tuning, group=dist.group.WORLD, on_progress=on_progress)
    first = outcome(how, rank, runner)
    again = outcome("", rank, runner) if first is not None else None
    threads = [one.name for one in threading.enumerate() if one is not threading.current_thread()]
    found = {"rank": rank, "raised": first, "again": again, "threads": threads}
    os.write(1, f"{json.dumps(found)}\n".encode())


def main(how: str, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(RANKS):
            process = os.fork()
            if not process:
                be(rank, str(Path(folder, "store")), how, seconds)
                sys.stdout.flush()
                os._exit(0)
            processes.append(process)
        for rank, process in enumerate(processes):
            if rank != BAD:
                os.waitpid(process, 0)
        if how in ("is_stopped", "stays_away", "asks_for_less"):
            os.kill(processes[BAD], signal.SIGKILL)
        os.waitpid(processes[BAD], 0)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
