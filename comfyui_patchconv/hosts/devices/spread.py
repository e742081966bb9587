"""Runs a stand-in's call over several devices, or over one where that cannot be, with the reason."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import torch

from ...streaming import USUAL, Streamed
from .draws import set_states, states
from .team import DevicesError, Look, Team

WORKERS = "PATCHCONV_CPU_WORKERS"
"""Variable of the environment: how many workers there are where the device is the CPU."""

ONE, ALL = "one", "all"
CHOICES = (ONE, ALL, *map(str, range(2, 9)))
"""What users choose between: this device, all that the machine has, or so many of them."""

_MOST = 64

_log = logging.getLogger(__name__)
_teams: dict[Any, Team] = {}


class Outcome(NamedTuple):
    """over: what a call ran on, as `"2 devices"`; empty for one. alone: why it ran on one though more were asked
    for."""

    over: str = ""
    alone: str = ""


OnOutcome = Callable[[Outcome], None]


def check_choice(wanted: Any) -> None:
    """Raise ValueError, in a sentence, for what is not of `CHOICES`, nor another number of devices."""
    if wanted not in CHOICES and not (isinstance(wanted, str) and wanted.isdecimal() and int(wanted) > 0):
        raise ValueError(f"devices is {wanted!r}: use {ONE}, {ALL} or a number of devices such as 2.")


def others_than(first: torch.device) -> list[torch.device]:
    """The devices that may help `first`: all others of its kind, or the CPU as often as `PATCHCONV_CPU_WORKERS` says.
    Raises ValueError, in a sentence, where that is no such number."""
    if first.type == "cpu":
        text = os.environ.get(WORKERS, "") or "0"
        if not text.isdecimal() or int(text) > _MOST:
            raise ValueError(f"{WORKERS} is {text!r}: use a whole number of worker processes up to {_MOST}.")
        return [torch.device("cpu")] * int(text)
    kind: Any = getattr(torch, first.type, None)
    count = kind.device_count() if hasattr(kind, "device_count") else 1
    own = first.index if first.index is not None or count < 2 else kind.current_device()
    return [torch.device(first.type, index) for index in range(count) if index != own] if count > 1 else []


class Spread:
    """The devices of the calls of one stand-in and its copies.

    wanted: of `CHOICES`. calls: see `worker_script`. look: called again and again while this process waits for others;
    what it raises ends the call on all. on_outcome: told of each call what it ran on. seconds: how long a rank may be
    silent.
    """

    def __init__(
        self, wanted: str, calls: Sequence[str] = (), look: Look = lambda: None,
        on_outcome: Optional[OnOutcome] = None, seconds: float = USUAL.silent_seconds,
    ) -> None:  # fmt: skip
        check_choice(wanted)
        self._wanted, self._calls, self._look = wanted, (*calls,), look
        self._on_outcome, self._seconds = on_outcome, seconds
        self._function: Any = None
        self._name = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Spread:
        return self  # a copied model is asked of the same workers

    def start(self) -> None:
        """Begin a decode or encode: weights may be others now."""
        self._function, self._name = None, ""

    def call(
        self, streamed: Streamed, function: Callable[..., Any], args: Any, kwargs: Any, device: torch.device,
        shared: bool,
    ) -> Any:  # fmt: skip
        """What `streamed.call(function, args, kwargs)` returns. device: this process's. shared: whether the budget is a
        part of what is free on it, rather than what the user allows."""
        others = others_than(device)
        if self._wanted != ALL:
            others = others[: int(self._wanted) - 1 if self._wanted != ONE else 0]
        if not others:
            self._tell(Outcome(alone="" if self._wanted in (ONE, "1") else _only(device)))
            return streamed.call(function, args, kwargs)
        lists = _Lists((args, kwargs))
        drawn, whole = states(device), streamed.budget
        if shared and device.type == "cpu" and whole is not None:
            streamed.budget = whole // (1 + len(others)) or 1
        on_each = None if shared and device.type != "cpu" else streamed.budget
        known = self._name if self._function == function else ""
        outcome = Outcome(_over(1 + len(others), device))
        try:
            result, self._name = team_of(device, self._calls, self._seconds).call(
                others, streamed, function, *lists.copied, name=known, budget=on_each, look=self._look
            )  # fmt: skip
            self._function = function
            lists.keep()
            self._tell(outcome)
            return result
        except DevicesError as error:
            outcome = Outcome(alone=str(error))
        finally:
            streamed.budget = whole
        # Here, where nothing holds what the call had any more.
        _log.warning("Patch Conv: on one device: %s.", outcome.alone)
        self._tell(outcome)
        set_states(device, drawn)
        return streamed.call(function, args, kwargs)

    def _tell(self, outcome: Outcome) -> None:
        if self._on_outcome is not None:
            self._on_outcome(outcome)


def team_of(first: torch.device, calls: Sequence[str] = (), seconds: float = USUAL.silent_seconds) -> Team:
    """The one that this process has for a device, with whoever asks."""
    key = str(first), (*calls,), seconds
    if key not in _teams:
        _teams[key] = Team(first, calls, seconds)
    return _teams[key]


def end_all() -> None:
    """End all workers of this process."""
    while _teams:
        _teams.popitem()[1].end()


def _over(count: int, device: torch.device) -> str:
    return f"{count} processes" if device.type == "cpu" else f"{count} devices"


def _only(device: torch.device) -> str:
    if device.type == "cpu":
        return f"there is no other than the CPU ({WORKERS}=2 would have two more processes compute on it)"
    return f"there is no other than {device}"


class _Lists:
    """The arguments of a call, in which lists and dictionaries are copies: what the call puts into them is kept only
    where it ends well."""

    def __init__(self, value: Any) -> None:
        self._pairs: list[tuple[Any, Any]] = []
        self._originals: dict[int, Any] = {}
        self.copied = self._copy(value)

    def _copy(self, value: Any) -> Any:
        kind = type(value)
        if kind is tuple:
            return tuple(self._copy(one) for one in value)
        if kind not in (list, dict):
            return value
        for original, copied in self._pairs:
            if original is value:
                return copied
        copied: Any = kind()
        self._pairs.append((value, copied))
        self._originals[id(copied)] = value
        if kind is list:
            copied.extend(self._copy(one) for one in value)
        else:
            copied.update((key, self._copy(one)) for key, one in value.items())
        return copied

    def keep(self) -> None:
        """Put what is in the copies into the originals."""
        for original, copied in self._pairs:
            if isinstance(original, list):
                original[:] = [self._originals.get(id(one), one) for one in copied]
            else:
                now = {key: self._originals.get(id(one), one) for key, one in copied.items()}
                original.clear()
                original.update(now)
