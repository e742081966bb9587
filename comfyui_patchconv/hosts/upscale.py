"""Runs upscale models, as `spandrel` describes them to hosts and the command line: checked first, then streamed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..streaming import Expected, Make, OnProgress, expect
from .attributes import HOST_ATTRIBUTES
from .devices.spread import Spread
from .memory_estimates import MARGIN
from .streamed import StreamedForward

_PARTS = ("model", "architecture", "scale", "input_channels", "output_channels")
"""What `spandrel` says of a model, and what is needed of it."""

_OTHER_PURPOSES = {
    "Inpainting": "fills masked areas and needs a mask",
    "FaceSR": "restores faces that were cut out and aligned, not whole pictures",
}

_CHOOSE = "choose one for super-resolution or restoration"

_log = logging.getLogger(__name__)


def check_model(model: Any) -> None:
    """Raise ValueError, in a sentence, unless `model` makes an image of an image, at a scale that is a whole number."""
    missing = [part for part in _PARTS if not hasattr(model, part)]
    if missing or not callable(model) or not isinstance(model.model, nn.Module):
        raise ValueError(
            f"This upscale model ({type(model).__name__}) is none that makes an image of an image: load an ESRGAN or "
            "another model that spandrel knows."
        )
    name, purpose = name_of(model), getattr(model, "purpose", "SR")
    if purpose in _OTHER_PURPOSES:
        raise ValueError(f"This upscale model ({name}) {_OTHER_PURPOSES[purpose]}: {_CHOOSE}.")
    scale = model.scale
    if not isinstance(scale, (int, float)) or scale < 1 or scale != int(scale):
        raise ValueError(
            f"This upscale model ({name}) has a scale of {scale}, and only whole numbers from 1 can be used: choose "
            "one for 1x, 2x or 4x."
        )
    if model.input_channels != model.output_channels:
        raise ValueError(
            f"This upscale model ({name}) takes {model.input_channels} channels and gives {model.output_channels}: "
            f"{_CHOOSE}, which gives as many as it takes."
        )


def check_channels(model: Any, channels: int) -> None:
    """Raise ValueError, in a sentence, unless `model`, which is checked, takes images of so many channels."""
    takes = model.input_channels
    if channels == takes:
        return
    way_out = f"choose a model for {channels}"
    if channels == takes + 1:
        way_out = "take the alpha off first, and scale it by itself"
    raise ValueError(
        f"The image has {channels} channels and this upscale model ({name_of(model)}) takes {takes}: {way_out}."
    )


def name_of(model: Any) -> str:
    """The name of the architecture that a model has."""
    return str(getattr(model.architecture, "name", model.architecture))


def network_of(model: Any) -> Optional[nn.Module]:
    """The module that computes, of a model that `spandrel` or another program describes or that is one itself; None
    where there is none with weights."""
    candidates = (getattr(model, "model", None), model)
    found = (one for one in candidates if isinstance(one, nn.Module) and next(one.parameters(), None) is not None)
    return next(found, None)


def with_network(model: Any, network: nn.Module) -> Any:
    """A copy of what describes a model, which runs `network` in the place of the model's own."""
    copied, own = copy.copy(model), model.model
    for name, value in vars(model).items():
        if value is own:
            setattr(copied, name, network)
    return copied


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """`model` where its weights are of `dtype`, else a copy whose weights are: rounded ones could not be put back."""
    if all(weight.dtype == dtype for weight in model.model.parameters()):
        return model
    return with_network(model, copy.deepcopy(model.model).to(dtype))


def for_another_process(model: Any) -> Any:
    """Of what describes a model, what its call needs; a module that nobody describes as it is."""
    if isinstance(model, nn.Module):
        return model
    copied = copy.copy(model)
    for name in ("patcher", "architecture", "_architecture"):  # the host's, and how files are recognised
        vars(copied).pop(name, None)
    return copied


class StreamedUpscaler:
    """Runs a model of images over pictures, one after the other, each streamed as a whole.

    model: as `spandrel` describes it, checked by `check_model`. budget: bytes, or 0 for the most of what is free when
    `start` was called. free, on_progress, on_call, on_miss, spread: see `StreamedForward`. output: device and dtype of
    results.
    """

    def __init__(
        self, model: Any, budget: int, free: Callable[[torch.device], int], *, output: tuple[torch.device, torch.dtype],
        on_progress: Optional[OnProgress] = None, on_call: Optional[Callable[[], None]] = None,
        on_miss: Optional[Callable[[int], None]] = None, spread: Optional[Spread] = None,
    ) -> None:  # fmt: skip
        self.model, self.budget, self.output = model, budget, output
        self._picture = _Picture(model, output)
        self._streamed = StreamedForward(self._picture, budget, free, on_progress, on_call, on_miss, spread=spread)

    def start(self) -> None:
        """Begin anew: it may take what is free now."""
        self._streamed.start()

    def frames(
        self, images: Tensor, device: torch.device, dtype: torch.dtype,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Upscale `images` `[N, H, W, C]`, computed on `device` in `dtype`: a picture `[1, H * scale, W * scale, C]`
        from 0 to 1 after the other. around: makes a context for each."""
        for image in images.split(1):
            with around():
                made = self._streamed(image.movedim(-1, 1).to(device, dtype).contiguous())
            yield made
            del made

    def expected(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Optional[Expected]:
        """Say what one picture takes; None where the model's code cannot be counted."""
        shape = (1, self.model.input_channels, height, width)

        def run(network: Any, make: Make) -> object:
            return self._picture(make(shape, dtype), with_network(self.model, network))

        try:
            return expect(
                self.model.model, run, budget=self.budget or None, device=device, dtype=dtype,
                attributes=HOST_ATTRIBUTES,
            )  # fmt: skip
        except Exception as error:  # its code is free to do what tensors without values cannot
            _log.info("Patch Conv: %s not counted (%s).", name_of(self.model), error)
            return None


class _Picture:
    """Upscales one picture `[1, C, H, W]`, as `[1, H * scale, W * scale, C]` of the device and dtype of `output`."""

    def __init__(self, model: Any, output: tuple[torch.device, torch.dtype]) -> None:
        self.model, self.output = model, output

    def __call__(self, image: Tensor, model: Any = None) -> Tensor:
        device, dtype = self.output
        made = (self.model if model is None else model)(image)
        return made.movedim(1, -1).to(device, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": for_another_process(self.model), "output": self.output}


def joined(pictures: Iterator[Tensor], count: int) -> Tensor:
    """`count` pictures `[1, H, W, C]` as one batch `[N, H, W, C]`; each is freed before the next one is made."""
    first = next(pictures)
    if count == 1:
        return first
    batch = first.new_empty((count, *first.shape[1:]))
    batch[0] = first[0]
    del first
    for number in range(1, count):
        batch[number] = next(pictures)[0]
    return batch


def room_for(expected: Optional[Expected], otherwise: float) -> float:
    """Bytes that a host is to make room for: what was counted and a little, or `otherwise` where nothing was."""
    return otherwise if expected is None else min(otherwise, MARGIN * expected.peak)
