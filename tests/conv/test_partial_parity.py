"""Partial convolution against `torch_pconv`, and against what NVIDIA's own code gave (tests/data)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conv_helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from comfyui_patchconv import PartialConv2d, PConv2d, convert_model

DATA = Path(__file__).parents[1] / "data" / "nvidia_partial_conv"
CASES: list[dict[str, Any]] = json.loads(DATA.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip("torch_pconv", reason="torch-pconv is not installed: pip install torch-pconv==0.1.1")


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    with np.load(DATA.with_suffix(".npz")) as found:
        return {name: torch.from_numpy(found[name]) for name in found}


def tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["case"]))
def test_it_gives_what_nvidias_gives(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    given = {name: arrays[f"{case['case']}_{name}"] for name in "xmwyu"}
    geometry = [tupled(case[name]) for name in ("kernel", "stride", "padding", "dilation")]
    out_channels, in_channels = given["w"].shape[:2]
    layer = PartialConv2d(
        in_channels, out_channels, *geometry, bias=case["bias"], multi_channel=case["multi_channel"], return_mask=True
    )
    state = {"weight": given["w"]}
    if case["bias"]:
        state["bias"] = arrays[f"{case['case']}_b"]
    layer.load_state_dict(state)
    with torch.no_grad():
        for splits in (1, 3):
            output, valid = convert_model(layer, splits, threshold=0, predicate=lambda *_: True)(given["x"], given["m"])
            assert_same(output, given["y"], 1e-6)
            assert torch.equal(valid, given["u"])


def pair(theirs: Any, *args: Any, **options: Any) -> tuple[Any, PConv2d]:
    """One layer of theirs and one of ours with its weights."""
    other, own = theirs.PConv2d(*args, **options), PConv2d(*args, **options)
    own.load_state_dict(other.state_dict())
    return other, own


sizes = st.sampled_from
GEOMETRY = {
    "kernel_size": sizes([1, 2, 3, 5, (3, 5)]),
    "stride": sizes([1, 2, (2, 1)]),
    "padding": sizes([0, 1, 2, (1, 2)]),
    "dilation": sizes([1, 2, (1, 2)]),
    "bias": st.booleans(),
    "legacy_behaviour": st.booleans(),
}


@settings(max_examples=200, deadline=None)
@given(options=st.fixed_dictionaries(GEOMETRY), seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.1, 0.6, 1.0]))
def test_it_gives_what_torch_pconv_gives(theirs: Any, options: dict[str, Any], seed: int, share: float) -> None:
    torch.manual_seed(seed)
    other, own = pair(theirs, 4, 6, **options)
    input, mask = torch.randn(2, 4, 12, 13), (torch.rand(2, 12, 13) < share).float()
    expected, expected_mask = other(input, mask)
    output, new_mask = own(input, mask)
    assert torch.equal(output, expected)
    assert torch.equal(new_mask, expected_mask)
    for one, other_one in zip(own.compute_masks(mask[:, None]), other.compute_masks(mask[:, None])):
        assert torch.equal(one, other_one)
    convert_model(own, 3, threshold=0, predicate=lambda *_: True)
    output, new_mask = own(input, mask)
    assert_same(output, expected, 1e-6)
    assert torch.equal(new_mask, expected_mask)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_gradients_are_those_of_torch_pconv(theirs: Any, legacy: bool, splits: int) -> None:
    torch.manual_seed(0)
    other, own = pair(theirs, 4, 6, 3, padding=1, bias=True, legacy_behaviour=legacy)
    convert_model(own, splits, threshold=0)
    input, mask = torch.randn(2, 4, 24, 13, requires_grad=True), (torch.rand(2, 24, 13) < 0.5).float()
    found = []
    for layer in (other, own):
        parameters = dict(layer.named_parameters())
        leaves = [input, parameters["regular_conv.weight"], parameters["bias"]]
        found.append(torch.autograd.grad(layer(input, mask)[0].sin().sum(), leaves))
    for one, expected in zip(found[1], found[0]):
        assert_same(one, expected, 1e-5)


def test_helpers_do_what_those_of_torch_pconv_do(theirs: Any) -> None:
    other, own = pair(theirs, 3, 5, (3, 2), bias=True)
    weight, bias = torch.randn(5, 3, 3, 2), torch.randn(5)
    for layer in (other, own):
        assert layer.set_weight(weight) is layer
        assert layer.set_bias(bias) is layer
    assert torch.equal(own.get_weight(), other.get_weight())
    found = own.get_bias()
    assert found is not None
    assert torch.equal(found, other.get_bias())
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "use_bias"):
        assert getattr(own, name) == getattr(other, name)
    with pytest.raises(ValueError, match="has no bias"):
        PConv2d(3, 5).set_bias(bias)


@pytest.mark.parametrize(
    ("input", "mask"),
    [
        (torch.zeros(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)),
        (torch.zeros(2, 3, 8, 8), torch.ones(1, 8, 8)),
        (torch.zeros(2, 3, 8, 8), torch.ones(2, 1, 8, 8)),
        (torch.zeros(3, 8, 8), torch.ones(3, 8)),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), torch.ones(2, 8, 8)),
    ],
)
def test_what_torch_pconv_refuses_is_refused(theirs: Any, input: Tensor, mask: Tensor) -> None:
    for layer in pair(theirs, 3, 5, 3):
        with pytest.raises(TypeError):
            layer(input, mask)


@pytest.mark.parametrize("bias", [False, True])
def test_state_dicts_of_either_load_into_all(theirs: Any, bias: bool) -> None:
    torch.manual_seed(0)
    other = theirs.PConv2d(3, 5, 3, bias=bias)
    conv = nn.Conv2d(3, 5, 3, bias=bias)
    conv.weight.data.copy_(other.get_weight().data)
    if bias:
        conv.bias.data.copy_(other.get_bias().data.flatten())  # type: ignore[union-attr]
    input, mask = torch.randn(1, 3, 9, 9), (torch.rand(1, 9, 9) < 0.7).float()
    expected, _ = other(input, mask)
    for state in (other.state_dict(), conv.state_dict()):
        wrapped = {f"net.0.{name}": value for name, value in state.items()}
        for kind in (PConv2d, PartialConv2d):
            model = nn.ModuleDict({"net": nn.Sequential(kind(3, 5, 3, bias=bias))})
            model.load_state_dict(wrapped)
            layer: Any = model.get_submodule("net.0")
            output = layer(input, mask)[0] if kind is PConv2d else layer(input, mask[:, None])
            assert_same(output, expected, 1e-6)
    assert PConv2d(3, 5, 3, bias=bias).state_dict().keys() == other.state_dict().keys()
