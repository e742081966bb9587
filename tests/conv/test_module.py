"""`PatchConv2d` takes the calls of `patch_conv`'s, and is a `torch.nn.Conv2d`."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from typing import Any

import pytest
import torch
from conv_helpers import MODES, Counting, assert_same, gradients, hook, make_seamless
from torch import Tensor, nn

from comfyui_patchconv import PatchConv2d, Tiling, convert_model, restore_model

IMAGE = torch.randn(2, 3, 20, 18, generator=torch.Generator().manual_seed(1))


def conv(**settings: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3, **{"padding": 1, **settings})


@pytest.mark.parametrize(
    "make",
    [
        lambda conv: PatchConv2d(4, True, conv, threshold=0),
        lambda conv: PatchConv2d(4, False, conv, threshold=0),
        lambda conv: PatchConv2d(splits=3, conv2d=conv, threshold=0),
        lambda conv: PatchConv2d(conv2d=conv, threshold=0),
    ],
)
@pytest.mark.parametrize("settings", [{"padding_mode": mode} for mode in MODES] + [{"stride": 2}, {"bias": False}])
def test_around_a_convolution_it_gives_the_same_and_shares_the_weight(make: Any, settings: dict[str, Any]) -> None:
    given = conv(**settings)
    ours = make(given)
    assert isinstance(ours, nn.Conv2d)
    assert ours.weight is given.weight
    assert (ours.stride, ours.padding_mode) == (given.stride, given.padding_mode)
    assert_same(ours(IMAGE), given(IMAGE), 1e-5)
    for actual, expected in zip(gradients(ours, IMAGE), gradients(given, IMAGE), strict=True):
        assert_same(actual, expected, 1e-5)


def test_it_takes_the_arguments_of_a_convolution() -> None:
    named: Any = {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "stride": 2, "padding": 1}
    ours = PatchConv2d(splits=4, **named, threshold=0)
    positional = PatchConv2d(4, True, None, 3, 4, 3, 2, 1, threshold=0)
    assert ours.stride == positional.stride == (2, 2)
    positional.load_state_dict(ours.state_dict())
    given = nn.Conv2d(**named)
    given.load_state_dict(ours.state_dict())
    assert_same(ours(IMAGE), given(IMAGE), 1e-5)
    assert_same(positional(IMAGE), given(IMAGE), 1e-5)


def test_the_threshold_has_the_default_of_convert_model() -> None:
    assert hook(PatchConv2d(conv2d=conv())).tiling == Tiling()
    assert torch.equal(PatchConv2d(conv2d=conv())(IMAGE), conv()(IMAGE))


@pytest.mark.parametrize("prefix", ["", "conv2d."])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_loads_state_dicts_of_either_layout(prefix: str, nested: bool, bias: bool) -> None:
    given = conv(bias=bias)
    ours: nn.Module = PatchConv2d(in_channels=3, out_channels=4, kernel_size=3, padding=1, bias=bias, threshold=0)
    state = {prefix + name: value for name, value in given.state_dict().items()}
    if nested:
        ours, state = nn.Sequential(nn.ReLU(), ours), {f"1.{name}": value for name, value in state.items()}
    before = dict(state)
    missing, unexpected = ours.load_state_dict(state)
    assert (missing, unexpected) == ([], [])
    assert state == before
    loaded: Any = ours[1] if isinstance(ours, nn.Sequential) else ours
    assert torch.equal(loaded.weight, given.weight)
    assert set(loaded.state_dict()) == set(given.state_dict())


def test_a_missing_key_is_still_missing() -> None:
    with pytest.raises(RuntimeError, match="bias"):
        PatchConv2d(conv2d=conv()).load_state_dict({"conv2d.weight": conv().weight})


def test_convert_and_restore_know_it() -> None:
    given = conv()
    ours = PatchConv2d(conv2d=given, threshold=0)
    convert_model(ours, 7, threshold=0)
    assert hook(ours).tiling.splits == 7
    assert hook(ours).inner is None
    assert_same(ours(IMAGE), given(IMAGE), 1e-5)
    assert torch.equal(restore_model(ours)(IMAGE), given(IMAGE))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_stands_on_its_own(make_copy: Any) -> None:
    ours = PatchConv2d(3, conv2d=conv(), threshold=0)
    other = make_copy(ours)
    assert type(other) is PatchConv2d
    assert hook(other).module is other
    assert torch.equal(other(IMAGE), ours(IMAGE))


def test_the_convolution_around_which_it_is_made_stays_as_it_was() -> None:
    given = conv()
    state = dict(given.__dict__)
    PatchConv2d(conv2d=given, threshold=0)(IMAGE)
    assert {key: id(value) for key, value in given.__dict__.items()} == {k: id(v) for k, v in state.items()}


def test_moving_it_moves_its_parameters() -> None:
    ours = PatchConv2d(conv2d=conv(), threshold=0).double()
    assert ours.weight.dtype == torch.float64
    assert ours(IMAGE.double()).dtype == torch.float64


class OwnForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("kind", [OwnForward, Counting, nn.Conv1d, nn.ConvTranspose2d])
def test_a_convolution_with_a_forward_of_its_own_is_refused(kind: Any) -> None:
    with pytest.raises(TypeError, match=rf"{kind.__name__}.*convert_model.*\.$"):
        PatchConv2d(conv2d=kind(3, 4, 3))


def test_a_convolution_that_another_extension_has_changed_keeps_that_change_or_is_refused() -> None:
    theirs = make_seamless(conv(), "circular", "circular")
    expected = theirs(IMAGE)
    ours = None
    with suppress(TypeError):
        ours = PatchConv2d(conv2d=theirs, threshold=0)
    if ours is not None:
        assert_same(ours(IMAGE), expected, 1e-5)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "lazy"])
def test_a_convolution_without_a_weight_of_its_own_is_refused(kind: str) -> None:
    conv = nn.LazyConv2d(4, 3) if kind == "lazy" else getattr(nn.utils.parametrizations, kind)(nn.Conv2d(3, 4, 3))
    with pytest.raises(TypeError, match="use convert_model on it"):
        PatchConv2d(conv2d=conv)
