"""What is patched for a run is taken off when the WebUI closes that, however often it was asked for."""

from __future__ import annotations

import copy
import gc
from typing import Any
from weakref import ref

import pytest
import torch

from comfyui_patchconv.hosts.webui.closing import before_close, leave_copied
from comfyui_patchconv.hosts.webui.settings import Settings
from comfyui_patchconv.hosts.webui.toggle import Toggle

from .test_toggle import methods
from .vae import VAE


class Processing:
    """As the WebUI's class of this name: what is known of a run, closed at its end."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE().requires_grad_(False)


def patching(vae: VAE) -> Toggle:
    toggle = Toggle(Settings("stream"))
    toggle.follow([vae], [])
    return toggle


def close_of(p: Processing) -> Any:
    return vars(p).get("close")


def test_a_batch_of_a_thousand_pictures_is_closed_once(vae: VAE) -> None:
    """The WebUI processes each with the same object."""
    p, before = Processing(), methods(vae)
    for _ in range(1100):
        toggle = patching(vae)
        before_close(p, toggle)
        toggle.off()
    assert len(close_of(p).toggles) == 1
    toggle.follow([vae], [])
    p.close()
    assert p.closed == 1
    assert methods(vae) == before


def test_all_that_was_patched_is_taken_off(vae: VAE) -> None:
    other = VAE().requires_grad_(False)
    p, before = Processing(), (methods(vae), methods(other))
    stopped: list[bool] = []
    for one in (vae, other):
        toggle = patching(one)
        before_close(p, toggle, lambda on=toggle: stopped.append(on.on))
    assert close_of(copy.deepcopy(p)) is close_of(p)
    p.close()
    assert stopped == [True]
    assert (methods(vae), methods(other)) == before


def test_nothing_keeps_a_run_that_was_closed(vae: VAE) -> None:
    gc.collect()
    gc.disable()
    try:
        p = Processing()
        alive = ref(p)
        before_close(p, patching(vae))
        p.close()
        assert close_of(p) is None
        p.close()
        assert p.closed == 2
        del p
        assert alive() is None
        p = Processing()  # nor one that nobody has closed
        alive = ref(p)
        toggle = patching(vae)
        before_close(p, toggle)
        toggle.off()
        del p
        assert alive() is None
    finally:
        gc.enable()


def test_what_another_extension_does_at_the_end_is_done(vae: VAE) -> None:
    """Whether it came before this or after it, and it stays where it was."""
    p, done, before = Processing(), [], methods(vae)
    first = lambda: done.append("first") or Processing.close(p)  # noqa: E731
    p.close = first
    before_close(p, patching(vae))
    ours = close_of(p)
    second = lambda: done.append("second") or ours()  # noqa: E731
    p.close = second
    for _ in range(3):
        before_close(p, patching(vae))
    p.close()
    assert close_of(p) is second
    assert (done, p.closed) == (["second", "first"], 1)
    assert methods(vae) == before


def test_a_copy_is_closed_by_itself(vae: VAE) -> None:
    """A plot makes its pictures with copies, of which some may be without this."""
    p, before = Processing(), methods(vae)
    before_close(p, patching(vae))
    without, beside = copy.copy(p), copy.copy(p)
    leave_copied(without)
    leave_copied(p)
    assert close_of(without) is None
    before_close(beside, patching(vae))
    for one in (without, beside):
        one.close()
        assert (one.closed, p.closed) == (1, 0)
    assert close_of(p) is not None
    p.close()
    assert p.closed == 1
    assert methods(vae) == before
