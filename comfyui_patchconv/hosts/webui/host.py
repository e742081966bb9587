"""What the toggle asks of the WebUI: whether to stop, how to show what takes long, and a rough picture in a hurry."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.nn import functional as F

_SCALE = 8
"""Pixels for each of a latent's, along a side, in the WebUI's models."""

_STEPS = 1000
"""What a decode counts as in the WebUI's bar, which counts sampling steps."""

_SHOWN = ("textinfo", "sampling_step", "sampling_steps", "current_image_sampling_step", "time_start")


class Host:
    """Reads and writes the `state` that the WebUI shares between a run, its buttons and its progress bar.

    cheap: makes a picture of latents by their channels alone, without a model, in the latents' size.
    previews: the module whose `single_sample_to_image` makes live previews.
    clock: the time, in the seconds that `state.time_start` is in.
    calls: functions as `module:name` by which a worker process is prepared to import models.
    imported: makes a context in which what models call is as it is imported; see `AsImported`.
    """

    def __init__(
        self, state: Any, cheap: Callable[[Tensor], Tensor], previews: Any, clock: Callable[[], float] = time.time,
        calls: Sequence[str] = (), imported: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:  # fmt: skip
        self.previews, self.calls, self.imported = previews, calls, imported
        self._state, self._cheap, self._clock = state, cheap, clock

    def stop_asked(self, part: str) -> bool:
        """Whether the user wants a decoder, an encoder or an upscaler to stop: Skip goes on from what was encoded."""
        return bool(self._state.interrupted or (part != "encoder" and self._state.skipped))

    @contextmanager
    def shown(self, words: str) -> Iterator[Callable[[float], None]]:
        """Show `words`, and in the host's own bar how far a piece of work is, for as long as it takes.

        Yields what is to be called with the share that is done, 0 to 1.
        """
        before = {name: getattr(self._state, name) for name in _SHOWN}
        start, left = self._clock(), float("inf")
        began = before["time_start"]  # None before the first run, of work that no run has asked for
        began = start if began is None else began

        def show(share: float) -> None:
            nonlocal left
            if share <= 0:
                return
            now = self._clock()
            left = min(left, (now - start) * (1 - share) / share)  # a slow stretch does not make it grow
            self._show(words, share, now - began, left)

        try:
            yield show
        finally:
            for name, value in before.items():
                setattr(self._state, name, value)

    def rough_picture(self, latents: Tensor) -> Tensor:
        """Make what is shown of latents that were not decoded to the end."""
        return F.interpolate(self._cheap(latents.float()), scale_factor=_SCALE).to(latents)

    def _show(self, words: str, share: float, passed: float, left: float) -> None:
        """Have the bar of this job say how far the work is, and the WebUI, which takes the time that is left from the
        bar as if it had always moved evenly, reckon the right one.

        passed: seconds since the first job began. left: of the work; jobs that follow are reckoned to take as long as
        those before them.
        """
        state = self._state
        # The WebUI does not know yet how many there will be, and shows no bar; or, under Extras, a full one.
        if state.job_count < 1 or state.job_no >= state.job_count:
            state.textinfo = f"{words}: {share:.0%}"
            return
        state.textinfo = words
        state.current_image_sampling_step = _STEPS  # no live preview: what is sampled is being decoded
        state.sampling_steps, state.sampling_step = _STEPS, int(_STEPS * share)
        bar = (state.job_no + state.sampling_step / _STEPS) / state.job_count
        left += (passed + left) / (state.job_no + 1) * max(state.job_count - state.job_no - 1, 0)
        if bar < 1:
            state.time_start = self._clock() - left * bar / (1 - bar)


def no_latents(model: Any, pixels: Tensor) -> Tensor:
    """Make what stands for latents of pixels in a run that is interrupted, and will not look at them."""
    batch, _, height, width = pixels.shape
    return pixels.new_zeros(batch, getattr(model, "latent_channels", 4), height // _SCALE, width // _SCALE)
