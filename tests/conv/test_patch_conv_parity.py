"""Beside `patch_conv` 0.0.1b0: the same where it is right, and right where it is not."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor, nn

from comfyui_patchconv import PatchConv2d, convert_model

THRESHOLD = "(1 << 30)"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """`patch_conv` as it is installed, but with a threshold of 0."""
    found = importlib.util.find_spec("patch_conv")
    if found is None or found.origin is None:
        pytest.skip("patch_conv is not installed: pip install patch_conv==0.0.1b0")
    folder = tmp_path_factory.mktemp("original")
    copy = shutil.copytree(Path(found.origin).parent, folder / "patch_conv_at_any_size")
    source = (copy / "module.py").read_text()
    assert source.count(THRESHOLD) == 1
    (copy / "module.py").write_text(source.replace(THRESHOLD, "0"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return importlib.import_module(copy.name)


def case(height: int = 24, batch: int = 2, **settings: Any) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3, "padding": 1, **settings})
    return conv, torch.randn(batch, 4, height, 17)


@torch.no_grad()
def results(original: ModuleType, conv: nn.Conv2d, input: Tensor, splits: int, sequential: bool = True) -> list[Tensor]:
    """Eager's, ours and the original's."""
    ours = PatchConv2d(splits, sequential, conv, threshold=0)
    return [conv(input), ours(input), original.PatchConv2d(splits, sequential, conv)(input)]


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("splits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": 7, "padding": 3},
        {"dilation": 2, "padding": 2},
        {"groups": 4},
        {"bias": False},
        {"batch": 1},
        {"kernel_size": (3, 5), "padding": (1, 0)},
        {"stride": 2},
        {"stride": (1, 3)},
    ],
)
def test_the_same_where_patch_conv_is_right(
    original: ModuleType, settings: dict[str, Any], splits: int, sequential: bool
) -> None:
    eager, ours, theirs = results(original, *case(**settings), splits, sequential)
    assert_same(theirs, eager, 1e-5)
    assert_same(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"height": 23}, AssertionError),
        ({"height": 3}, AssertionError),
        ({"height": 8, "kernel_size": 7, "padding": 3}, RuntimeError),
        ({"padding": 0}, RuntimeError),
        ({"padding": "valid"}, TypeError),
        ({"padding": "same"}, TypeError),
        ({"padding_mode": "reflect"}, (NotImplementedError, RuntimeError)),
        ({"padding_mode": "replicate"}, (NotImplementedError, RuntimeError)),
        ({"padding_mode": "circular"}, (NotImplementedError, RuntimeError)),
    ],
)
def test_right_where_patch_conv_fails(original: ModuleType, settings: dict[str, Any], fault: Any) -> None:
    conv, input = case(**settings)
    with torch.no_grad():
        assert_same(PatchConv2d(4, True, conv, threshold=0)(input), conv(input), 1e-5)
    with pytest.raises(fault):
        original.PatchConv2d(4, True, conv)(input)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 5, "padding": 1},
        {"kernel_size": 3, "padding": 2},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": 4, "padding": 1},
        {"kernel_size": 3, "padding": 1, "dilation": 2},
    ],
)
def test_right_where_patch_conv_gives_another_shape(original: ModuleType, settings: dict[str, Any]) -> None:
    eager, ours, theirs = results(original, *case(**settings), 4)
    assert theirs.shape != eager.shape
    assert_same(ours, eager, 1e-5)


@pytest.mark.parametrize(
    ("settings", "splits"),
    [
        ({"kernel_size": 5, "padding": 2}, 24),
        ({"kernel_size": 7, "padding": 3}, 24),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, 8),
    ],
)
def test_right_where_patch_conv_gives_other_values(original: ModuleType, settings: dict[str, Any], splits: int) -> None:
    eager, ours, theirs = results(original, *case(**settings), splits)
    assert theirs.shape != eager.shape or (theirs - eager).abs().max() > 0.1
    assert_same(ours, eager, 1e-5)


def test_a_failing_call_leaves_patch_conv_changed_but_not_us(original: ModuleType) -> None:
    conv, _ = case()
    wrong = torch.randn(2, 5, 24, 17)
    with pytest.raises(RuntimeError):
        PatchConv2d(4, True, conv, threshold=0)(wrong)
    assert conv.padding == (1, 1)
    with pytest.raises(RuntimeError):
        original.PatchConv2d(4, True, conv)(wrong)
    assert conv.padding == (0, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return self.out(self.layers(input))


@pytest.mark.parametrize("splits", [2, 4])
def test_convert_model_gives_the_same_network(original: ModuleType, splits: int) -> None:
    input = torch.randn(2, 4, 24, 17)
    theirs, ours = original.convert_model(Net(), splits), convert_model(Net(), splits, threshold=0)
    with torch.no_grad():
        assert_same(ours(input), theirs(input), 1e-5)
    assert list(ours.state_dict()) == list(Net().state_dict())
    assert list(theirs.state_dict()) != list(Net().state_dict())


def test_state_dicts_of_patch_conv_are_loaded(original: ModuleType) -> None:
    theirs = original.convert_model(Net(), 4)
    ours = Net()
    ours.layers[0], ours.out = (PatchConv2d(4, conv2d=conv) for conv in (nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.out.weight, theirs.out.conv2d.weight)
