"""What a worker process does: it is asked by frames to join a group, to hold functions, and to call them."""

from __future__ import annotations

import importlib
import os
import queue
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any, BinaryIO, NoReturn, Optional

import torch

from ...memory.usage import free
from ...streaming import OwnGroup, SpreadError, Streamed
from ..memory_estimates import OF_FREE
from .draws import set_states
from .frames import Frame, begin, read, write
from .packing import STOPPED, said, unpacked

IDLE = 900.0
"""Seconds without a question after which a worker ends, and gives its memory back."""

_PARENT = 1.0
"""Seconds between two looks at whether the host is there."""


class _StoppedError(Exception):
    """The host does not want the call any more."""


class _Requests:
    """What the host asks, read while the worker works. With the host's end the process ends, whatever it does."""

    def __init__(self, file: BinaryIO) -> None:
        self.stopped = 0
        self.folder = ""
        self._file, self._parent = file, os.getppid()
        self._frames: queue.Queue[Frame] = queue.Queue()
        threading.Thread(target=self._read, name="patchconv requests", daemon=True).start()
        threading.Thread(target=self._look, name="patchconv parent", daemon=True).start()

    def next(self) -> Optional[Frame]:
        """The next one; None where none came for long."""
        try:
            return self._frames.get(timeout=IDLE)
        except queue.Empty:
            return None

    def _read(self) -> None:
        while True:
            try:
                frame = read(self._file)
            except Exception:  # nothing that is asked from now on could be answered
                traceback.print_exc()
                self.end(1)
            if frame is None:
                self.end()
            elif frame.kind == "stop":
                self.stopped = frame.plain["call"]
            else:
                self._frames.put(frame)

    def _look(self) -> None:
        """Other processes of the host may hold the pipe open when it is gone."""
        while os.getppid() == self._parent:
            time.sleep(_PARENT)
        self.end()

    def end(self, status: int = 0) -> NoReturn:
        """End this process because the host is gone."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)  # the host's, which may have had no time for it
        os._exit(status)

    def leave(self, status: int = 0) -> NoReturn:
        """End this process before the host, whose folder other workers go on using.

        At once: Python would take itself apart, and abort on what `_read` waits for.
        """
        for file in (sys.stdout, sys.stderr):
            with suppress(Exception):  # there is none, or nobody reads it
                file.flush()
        os._exit(status)


class _Held:
    """A function that was sent, and what calls it."""

    def __init__(self, function: Callable[..., Any], streamed: Streamed) -> None:
        self.function, self.streamed = function, streamed


class _Worker:
    def __init__(self, requests: _Requests) -> None:
        self._requests = requests
        self._device = torch.device("cpu")
        self._group: Optional[OwnGroup] = None
        self._held: dict[str, _Held] = {}
        self._call = 0

    def join(self, frame: Frame) -> None:
        given = frame.plain
        self._device = torch.device(given["device"])
        if self._device.type == "cpu":
            torch.set_num_threads(given["threads"])
        elif hasattr(of_device := getattr(torch, self._device.type), "set_device"):
            of_device.set_device(self._device)
        self._requests.folder = given["folder"]
        self._group = None
        self._group = OwnGroup(given["path"], given["rank"], given["count"], given["seconds"], self._look)

    def hold(self, frame: Frame) -> None:
        for name in frame.plain["drop"]:
            self._held.pop(name, None)
        function = unpacked(frame.looks, frame.received, frame.rest, self._device)
        streamed = Streamed(on_progress=self._look, tuning=frame.plain["tuning"])
        self._held[frame.plain["name"]] = _Held(function, streamed)

    def call(self, frame: Frame) -> None:
        given, self._call = frame.plain, frame.plain["call"]
        held = self._held[given["name"]]
        held.streamed.over(self._group)
        held.streamed.budget = given["budget"] or int(OF_FREE * free(self._device)) or 1
        set_states(self._device, given["random"])
        dtype, casts = given["autocast"]
        with (
            torch.inference_mode() if given["inference"] else nullcontext(),
            torch.set_grad_enabled(given["grad"]),
            torch.autocast(self._device.type, dtype) if casts else nullcontext(),
        ):
            args, kwargs = unpacked(frame.looks, frame.received, frame.rest, self._device)
            held.streamed.call(held.function, args, kwargs)

    def _look(self, *_: int) -> None:
        if self._requests.stopped >= self._call:
            raise _StoppedError


def serve(requests: BinaryIO, answers: BinaryIO, calls: Sequence[str]) -> NoReturn:
    """Do what is asked until the host is gone, or asks nothing for long. calls: made first; see `worker_script`."""
    coming = _Requests(requests)
    try:
        _answer_all(coming, answers, calls)
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, OSError):  # nobody reads the answers; where the host is gone, threads notice and end this
            time.sleep(2 * _PARENT)
        coming.leave(1)
    coming.leave()


def _answer_all(coming: _Requests, answers: BinaryIO, calls: Sequence[str]) -> None:
    worker = _Worker(coming)
    for call in calls:
        module, _, name = call.partition(":")
        getattr(importlib.import_module(module), name)()
    begin(answers)
    write(answers, "ready", {})
    while (frame := coming.next()) is not None:
        error = ""
        try:
            getattr(worker, frame.kind)(frame)
        except (SpreadError, _StoppedError):
            error = STOPPED
        except Exception as one:
            error = said(one)
        write(answers, frame.kind, {"name": frame.plain.get("name", ""), "error": error})
        del frame
