"""A host's clone of a patched model computes with its own weights."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial, reduce
from typing import Any

import pytest
import torch
from conv_helpers import assert_same, make_seamless, seamless_forward
from torch import Tensor, nn

from comfyui_patchconv import TiledForward, Tiling, convolutions
from comfyui_patchconv.conv.forward import tiled_forward
from comfyui_patchconv.conv.partial import PartialPadding
from comfyui_patchconv.hosts.auto import AutoForward
from comfyui_patchconv.hosts.clones import Wrapper, follow
from comfyui_patchconv.hosts.memory_estimates import Needs
from comfyui_patchconv.hosts.streamed import StreamedForward

from .vae import VAE


class Patcher:
    """ComfyUI's `ModelPatcher`, as far as object patches go."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.object_patches: dict[str, Any] = {}
        self.object_patches_backup: dict[str, Any] = {}

    def deepclone(self, model: nn.Module) -> Patcher:
        """As the host does it: a model loaded anew, and the same patches."""
        other = Patcher(model)
        other.object_patches = self.object_patches.copy()
        follow(self, other)
        return other

    def get_model_object(self, key: str) -> Any:
        return self.object_patches.get(key) or reduce(getattr, key.split("."), self.model)

    def decode(self, z: Tensor) -> Tensor:
        for key, patch in self.object_patches.items():
            owner, _, name = key.rpartition(".")
            module = self.model.get_submodule(owner)
            self.object_patches_backup.setdefault(key, getattr(module, name))
            setattr(module, name, patch)
        with torch.no_grad():
            result: Any = self.model
            return result.decode(z)


class Noted(Wrapper):
    def __init__(self, forward: Any, notes: list[int]) -> None:
        self.forward, self.notes = forward, notes

    def __call__(self, *args: Any) -> Any:
        self.notes.append(1)
        return self.forward(*args)


def vae(seed: int) -> VAE:
    torch.manual_seed(seed)
    return VAE().requires_grad_(False)


def in_strips(patcher: Patcher, kind: type[TiledForward] = TiledForward) -> None:
    for name, module in convolutions(patcher.model):
        key = f"{name}._conv_forward"
        patch = tiled_forward(module, patcher.get_model_object(key), Tiling(3, threshold=0), kind)
        patcher.object_patches[key] = patch


def streamed(patcher: Patcher) -> None:
    forward = StreamedForward(patcher.get_model_object("decoder.forward"), 0, lambda _: 10**9)
    patcher.object_patches["decoder.forward"] = forward
    patcher.object_patches["decode"] = Noted(Noted(patcher.get_model_object("decode"), []), [])


Z = torch.randn(1, 4, 24, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("put", [in_strips, streamed, lambda one: (in_strips(one), streamed(one))])
def test_a_clone_with_a_model_of_its_own_computes_with_that(put: Any, loaded: bool) -> None:
    """Whether or not the one that it is made of has its patches on."""
    expected, first = vae(2).decode(Z), vae(1).decode(Z)
    patcher = Patcher(vae(1))
    put(patcher)
    if loaded:
        patcher.decode(Z)
    clone = patcher.deepclone(vae(2))
    assert_same(clone.decode(Z), expected)
    assert_same(clone.deepclone(vae(1)).decode(Z), first)
    assert_same(patcher.decode(Z), first)
    patcher.model.requires_grad_(False)
    for parameter in patcher.model.parameters():
        parameter.zero_()
    assert_same(clone.decode(Z), expected)


def test_borders_that_are_scaled_stay_so() -> None:
    patcher, other = Patcher(vae(1)), Patcher(vae(2))
    in_strips(patcher, PartialPadding)
    in_strips(other, PartialPadding)
    assert_same(patcher.deepclone(vae(2)).decode(Z), other.decode(Z))


def test_an_extensions_method_among_the_patches_goes_on_with_the_clone() -> None:
    """What it keeps in the model itself does not: a host loads that anew."""
    for bind in (lambda conv: seamless_forward.__get__(conv), lambda conv: partial(seamless_forward, conv)):
        patcher, model = Patcher(vae(1)), vae(2)
        conv = patcher.model.get_submodule("decoder.conv_in")
        patcher.object_patches["decoder.conv_in._conv_forward"] = bind(conv)
        in_strips(patcher)
        extension = make_seamless(copy.deepcopy(model.decoder.conv_in), "circular", "circular")
        kept = {name: extension.__dict__[name] for name in ("padding_x", "padding_y", "mode_x", "mode_y")}
        model.decoder.conv_in.__dict__.update(kept, strip_shapes=[])
        clone = patcher.deepclone(model)
        want = vae(2)
        make_seamless(want.decoder.conv_in, "circular", "circular")
        assert_same(clone.decode(Z), want.decode(Z))


def test_what_an_extension_set_on_the_old_model_is_not_asked_of_the_new_one() -> None:
    patcher = Patcher(vae(1))
    make_seamless(patcher.model.get_submodule("decoder.conv_in"), "circular", "circular")  # type: ignore[arg-type]
    in_strips(patcher)
    assert_same(patcher.deepclone(vae(2)).decode(Z), vae(2).decode(Z))


def test_a_clone_that_shares_the_model_shares_the_patches() -> None:
    patcher = Patcher(vae(1))
    in_strips(patcher)
    streamed(patcher)
    assert patcher.deepclone(patcher.model).object_patches == patcher.object_patches


def test_what_begins_a_decode_begins_that_of_a_clone() -> None:
    """The host asks the estimate of the VAE that it was cloned from, and the free memory is that of its own device."""
    asked: list[torch.device] = []
    patcher = Patcher(vae(1))
    first = StreamedForward(patcher.model.decoder.forward, 0, lambda device: asked.append(device) or 10**6)  # type: ignore
    patcher.object_patches["decoder.forward"] = first
    clone = patcher.deepclone(vae(2).to("meta"))
    for _ in range(2):
        first.start()
        patcher.object_patches["decoder.forward"](Z)
        first.start()
        clone.object_patches["decoder.forward"](Z.to("meta"))
    assert [device.type for device in asked] == ["cpu", "meta"] * 2


@pytest.mark.parametrize("follows", [True, False])
def test_the_model_behind_a_function_is_the_one_that_this_runs(follows: bool) -> None:
    """What another pack has set on a model is not there on the clone's; what it has among the patches is."""
    patcher, other, asked = Patcher(vae(1)), vae(2), []
    model: Any = patcher.model
    function = lambda z: model.decoder(model.post_quant_conv(z))  # noqa: E731
    if follows:
        other.__dict__["decode"] = lambda z: other.decoder(other.post_quant_conv(z))
        model.__dict__["decode"] = function
    else:
        patcher.object_patches["decode"] = function
    auto = AutoForward(
        patcher.get_model_object("decode"), nullcontext, lambda _: Needs(2, 1), lambda _: 0, 1,
        lambda model: asked.append(model) or nullcontext(), model=patcher.model,
    )  # fmt: skip
    patcher.object_patches["decode"] = Noted(auto, [])
    assert_same(patcher.deepclone(other).decode(Z), vae(2 if follows else 1).decode(Z))
    patcher.decode(Z)
    assert [one is other for one in asked] == [follows, False]


def test_patches_of_others_stay_as_the_host_copies_them() -> None:
    patcher = Patcher(vae(1))
    patcher.object_patches = {"weights": torch.ones(2), "nothing": None, "function": print}
    assert patcher.deepclone(vae(2)).object_patches == patcher.object_patches
