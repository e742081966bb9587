"""Counting activations on fake tensors: the right number, whatever the model and wherever its weights."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from comfyui_patchconv.convert import convert_model
from comfyui_patchconv.footprint import peak_activations, peak_live_bytes

MIB = 2**20
CPU = torch.device("cpu")


def test_what_is_alive_at_once() -> None:
    def call() -> torch.Tensor:
        a = torch.empty(MIB, dtype=torch.uint8)
        b = torch.cat([a, a])  # 1 + 2
        del a
        return torch.cat([b, b])  # 2 + 4

    assert peak_live_bytes(call) == 6 * MIB


def test_views_and_in_place_operations_are_free() -> None:
    def call() -> torch.Tensor:
        x = torch.empty(4, MIB, dtype=torch.uint8)
        return x.view(2, -1).narrow(0, 0, 1).add_(1).t().expand(-1, 5)

    assert peak_live_bytes(call) == 4 * MIB


def test_what_existed_before_is_free() -> None:
    weight = torch.zeros(MIB)
    assert peak_live_bytes(lambda: weight.view(2, -1).t()) == 0
    assert peak_live_bytes(lambda: weight + 1) == 4 * MIB


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode(inference: bool) -> None:
    layer = nn.Conv2d(4, 8, 3, padding=1)
    with torch.inference_mode(inference):
        peak = peak_live_bytes(lambda: layer(torch.empty(1, 4, 16, 16)))
        assert torch.is_inference_mode_enabled() is inference
    assert peak == (4 + 8) * 16 * 16 * 4


def test_only_one_device() -> None:
    def call() -> None:
        here = torch.empty(MIB, dtype=torch.uint8)
        there = torch.empty(MIB, dtype=torch.uint8, device="meta")
        del here, there

    assert peak_live_bytes(call, device=torch.device("meta")) == MIB
    assert peak_live_bytes(call) == 2 * MIB


def test_gives_up_in_time() -> None:
    def call() -> None:
        x = torch.empty(1)
        while True:
            x = x + 1

    start = time.monotonic()
    with pytest.raises(TimeoutError):
        peak_live_bytes(call, seconds=0.2)
    assert time.monotonic() - start < 5


def test_nothing_is_allocated() -> None:
    assert peak_live_bytes(lambda: torch.empty(2**50, dtype=torch.uint8) + 1) == 2**51


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.register_buffer("scale", torch.ones(1))
        self.steps = [self.conv]
        self.act = self.activate

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.norm(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.steps[0](self.act(x)) * self.scale


def test_model_in_another_place_and_type() -> None:
    """Weights that lie elsewhere, or nowhere, do not matter, and do not count."""
    with torch.device("meta"):
        model = nn.Sequential(Block(16), Block(16))
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    one = 16 * 64 * 64 * 2
    peak = peak_activations(
        model, lambda m: m(torch.empty(1, 16, 64, 64, dtype=torch.float16)), device=CPU, dtype=torch.float16
    )
    # x of the first block, x of the second, and two in the midst of it; the statistics of the norm beside them
    assert 4 * one <= peak <= 4.1 * one
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before


def test_replaced_methods_are_not_run() -> None:
    model = Block(16)
    run = lambda m: m(torch.empty(1, 16, 64, 64))  # noqa: E731
    plain = peak_activations(model, run, device=CPU)
    calls: list[int] = []
    convert_model(model, threshold=0, on_strip=lambda module, done, rows: calls.append(done))
    assert peak_activations(model, run, device=CPU) == plain
    assert not calls
    model(torch.randn(1, 16, 8, 8))
    assert calls


def test_attributes() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Identity())
    seen: list[object] = []
    peak_activations(model, lambda m: seen.extend([m[0].p, hasattr(m[1], "p")]), device=CPU, attributes={"p": 0.0})
    assert seen == [0.0, False]
    assert model[0].p == 0.5


def test_shared_modules_and_weights_stay_shared() -> None:
    layer = nn.Linear(4, 4)
    nested = nn.Sequential(layer)
    model = nn.ModuleList([layer, nested])
    nested.weight = layer.weight
    found: list[bool] = []

    def run(m: Any) -> None:
        found.extend([m[0] is m[1][0], m[0].weight is m[1].weight])

    peak_activations(model, run, device=CPU)
    assert found == [True, True]


def test_code_that_looks_at_values_raises() -> None:
    with pytest.raises(Exception):  # noqa: B017 - which one depends on the torch version
        peak_live_bytes(lambda: torch.ones(1).item() + int(torch.empty(1).item()))


def test_a_configuration_that_refuses_to_change_stays_what_it_is() -> None:
    class Frozen(dict[str, object]):
        def update(self, *args: object, **kwargs: object) -> None:
            raise TypeError("frozen")

    model = nn.Conv2d(2, 2, 1)
    model.config = Frozen(widths=[1, 2])  # type: ignore[assignment]
    found = []
    peak_activations(model, lambda twin: found.append(twin.config), device=torch.device("cpu"))
    assert found[0] is model.config


def test_what_a_run_notes_in_its_model_stays_in_the_copy() -> None:
    model = nn.Identity()
    model.cache, model.frames = {}, []  # type: ignore[assignment]

    def run(twin: Any) -> None:
        twin.cache["last"] = torch.empty(1)
        twin.frames.append(torch.empty(1))

    peak_activations(model, run, device=CPU)
    assert not model.cache
    assert not model.frames
