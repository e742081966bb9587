"""A call that is broken off: the device has its memory back, and the next call is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from comfyui_patchconv.streaming import Streamed

from .helpers import SMALL, apart, drawn, in_use, vae


class EndingError(Exception):
    """Breaks a call off."""


def at_step(number: int, error: type[BaseException]) -> Callable[..., None]:
    """Progress that raises at its `number`-th report."""
    steps = iter(range(1 << 30))

    def report(*_: Any) -> None:
        if next(steps) == number:
            raise error

    return report


@pytest.mark.parametrize("error", [EndingError, KeyboardInterrupt])
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("step", [0, 9])
def test_a_call_that_is_broken_off(device: torch.device, step: int, budget: Any, error: type[BaseException]) -> None:
    model, latent = vae(device), drawn(device, 1, 4, 11, 8)
    with torch.inference_mode():
        expected = model.decode(latent)
        Streamed(budget, tuning=SMALL).call(model.decode, (latent,), {})  # what libraries keep is there
        before = in_use(device)
        with pytest.raises(error):
            Streamed(budget, on_progress=at_step(step, error), tuning=SMALL).call(model.decode, (latent,), {})
        assert in_use(device) <= before
        result = Streamed(budget, tuning=SMALL).call(model.decode, (latent,), {})
    assert apart(result, expected.double())[0] <= (1e-4 if device.type == "cuda" else 1e-5)
