"""Measures what a decode, an encode or a sampling takes, and tells the front end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Optional, Protocol

import torch
from comfy.patcher_extension import WrappersMP  # pyright: ignore[reportMissingImports]
from comfy_execution.utils import get_executing_context  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from ..comfyui_patchconv.conv.transforms import is_compiled
from ..comfyui_patchconv.hosts.calls import device_of
from ..comfyui_patchconv.hosts.clones import Wrapper
from ..comfyui_patchconv.hosts.devices.spread import Outcome
from ..comfyui_patchconv.hosts.eager_needs import EagerNeeds, without_values
from ..comfyui_patchconv.hosts.figures import Figures, State
from ..comfyui_patchconv.hosts.modes import RunMode
from ..comfyui_patchconv.memory.recorder import Recorder
from ..comfyui_patchconv.units import size_of
from .front_end import Messenger
from .host import outside_recording

_log = logging.getLogger(__name__)

EVENT = "patchconv.report"
"""`node`: the id of a Patch Conv node. `prompt`: the run's. The rest is of `Figures.as_json`."""

_KEY = "patchconv"  # of our wrappers among those of a model
_MEASURED = ("cpu", "cuda")  # device types whose memory `Recorder` reads
_INTERVAL, _SAMPLES = 0.01, 256  # of the timeline: from 100 samples a second down, as the run grows
_LIVE = 1.0  # seconds between two states of a run that goes on


class Counter(Protocol):
    """Counts strips while they run."""

    strips: int

    def start(self) -> None: ...


class Meter:
    """Measures the runs of one part of a model that a Patch Conv node has patched.

    node: the node's id. figures: of the last run that got anywhere; None before it. prompt: the id of its prompt.
    A run is what one node of the workflow does at a stretch: calls of `measuring` from one `start` to the next.
    """

    def __init__(self, node: str, part: str, streamed: bool, device: torch.device, counter: Counter) -> None:
        self.node, self.part, self.streamed, self.device, self.counter = node, part, streamed, device, counter
        self.figures: Optional[Figures] = None
        self.prompt = ""
        self._messenger = Messenger(EVENT)
        self._recorder: Optional[Recorder] = None
        self._before = Figures(part, streamed)
        self._fresh, self._where, self._next = True, None, 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Meter:
        return self  # a copied model reports to the same node

    def start(self) -> None:
        """Let the next call begin a run. Whoever calls this has started the counter, which may know what is to come."""
        self._fresh = True

    def chosen(self, way: RunMode, why: str) -> None:
        """Note how the call that is measured runs, and why; called again where that changes in the midst of it."""
        self.streamed = way == "stream"
        self.counter.strips = 0
        self._before.streamed, self._before.why = self.streamed, why

    def missed(self, expected: int) -> None:
        """Note that a budget could not be kept, and what was expected instead."""
        self._before.missed = f"the budget could not be kept: {size_of(expected)} were expected"
        _log.warning("Patch Conv: %s: %s.", self.part, self._before.missed)

    @contextmanager
    def measuring(self, eager: Callable[[], int]) -> Iterator[None]:
        """Measure one call, around which this is put. eager: asked later for the bytes that it needs without us, or 0.

        A call that raises is told as stopped, whether by the user or by an error.
        """
        self._begin()
        recorder = None
        if self.device.type in _MEASURED:
            # The allocator's peak is the host's own: it is read and never set back, as it could not be put back after.
            recorder = Recorder(self.device, _INTERVAL, own_peak=False, samples=_SAMPLES)
        try:
            with recorder or nullcontext():
                self._recorder = recorder
                yield
        except BaseException:
            self._tell(self._with(recorder), "stopped")
            raise
        finally:
            self._recorder = None
        self._before = self._with(recorder)
        if self.streamed or self.counter.strips > 1:  # else it ran eagerly
            self._before.eager = max(self._before.eager, eager())
        self._tell(self._before, "done")

    def spread(self, outcome: Outcome) -> None:
        """Note on what a call ran, of several devices; what spoke against them stays for the whole run."""
        self._before.over = outcome.over
        self._before.alone = outcome.alone or self._before.alone

    def ran(self, eager: bool) -> None:
        """Note whether a call that might have been streamed ran eagerly, for strips would have been no help."""
        self._before.ran_eagerly = eager and self._before.ran_eagerly is not False

    def look(self) -> None:
        """Tell how far it is, now and then; called after each strip."""
        now = time.monotonic()
        if self._recorder is None or now < self._next:
            return
        self._next = now + _LIVE
        self._recorder.update()
        self._tell(self._with(self._recorder), "running")

    def _begin(self) -> None:
        """Begin one more call, of a new run or of the one before."""
        where = get_executing_context()
        if self._fresh or where != self._where:
            if not self._fresh:
                self.counter.start()
            self._fresh, self._where = False, where
            self.prompt = where.prompt_id if where is not None else ""
            self._before = Figures(self.part, self.streamed)
        self._next = time.monotonic() + _LIVE

    def _with(self, recorder: Optional[Recorder]) -> Figures:
        """Add one more call, that of `recorder`, to a copy of the run's figures."""
        figures = replace(self._before, timeline=[*self._before.timeline])
        if recorder is None:
            figures.calls += 1
        else:
            figures.add(recorder)
        return figures

    def _tell(self, figures: Figures, state: State) -> None:
        figures.strips, figures.state = 0 if figures.ran_eagerly else self.counter.strips, state
        self.figures = figures
        self._messenger.tell({"node": self.node, "prompt": self.prompt, **figures.as_json()})


