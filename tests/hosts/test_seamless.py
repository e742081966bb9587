"""Extensions that put a forward of their own on convolutions that a host has patched, or will patch: both run."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from conv_helpers import assert_same, make_seamless
from torch import Tensor, nn

from comfyui_patchconv import TiledForward, Tiling, convolutions
from comfyui_patchconv.conv.forward import tiled_forward
from comfyui_patchconv.conv.partial import PartialPadding
from comfyui_patchconv.hosts.seamless import eject, inject

IMAGE = torch.randn(1, 4, 24, 16, generator=torch.Generator().manual_seed(5))


class Patcher:
    """ComfyUI's `ModelPatcher`, as far as object patches and injections go."""

    def __init__(self, kind: type[TiledForward] = TiledForward) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 3, 3, padding=1))
        self.model.requires_grad_(False)
        self.object_patches: dict[str, Any] = {}
        self.object_patches_backup: dict[str, Any] = {}
        for name, module in convolutions(self.model):
            patch = tiled_forward(module, module._conv_forward, Tiling(3, threshold=0), kind)  # type: ignore
            self.object_patches[f"{name}._conv_forward"] = patch

    def load(self) -> None:
        for key, patch in self.object_patches.items():
            module = self.model.get_submodule(key.rpartition(".")[0])
            self.object_patches_backup.setdefault(key, module._conv_forward)
            module._conv_forward = patch
        inject(self)

    def unload(self) -> None:
        eject(self)
        for key, before in self.object_patches_backup.items():
            self.model.get_submodule(key.rpartition(".")[0])._conv_forward = before
        self.object_patches_backup.clear()

    def extend(self) -> None:
        """Make it seamless, as the extension does."""
        for _, conv in convolutions(self.model, types=(nn.Conv2d,)):
            make_seamless(cast(nn.Conv2d, conv), "circular", "circular")

    def rows(self) -> set[int]:
        """Most rows that a convolution is given at once."""
        shapes: list[Any] = [conv.strip_shapes for _, conv in convolutions(self.model)]
        for shape in shapes:
            shape.clear()
        self.model(IMAGE)
        return {max(side[-2] for side in shape) for shape in shapes}


def seamless() -> Tensor:
    patcher = Patcher()
    patcher.extend()
    return patcher.model(IMAGE)


@pytest.mark.parametrize("kind", [TiledForward, PartialPadding])
@pytest.mark.parametrize("loaded", [False, True], ids=["before it is loaded", "while it is loaded"])
def test_an_extension_that_comes_later_runs_in_strips(kind: type[TiledForward], loaded: bool) -> None:
    patcher = Patcher(kind)
    if loaded:
        patcher.load()
    patcher.extend()
    for _ in range(2):
        patcher.unload()
        patcher.load()
        assert_same(patcher.model(IMAGE), seamless())
        assert max(patcher.rows()) < 24
    patcher.unload()
    assert_same(patcher.model(IMAGE), seamless())
    assert patcher.rows() == {24}


def test_one_that_was_there_before_is_not_run_twice() -> None:
    patcher = Patcher()
    patcher.extend()
    for key, patch in patcher.object_patches.items():
        module = patcher.model.get_submodule(key.rpartition(".")[0])
        patcher.object_patches[key] = tiled_forward(patch.module, module._conv_forward, patch.tiling)  # type: ignore
    patcher.load()
    for key, patch in patcher.object_patches.items():
        assert patcher.model.get_submodule(key.rpartition(".")[0])._conv_forward is patch
    assert_same(patcher.model(IMAGE), seamless())


def test_without_one_all_is_as_the_host_makes_it() -> None:
    patcher = Patcher()
    expected = patcher.model(IMAGE)
    for _ in range(2):
        patcher.load()
        assert all(conv._conv_forward in patcher.object_patches.values() for _, conv in convolutions(patcher.model))  # type: ignore
        assert_same(patcher.model(IMAGE), expected)
        patcher.unload()
        assert not any(isinstance(conv._conv_forward, TiledForward) for _, conv in convolutions(patcher.model))  # type: ignore
