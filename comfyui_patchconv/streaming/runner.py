"""Where each call arrives: it runs eagerly, or is recorded, and its schedule is kept for calls that are alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from ..memory.allocator import trim
from .call import Call, OnProgress, arguments, is_map, joins, replaced, signature
from .fallback import eager_reason, undisturbed
from .plan.schedule import USUAL, Tuning
from .record.operators.common import default_dim
from .spread.ranks import Ranks
from .spread.results import Band, InBands

_SMALL = 64 << 20
"""Bytes at once up to which a call is left to eager that is like one for which eager did: recording it took longer."""

_LARGE = 96 << 20
"""Bytes at once from which a call takes much longer than the C library takes to hand back what it keeps of them."""

_MOST = 64
"""Such calls that are remembered."""


class Streamed:
    """Calls functions in strips, and keeps their schedules for calls that are alike. The arguments are those of
    `streamed`.

    budget: may be changed between calls; a schedule is kept as long as it suits. least: whether the schedule without a
    budget, which takes least, is taken wherever it is within the budget, rather than the one that computes least: for
    a budget that is what happens to be free. calls: how many had something to stream. last: the `Call` that was
    recorded last; a small one that is left to eager is not recorded. ran_eagerly: whether the last one did all as
    eager does, for strips would be no help: as much memory, or much longer. sent, messages: bytes that this rank has
    sent to others of its group, and in how many pieces.
    """

    def __init__(
        self, budget: Optional[int] = None, report: Optional[dict[str, int]] = None,
        on_progress: Optional[OnProgress] = None, tuning: Tuning = USUAL, group: Any = None,
    ) -> None:  # fmt: skip
        if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget <= 0):
            raise ValueError(f"budget is {budget!r}: give a whole number of bytes above 0, or None for no limit.")
        self.budget, self.tuning, self.on_progress = budget, tuning, on_progress
        self.least = False
        self.report: dict[str, int] = {} if report is None else report
        self.calls = 0
        self.last: Optional[Call] = None
        self.ran_eagerly = False
        self._schedules: OrderedDict[Any, Any] = OrderedDict()
        self._eager: OrderedDict[Any, int] = OrderedDict()
        self._large: OrderedDict[Any, int] = OrderedDict()
        self._ranks: Optional[Ranks] = None
        self.over(group)

    def over(self, group: Any) -> None:
        """Have the calls from now on made together by the ranks of `group`; None for this process alone."""
        self._in_bands = isinstance(group, InBands)
        group = group.group if isinstance(group, InBands) else group
        ranks = None if group is None else Ranks(group, self.tuning.silent_seconds)
        self._ranks = ranks if ranks is not None and ranks.count > 1 else None

    @property
    def sent(self) -> int:
        return 0 if self._ranks is None else self._ranks.sent

    @property
    def messages(self) -> int:
        return 0 if self._ranks is None else self._ranks.messages

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What `function(*args, **kwargs)` returns."""
        if joins(args, kwargs):
            return function(*args, **kwargs)
        result = self._call(function, args, kwargs)
        return replaced(result, self._in_its_band) if self._in_bands else result

    def _in_its_band(self, value: Any) -> Any:
        """This rank's band of a map that is there as a whole; anything else as it is."""
        dim = default_dim(value.shape) if is_map(value) else None
        if dim is None:
            return value
        rank, count = (0, 1) if self._ranks is None else (self._ranks.rank, self._ranks.count)
        return Band.of(value, dim, rank, count)

    def _call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The same, where it is no part of another streamed call."""
        self.ran_eagerly = False
        reason = eager_reason(args, kwargs)
        if reason is not None:
            self.report[reason] = self.report.get(reason, 0) + 1
            return function(*args, **kwargs)
        if not any(is_map(value) for value in (*args, *kwargs.values())):
            self.calls += any(isinstance(value, Tensor) and not value.numel() for value in (*args, *kwargs.values()))
            return function(*args, **kwargs)
        if self._ranks is not None:
            with self._ranks.call():
                return self._record(function, args, kwargs)[0]
        given = arguments(function, args, kwargs)
        looked_at = given not in self._large and not torch.is_grad_enabled() and not self.tuning.always
        alike = signature(function, given) if looked_at else None
        if alike in self._eager and self._is_small(self._eager[alike]):
            self.calls += 1
            self.ran_eagerly = True
            return function(*args, **kwargs)
        result, call = self._record(function, args, kwargs)
        if alike is not None:
            if call.eager_peak > _SMALL:
                _remember(self._large, given, call.eager_peak)
            elif not call.in_strips and self._is_small(call.eager_peak):
                _remember(self._eager, alike, call.eager_peak)
        return result

    def _record(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Call]:
        """The same, recorded and run in strips, and the call; another thread may have begun one since."""
        self.last = call = Call(
            self.budget, self.report, self.on_progress, self.tuning, self._schedules, ranks=self._ranks,
            in_bands=self._in_bands, least=self.least,
        )  # fmt: skip
        with undisturbed():
            result = call.run(function, args, kwargs)
        self.calls += call.recorder.deferred > 0
        self.ran_eagerly = call.recorder.deferred > 0 and not call.in_strips
        if call.on_cpu and call.peak > _LARGE:
            trim()  # the program may make more such calls, as for a video's chunks, and holds what they gave meanwhile
        return result, call

    def _is_small(self, eager_peak: int) -> bool:
        """Whether a call that did as eager does takes so little that one like it need not be looked at."""
        return eager_peak <= (_SMALL if self.budget is None else min(self.budget, _SMALL))


def _remember(calls: OrderedDict[Any, int], key: Any, eager_peak: int) -> None:
    calls[key] = eager_peak
    while len(calls) > _MOST:
        calls.popitem(last=False)
