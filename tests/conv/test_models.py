"""Real networks of diffusers at reduced width, with seeded weights: in strips, and restored, they give the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conv_helpers import assert_same
from model_zoo import CASES, draw_weights
from torch import nn

from comfyui_patchconv import convert_model, restore_model


def note(tiled: set[nn.Module], module: nn.Module, done: int, rows: int) -> None:
    if done < rows:
        tiled.add(module)


@pytest.mark.parametrize("name", CASES)
def test_in_strips_it_gives_the_same_and_restored_the_very_same(name: str) -> None:
    build, run, input = CASES[name]
    model = draw_weights(build())
    keys, expected = list(model.state_dict()), run(model, input)
    assert expected.isfinite().all()
    assert expected.std() > 1e-3
    for splits in (0, 3):
        tiled: set[nn.Module] = set()
        convert_model(model, splits, threshold=0, on_strip=partial(note, tiled), strip_bytes=16_000)
        assert list(model.state_dict()) == keys
        assert_same(run(model, input), expected, 1e-5)
        assert len(tiled) >= 4
    restore_model(model)
    assert all("_conv_forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(run(model, input), expected)
