"""Estimates of the memory that a VAE's decode or encode takes, which hosts are told, for them to make room."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ..conv.strip_sizes import working_set
from ..streaming import Expected, Make, expect
from .attributes import HOST_ATTRIBUTES
from .eager_needs import EagerNeeds

MARGIN = 1.1
"""Of what a host makes room by, over what was counted."""

OF_FREE = 0.8
"""Share of the free memory that an automatic budget takes: the rest is for what a count does not see."""

_ROOM = MARGIN / OF_FREE
"""Of what a host makes room by for eager, over what that needs: then it is within the share that may be taken."""

EAGER_WORKSPACE = 0.3
"""What eager takes over its maps, for what convolutions work in: 0.27 of them in Stable Diffusion's decoder at 1024²,
0.30 in Wan's at 256², measured on CPUs in float32."""

_MORE_WORK = 1.25
"""How much more a VAE's chunks may be to compute all at once than one by one."""

_log = logging.getLogger(__name__)

HostEstimate = Callable[[Any, torch.dtype], float]
_Input = tuple[tuple[int, ...], torch.dtype]


class Estimate(ABC):
    """Stands in for a VAE's `memory_used_decode` or `memory_used_encode`: bytes for an input of a shape and dtype.

    `_count` counts one sample, once for each shape. The host's own estimate is the upper bound, and the answer where
    the VAE's code cannot be counted.

    vae: what holds a VAE: its `first_stage_model` and `device`. method: `"decode"` or `"encode"` of that model. host:
    the estimate that the VAE came with. starts: called at every question, which hosts ask once at the start of each
    decode or encode.
    """

    def __init__(self, vae: Any, method: str, host: HostEstimate, starts: Sequence[Callable[[], None]] = ()) -> None:
        self.model, self.device = vae.first_stage_model, torch.device(vae.device)
        self.method, self.host, self.starts = method, host, (*starts,)
        self._eager = EagerNeeds(self.model)
        self._counted: dict[_Input, float] = {}
        self._asked: Optional[_Input] = None

    def __call__(self, shape: Any, dtype: torch.dtype) -> float:
        for start in self.starts:
            start()
        key = self._asked = (tuple(shape)[1:], dtype)
        if key not in self._counted:
            try:
                self._counted[key] = self._count((1, *key[0]), dtype) * MARGIN
            except Exception as error:  # the host's code is free to do what tensors without values cannot
                _log.info("Patch Conv: %s of %s not counted (%s).", self.method, type(self.model).__name__, error)
                self._counted[key] = float("inf")
        return min(self.host(shape, dtype), self._counted[key])

    def eager(self) -> int:
        """Count the bytes that the maps of one sample, of the input last asked about, need at once without us; 0 where
        that is impossible."""
        if self._asked is None:
            return 0
        sample, dtype = self._asked
        try:
            return self._eager_needs((1, *sample), dtype)
        except Exception:  # as above
            return 0

    def _eager_needs(self, sample: tuple[int, ...], dtype: torch.dtype) -> int:
        """Count the same for an input of shape `sample`. Raises what the VAE's code raises."""
        return self._eager.of((sample, dtype), self._run(sample, dtype), self.device, dtype)

    def _run(self, sample: tuple[int, ...], dtype: torch.dtype) -> Callable[[Any, Make], object]:
        """Make a function that has a copy decode or encode as the host does, into the host's tensor if it takes one."""

        def run(copy: Any, make: Make) -> Any:
            options = {}
            if self.method == "decode" and getattr(copy, "comfy_has_chunked_io", False):
                options["output_buffer"] = make(copy.decode_output_shape(sample), dtype, counted=False)
            return getattr(copy, self.method)(make(sample, dtype), **options)

        return run

    @abstractmethod
    def _count(self, sample: tuple[int, ...], dtype: torch.dtype) -> float:
        """Count the bytes for an input of shape `sample`."""


class StripEstimate(Estimate):
    """Estimates a VAE whose convolutions run in strips: its activations, and the working set of a strip.

    splits, threshold: as of a `Tiling`.
    """

    def __init__(
        self, vae: Any, method: str, host: HostEstimate, *, splits: int, threshold: int,
        starts: Sequence[Callable[[], None]] = (),
    ) -> None:  # fmt: skip
        super().__init__(vae, method, host, starts)
        self.splits, self.threshold = splits, threshold

    def _count(self, sample: tuple[int, ...], dtype: torch.dtype) -> float:
        maps = self._eager_needs(sample, dtype)
        return maps + working_set(maps, self.splits, self.threshold, self.device.type, dtype.itemsize)


class Needs(NamedTuple):
    """Bytes that one sample needs: eagerly, and with its convolutions in strips. Both with what operators work in."""

    eager: int
    patch: int


def needs_of(maps: int, splits: int, threshold: int, device_type: str, dtype: torch.dtype) -> Needs:
    """What a sample needs whose feature maps take so many bytes at once. splits, threshold: as of a `Tiling`."""
    eager = int((1 + EAGER_WORKSPACE) * maps)
    return Needs(eager, min(maps + working_set(maps, splits, threshold, device_type, dtype.itemsize), eager))


