"""The processes that torchrun started for one command: who they are, who talks, and who does which input."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from ..streaming import SpreadError
from .failures import SPREAD, attempt, each, failure, tell

_ASKED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""


_LONGEST = timedelta(days=7)
"""Of what one process waits for that another one does alone; one that has ended is noticed at once."""


@dataclass(frozen=True)
class Processes:
    """rank, count: which process this is, of how many. beside: how many of them share the memory of its device. group:
    theirs, to stream over; None for one process. rows: whether they do each input together, a band of rows each, rather
    than one input each."""

    rank: int = 0
    count: int = 1
    beside: int = 1
    group: Any = None
    rows: bool = True

    @property
    def writes(self) -> bool:
        """Whether this process writes what it makes, and talks."""
        return self.rank == 0 or not self.rows

    def as_first_has_it(self, make: Callable[[], Any]) -> Any:
        """What `make` gives, or raises, on rank 0, if they do each input together: files may have come meanwhile.

        The others wait for as long as rank 0 takes. Raises SpreadError where that has ended.
        """
        if self.count == 1 or not self.rows:
            return make()
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        try:
            dist.broadcast_object_list(made, 0, self.group)
        except RuntimeError as error:
            other = "rank 0" if self.rank else "another rank"
            raise SpreadError(f"{other} has ended: see what it said last, and start all ranks again.") from error
        if made[1] is not None:
            raise made[1]
        return made[0]


def launched() -> bool:
    """Whether several processes were started for this command, as torchrun does."""
    return all(name in os.environ for name in _ASKED) and int(os.environ["WORLD_SIZE"]) > 1


def device_of(wanted: Optional[torch.device]) -> torch.device:
    """The device of this process: the one that is asked for, else the GPU of its number on this machine, else the
    CPU."""
    if wanted is not None and (wanted.type != "cuda" or wanted.index is not None):
        return wanted
    found = wanted or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if found.type != "cuda" or not launched():
        return found
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


@contextmanager
def processes_of(spread: Optional[str], given: Sequence[Path], device: torch.device) -> Iterator[Processes]:
    """Within the block, the processes of this command ; what goes wrong there is said once.

    spread: `"rows"` or `"pictures"`; None for rows where a single file is `given`, else pictures. Raises ValueError
    where several processes were started and there is no `torch.distributed`.
    """
    if not launched():
        yield Processes()
        return
    if not dist.is_available():
        raise ValueError("this PyTorch is built without torch.distributed: start the command without torchrun.")
    rank, count, beside = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nccl = device.type == "cuda" and beside <= torch.cuda.device_count() and dist.is_nccl_available()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if nccl else "gloo", timeout=_LONGEST)
    dist.barrier()  # torch has a lot to say where one process ends while another is still on its way in
    rows = spread == "rows" if spread else len(given) == 1 and not given[0].is_dir()
    sharing = beside if device.type != "cuda" else -(-beside // torch.cuda.device_count())
    processes = Processes(rank, count, sharing, dist.group.WORLD, rows)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, ExitStack() as silent:
            if not processes.writes:
                silent.enter_context(redirect_stdout(nowhere))
                silent.enter_context(redirect_stderr(nowhere))
            yield processes
    except (Exception, KeyboardInterrupt) as error:
        found = failure(error)
        if found is None or rank == _speaker(error):
            raise
        raise SystemExit(found[1]) from error
    finally:
        with suppress(Exception):  # of a group that is broken
            dist.destroy_process_group()


def _speaker(error: BaseException) -> int:
    """The rank that says what went wrong: the first one, unless it is that which is gone."""
    return int(isinstance(error, SpreadError) and str(error).startswith(("rank 0 has ", "rank 0 did not ")))


def of_all(processes: Processes, inputs: Sequence[Path], work: Callable[[Path], None]) -> int:
    """Do `work` for each input, together or each taken by the next process that is free; the exit code.

    One that fails does not end the others, unless it is a rank that failed. Those that failed are named at the end.
    """
    if processes.count == 1 or processes.rows:
        return each(inputs, work)
    store: Any = dist.distributed_c10d._get_default_store()
    failed: list[str] = []
    while True:
        place = store.add("patchconv next", 1) - 1
        if place >= len(inputs):
            break
        if attempt(inputs[place], work):
            failed.append(str(inputs[place]))
    found: list[Any] = [None] * processes.count
    dist.all_gather_object(found, failed)
    names = [name for some in found for name in some]
    if names and processes.rank == 0:
        tell(f"{len(names)} of {len(inputs)} failed: {', '.join(sorted(names))}.")
    return SPREAD if names else 0