class Measured(Wrapper):
    """Stands in for a VAE's `decode` or `encode`, `forward`, and measures it. The host records no allocation of it."""

    def __init__(self, forward: Callable[..., Any], meter: Meter, eager: Callable[[], int]) -> None:
        self.forward, self.meter, self.eager = forward, meter, eager

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        samples = 1
        if args and isinstance(args[0], Tensor):
            samples, self.meter.device = args[0].shape[0], device_of(args, kwargs)  # a clone may be on another one
        with self.meter.measuring(lambda: samples * self.eager()), outside_recording():
            return self.forward(*args, **kwargs)


class MeasuredSampling:
    """Measures each sampling with a model, and counts what one call of its network would need without us."""

    def __init__(self, network: nn.Module, meter: Meter) -> None:
        self.meter = meter
        self._eager_needs = EagerNeeds(network)
        self._call: Optional[list[Any]] = None

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrap a whole sampling, for the host."""
        before, self._call = self._call, []
        self.meter.counter.start()
        self.meter.start()
        try:
            with self.meter.measuring(self._eager):
                return executor(*args, **kwargs)
        finally:
            self._call = before  # objects of other packs may hold what they like

    def note(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrap a call of the network, for the host: the first of a sampling stands for all. None of one that is
        compiled."""
        if self._call is not None and not self._call and not is_compiled():
            # Not what other nodes pass on in dictionaries: that is not ours to run.
            self._call = [without_values({} if isinstance(value, dict) else value) for value in args]
        return executor(*args, **kwargs)

    def _eager(self) -> int:
        if not self._call:
            return 0
        dtype = getattr(self._call[0], "dtype", None)
        return self._eager_needs.of_call("__call__", self._call, {}, self.meter.device, dtype)


def measure_sampling(model: Any, meter: Meter) -> None:
    """Have the host measure what is sampled with `model`, a copy made for it; the last node of several counts."""
    measured = MeasuredSampling(model.model.diffusion_model, meter)
    for kind, wrapper in ((WrappersMP.SAMPLER_SAMPLE, measured.sample), (WrappersMP.DIFFUSION_MODEL, measured.note)):
        model.remove_wrappers_with_key(kind, _KEY)
        model.add_wrapper_with_key(kind, _KEY, wrapper)


def meters_of(vae: Any = None, model: Any = None) -> list[Meter]:
    """Find the meters that Patch Conv nodes have put on a VAE and on a model."""
    patcher = getattr(vae, "patcher", None)  # what a checkpoint without a VAE gives has none
    patches = {} if patcher is None else patcher.object_patches
    found = [one for one in patches.values() if isinstance(one, Measured)]
    sampling = [] if model is None else model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, _KEY)
    return [one.meter for one in (*found, *(wrapper.__self__ for wrapper in sampling))]
