"""The worker processes of a host: started, given what they are to run, called together with this process, and ended."""

from __future__ import annotations

import atexit
import json
import logging
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

import torch

from ...conv.autocast import autocast_state
from ...streaming import USUAL, OwnGroup, SpreadError, Streamed, Tuning
from .draws import states
from .frames import Frame, read, skip_to_start, write
from .packing import STOPPED, CannotSendError, Packed, packed, said

Look = Callable[[], None]
"""Called again and again while this process waits; what it raises ends the waiting."""

_LOOK = 0.1
"""Seconds between two looks."""

_START = 600.0
"""Seconds that a worker may take until it has imported what it needs."""

_GRACE = 5.0
"""Seconds that a worker may take to say what went wrong."""

_HELD = 2
"""Functions that a worker holds: a decoder and an encoder."""

_PACKAGE = __name__.rpartition(".hosts.")[0]
_FOLDER = Path(__file__).parents[3]

_log = logging.getLogger(__name__)


class DevicesError(RuntimeError):
    """A call that the workers cannot make together with this process; the text says why, without a full stop."""


class _GoneError(DevicesError):
    """A worker has ended."""


class _LateError(DevicesError):
    """A worker has not answered in time."""


class Worker:
    """One process, for one device. calls: see `worker_script`.

    Questions are answered in their order, one answer to each; the first answer says that it is ready.

    held: the names of the functions that it has said it has. waiting: answers to come. ready: whether it has answered.
    trouble: what went wrong last.
    """

    def __init__(self, rank: int, device: torch.device, calls: Sequence[str]) -> None:
        self.device, self.held, self.waiting, self.ready, self.trouble = device, [], 1, False, ""
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker_script.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._rank, self._pid = rank, self.process.pid
        self._unreadable = ""
        self._questions: queue.Queue[Any] = queue.Queue()
        self._answers: queue.Queue[Optional[Frame]] = queue.Queue()
        given = {
            "path": sys.path, "argv": sys.argv, "package": _PACKAGE, "folder": str(_FOLDER), "calls": list(calls),
        }  # fmt: skip
        for target, *args in ((self._write, json.dumps(given)), (self._read,)):
            threading.Thread(target=target, args=args, name=f"patchconv worker {rank}", daemon=True).start()

    def __str__(self) -> str:
        return f"rank {self._rank} ({self.device}, process {self._pid})"

    def ask(self, kind: str, value: Optional[Packed] = None, **plain: Any) -> None:
        """Ask for something, without waiting."""
        self.waiting += 1
        self.trouble = ""
        self._questions.put((kind, plain, value))

    def stop(self, call: int) -> None:
        """Have a call end after its strip; that is no question."""
        self._questions.put(("stop", {"call": call}, None))

    def answer(self, seconds: float, look: Look) -> str:
        """Wait for the next answer: what went wrong, or nothing. Raises DevicesError for none, and what `look`
        raises."""
        end = time.monotonic() + seconds
        while True:
            try:
                frame = self._answers.get(timeout=_LOOK)
            except queue.Empty:
                look()
                if time.monotonic() > end:
                    raise _LateError(f"{self} has not answered for {seconds:g} s") from None
                continue
            if frame is None:
                self._answers.put(None)  # there is no other
                raise _GoneError(f"{self} {self._unreadable or self._end()}")
            self.waiting -= 1
            if frame.kind == "hold" and not frame.plain["error"]:
                self.held.append(frame.plain["name"])
            return frame.plain.get("error", "")

    def _end(self) -> str:
        """How it has ended."""
        try:
            code = self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return "says no more"
        return f"was ended by signal {-code}" if code < 0 else f"has ended with status {code}"

    def wait(self, seconds: float, look: Look) -> str:
        """Wait for all answers; the last thing that went wrong, or nothing. Raises as `answer` does."""
        wrong = ""
        while self.waiting:
            wrong = self.answer(seconds, look) or wrong
        return wrong

    def is_there(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._questions.put(None)

    def _write(self, given: str) -> None:
        pipe: Any = self.process.stdin
        try:
            pipe.write(given.encode() + b"\n")
            pipe.flush()
            while (question := self._questions.get()) is not None:
                write(pipe, *question)
                del question
            pipe.close()
        except (OSError, ValueError):  # it is gone, as who reads its answers will notice
            with suppress(OSError):
                pipe.close()

    def _read(self) -> None:
        pipe: Any = self.process.stdout
        frame: Optional[Frame] = Frame("", {}, [], [], b"")
        begun = False
        while frame is not None:
            try:
                begun = begun or skip_to_start(pipe)
                frame = read(pipe) if begun else None
            except Exception as one:  # bytes of another's may be any number, and a pickle of anything
                frame, self._unreadable = None, f"has answered what cannot be read ({said(one)})"
            error = "is gone" if frame is None else frame.plain.get("error", "")
            self.trouble = "" if error == STOPPED else error
            self._answers.put(frame)
        pipe.close()


class Team:
    """This process, which is rank 0 and computes on `first`, and its workers.

    calls: see `worker_script`. seconds: how long a rank may be silent.
    """

    def __init__(self, first: torch.device, calls: Sequence[str] = (), seconds: float = USUAL.silent_seconds) -> None:
        self._first, self._calls, self._seconds = first, calls, seconds
        self._workers: list[Worker] = []
        self._count = 0
        self._group: Optional[OwnGroup] = None
        self._folder: Optional[tempfile.TemporaryDirectory[str]] = None
        self._groups = self._number = 0
        self._lock = threading.Lock()
        atexit.register(self.end)  # a process that is killed has no time for it: see `worker`

    @property
    def _called(self) -> list[Worker]:
        """The workers that are called: there may be more, of earlier calls."""
        return self._workers[: self._count]

    @property
    def processes(self) -> list[int]:
        """The numbers of the workers' processes."""
        return [worker.process.pid for worker in self._workers]

    def call(
        self, others: Sequence[torch.device], streamed: Streamed, function: Callable[..., Any], args: Any, kwargs: Any,
        *, name: str = "", budget: Optional[int] = None, look: Look = lambda: None,
    ) -> tuple[Any, str]:  # fmt: skip
        """What `streamed.call(function, args, kwargs)` returns, made by this process and a worker on each of `others`;
        and the name by which the workers hold `function`.

        name: that of an earlier call, where the function and all its weights are known to be as they were then.
        budget: bytes for each worker; None for a part of what is free on its device. look: see `Look`. Raises
        DevicesError where the workers cannot do it or do not end it, and what the call raises here.
        """
        if not self._lock.acquire(blocking=False):
            raise DevicesError("the workers are busy with another call")
        try:
            value = None if name else self._packed(function)  # before any worker is started for it
            group = self._gathered(others, look)
            name = self._hold(name, value, function, streamed.tuning, look)
            given = self._packed((args, kwargs))
            self._number += 1
            plain = dict(
                call=self._number, name=name, budget=budget, random=states(self._first), grad=torch.is_grad_enabled(),
                inference=torch.is_inference_mode_enabled(), autocast=autocast_state(self._first.type),
            )  # fmt: skip
            for worker in self._called:
                worker.ask("call", given, **plain)
            del given
            return self._together(group, streamed, function, args, kwargs), name
        finally:
            self._lock.release()

    def end(self) -> None:
        """End the workers; a later call starts others."""
        self._group = None
        for worker in self._workers:
            worker.kill()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _together(
        self, group: OwnGroup, streamed: Streamed, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        threads = torch.get_num_threads()
        try:
            if self._first.type == "cpu":
                torch.set_num_threads(self._threads(threads))
            streamed.over(group)
            return streamed.call(function, args, kwargs)
        except BaseException as error:
            for worker in self._called:
                worker.stop(self._number)
            self._group = None
            if isinstance(error, SpreadError):
                raise DevicesError(self._reason(error)) from error
            raise
        finally:
            streamed.over(None)
            torch.set_num_threads(threads)

    def _threads(self, all_of_them: int) -> int:
        """Of each process, where all compute on the same processor."""
        return max(all_of_them // (1 + self._count), 1)

    def _reason(self, error: SpreadError) -> str:
        """What ended a call: what became of the workers, or else what the ranks told each other."""
        found: list[str] = []
        for worker in self._called:
            try:
                wrong = worker.wait(_GRACE, lambda: None)
                if wrong not in ("", STOPPED):
                    found.append(f"{worker} raised {wrong}")
            except DevicesError as gone:
                found.append(str(gone))
                worker.kill()
        return found[0] if found else str(error).partition(": see what it said last")[0].rstrip(".")

    def _gathered(self, others: Sequence[torch.device], look: Look) -> OwnGroup:
        """The group of this process and a worker for each of `others`, started and joined where they are not yet."""
        workers = self._workers
        if self._count != len(others):
            self._group, self._count = None, len(others)
        for place, device in enumerate(others):
            if place < len(workers) and workers[place].device == device and self._goes_on(workers[place], look):
                continue
            for gone in workers[place : place + 1]:
                gone.kill()
            workers[place : place + 1] = [self._started(place + 1, device)]
            self._group = None
        for worker in self._called:
            worker.wait(_START, look)
            worker.ready = True
        if self._group is None:
            self._group = self._joined(look)
        self._group.on_wait = lambda: self._watch(look)
        return self._group

    def _started(self, rank: int, device: torch.device) -> Worker:
        try:
            return Worker(rank, device, self._calls)
        except OSError as error:
            raise DevicesError(f"no worker can be started ({said(error)})") from error

    def _goes_on(self, worker: Worker, look: Look) -> bool:
        """Whether a worker has ended what it was asked before, and is there."""
        try:
            worker.wait(self._seconds if worker.ready else _START, look)
        except DevicesError:
            return False
        return worker.is_there()

    def _watch(self, look: Look) -> None:
        """While this rank waits for others. Raises SpreadError where one of them has failed outside of the call."""
        look()
        for worker in self._called:
            if worker.trouble:
                raise SpreadError(f"{worker} {worker.trouble}")

    def _joined(self, look: Look) -> OwnGroup:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="patchconv-", ignore_cleanup_errors=True)
        folder, count = Path(self._folder.name), 1 + self._count
        with suppress(OSError):  # it is gone with its group, or, on Windows, still open somewhere
            (folder / str(self._groups)).unlink()
        self._groups += 1
        path, threads = folder / str(self._groups), self._threads(torch.get_num_threads())
        for place, worker in enumerate(self._called):
            worker.ask(
                "join", folder=str(folder), path=str(path), rank=place + 1, count=count, seconds=self._seconds,
                device=str(worker.device), threads=threads,
            )  # fmt: skip
        made: list[Any] = []
        thread = threading.Thread(target=_make, args=(made, path, count, self._seconds), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK)
            look()
            if not all(worker.is_there() for worker in self._called):
                break
        self._all_done(self._seconds, look, "join the others")
        thread.join(self._seconds)
        if not made or not isinstance(made[0], OwnGroup):
            raise DevicesError(f"the workers cannot be joined: {said(made[0]) if made else 'they do not come'}")
        return made[0]

    def _hold(
        self, name: str, value: Optional[Packed], function: Callable[..., Any], tuning: Tuning, look: Look
    ) -> str:
        """Have all workers hold a function; the name by which they do."""
        if name and all(name in worker.held for worker in self._called):
            return name
        value = value or self._packed(function)
        name = value.name
        for worker in self._called:
            if name in worker.held:
                continue
            drop = worker.held[: len(worker.held) - _HELD + 1]
            worker.held = worker.held[len(drop) :]
            worker.ask("hold", value, name=name, drop=drop, tuning=tuning)
        self._all_done(_START, look, "have the model")
        return name

    def _all_done(self, seconds: float, look: Look, what: str) -> None:
        """Wait for the answers of all workers to what they were asked last. Raises DevicesError where one cannot."""
        answers = [(worker, worker.wait(seconds, look)) for worker in self._called]
        for worker, wrong in answers:
            if wrong:
                raise DevicesError(f"{worker} cannot {what}: {wrong}")

    def _packed(self, value: Any) -> Packed:
        try:
            return packed(value, self._first)
        except CannotSendError as error:
            raise DevicesError(f"the model cannot be sent to other processes ({error})") from error


def _make(made: list[Any], path: Path, count: int, seconds: float) -> None:
    try:
        made.append(OwnGroup(path, 0, count, seconds))
    except Exception as error:
        made.append(error)