class StreamEstimate(Estimate):
    """Estimates a VAE that is streamed: the peaks of the schedules, and what is stored beside them.

    part: the method of the model that is streamed, as `"decoder.forward"`; or all of `method` at once where that takes
    less: of a video that comes to the part in chunks, whose last frames are kept for the next one. Empty for all of
    `method` in any case. budget: bytes to stay within, 0 for no limit. on_work: called with the work to come, in the
    units of `OnProgress`, at every question; 0 where it is not known.
    """

    def __init__(
        self, vae: Any, method: str, host: HostEstimate, *, budget: int, part: str = "",
        on_work: Optional[Callable[[int], None]] = None, starts: Sequence[Callable[[], None]] = (),
    ) -> None:  # fmt: skip
        super().__init__(vae, method, host, starts)
        self.budget, self.part, self.on_work = budget or None, part, on_work
        self._work: dict[_Input, int] = {}
        self._at_once: dict[_Input, bool] = {}

    def __call__(self, shape: Any, dtype: torch.dtype) -> float:
        answer = super().__call__(shape, dtype)
        if self.on_work is not None and self._asked is not None:
            self.on_work(shape[0] * self._work.get(self._asked, 0))
        return answer

    def at_once(self, input: Tensor) -> bool:
        """Tell whether all of `method` takes less than the part's calls; count it if that was not done yet."""
        key = (tuple(input.shape)[1:], input.dtype)
        if key not in self._at_once:
            with suppress(Exception):  # the host's code is free to do what tensors without values cannot
                self._count((1, *key[0]), input.dtype)
        return self._at_once.setdefault(key, False)

    def _count(self, sample: tuple[int, ...], dtype: torch.dtype) -> float:
        return self.expected(sample, dtype).peak

    def expected(
        self, sample: tuple[int, ...], dtype: torch.dtype, report: Optional[dict[str, int]] = None
    ) -> Expected:
        """Count all that an input of shape `sample` takes, streamed by the part or all at once, whichever takes less.
        report: filled with the operators that are evaluated whole. Raises what the VAE's code raises."""
        of_part: dict[str, int] = {}
        of_all: dict[str, int] = {}
        expected = self._expect(self.part, sample, dtype, of_part)
        chosen, at_once = expected, False
        if self.part not in ("", self.method) and expected.calls != 1:
            # No call: the method runs what is inside the part by itself. Several: it decodes in chunks.
            with suppress(Exception):
                chosen = self._expect("", sample, dtype, of_all)
                at_once = chosen.peak < expected.peak or not expected.calls
                at_once = at_once and (not expected.work or chosen.work <= _MORE_WORK * expected.work)
        chosen = chosen if at_once else expected
        key = (sample[1:], dtype)
        self._work[key], self._at_once[key] = chosen.work, at_once
        self._eager.learn((sample, dtype), expected.eager)
        if report is not None:
            report.update(of_all if at_once else of_part)
        return chosen

    def _expect(self, part: str, sample: tuple[int, ...], dtype: torch.dtype, report: dict[str, int]) -> Expected:
        return expect(
            self.model, self._run(sample, dtype), part=part, budget=self.budget, device=self.device, dtype=dtype,
            attributes=HOST_ATTRIBUTES, report=report,
        )  # fmt: skip


class AutoEstimate(StreamEstimate):
    """Estimates a VAE that may run in any way: what eager needs where the device has that, else what streaming needs.

    A host makes room for what it is told and takes as many samples at once as that goes into what is free: these are to
    run eagerly (see `AutoForward`), so it is told as much even where its own estimate is less.

    total: asked for the bytes that the device has in all. splits, threshold: as of a `Tiling`, for strips. The rest is
    of `StreamEstimate`.
    """

    def __init__(
        self, vae: Any, method: str, host: HostEstimate, *, total: Callable[[], int], splits: int, threshold: int,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(vae, method, host, **options)
        self.total, self.splits, self.threshold = total, splits, threshold

    def __call__(self, shape: Any, dtype: torch.dtype) -> float:
        answer = super().__call__(shape, dtype)
        eager, total = self._needs((1, *tuple(shape)[1:]), dtype).eager, self.total()
        allowed = self.budget or float("inf")
        if eager > min(OF_FREE * total, allowed):
            return answer
        room = _ROOM * eager
        if shape[0] * eager > allowed:  # however much is free, no more samples than are allowed
            room = max(room, eager * total / allowed)
        return max(answer, room)

    def needs(self, input: Tensor) -> Needs:
        """Tell what one sample of `input` `[N, …]` needs; the host's own estimate where it cannot be counted."""
        return self._needs((1, *input.shape[1:]), input.dtype)

    def _needs(self, sample: tuple[int, ...], dtype: torch.dtype) -> Needs:
        try:
            maps = self._eager_needs(sample, dtype)
        except Exception:  # the host's code is free to do what tensors without values cannot
            whole = int(self.host(sample, dtype))
            return Needs(whole, whole)
        return needs_of(maps, self.splits, self.threshold, self.device.type, dtype)
