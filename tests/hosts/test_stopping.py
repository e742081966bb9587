"""A decode or encode ends when the user asks the WebUI to stop, and what the WebUI shows goes on."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor

from comfyui_patchconv.hosts.webui.settings import Settings
from comfyui_patchconv.hosts.webui.stopping import Stopped
from comfyui_patchconv.hosts.webui.toggle import Toggle

from .vae import VAE
from .webui_state import Model, cheap, host_of, state_of_a_run

STREAM = Settings(mode="stream", budget=0.001)
PATCH = Settings(mode="patch", splits=8, threshold=0.0)
MODES = pytest.mark.parametrize("settings", [STREAM, PATCH], ids=["stream", "patch"])
BUTTONS = pytest.mark.parametrize("button", ["interrupted", "skipped"])


class Run:
    """A run of the WebUI with Patch Conv on, and what can be pressed in it."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(0)
        self.vae = VAE().requires_grad_(False)
        self.model, self.state = Model(self.vae), state_of_a_run()
        self.host, self.previews = host_of(self.state, self.model)
        self.z = torch.randn(1, 4, 64, 64)
        self.pixels = torch.randn(1, 3, 64, 64)
        self.before = self.set_methods()
        self.eager = self.vae.decode(self.z)
        self.preview = self.previews.single_sample_to_image
        self.toggle = Toggle(settings, self.host)
        self.check = self.toggle.stops.check
        self.toggle.follow([self.vae], [], models=[self.model])

    def set_methods(self) -> dict[str, Any]:
        methods = {f"{name}.{key}": value for name, module in self.vae.named_modules()
                   for key, value in module.__dict__.items() if callable(value)}  # fmt: skip
        return methods | {key: value for key, value in vars(self.model).items() if key != "first_stage_model"}

    def press(self, button: str, at_strip: int = 1) -> None:
        """Press a button after a strip of the next decode or encode."""
        self.strips = 0

        def pressing() -> None:
            self.strips += 1
            if self.strips == at_strip + 1:  # the first question is before the first strip
                setattr(self.state, button, True)
            self.check()

        self.toggle.stops.check = pressing

    def release(self) -> None:
        self.state.interrupted = self.state.skipped = False

    def rough(self) -> Tensor:
        return cheap(self.z).repeat_interleave(8, 2).repeat_interleave(8, 3)


@MODES
@BUTTONS
def test_a_decode_stops_within_a_strip(settings: Settings, button: str) -> None:
    run = Run(settings)
    shown = dict(vars(run.state))
    run.press(button, at_strip=2)
    assert torch.equal(run.model.decode_first_stage(run.z), run.rough())
    assert run.strips == 3
    assert vars(run.state) == shown | {button: True}
    run.toggle.off()
    assert run.set_methods() == run.before
    assert run.previews.single_sample_to_image is run.preview
    assert torch.equal(run.model.decode_first_stage(run.z), run.eager)
    assert run.toggle.report().endswith("of what was stopped there is only a rough picture")
    if settings is STREAM:
        assert re.search(r"^Patch Conv: VAE decoder streamed, .*, stopped; of what", run.toggle.report())


@MODES
def test_the_next_pictures_of_the_batch_stop_too_and_the_next_batch_does_not(settings: Settings) -> None:
    run = Run(settings)
    run.press("skipped")
    for _ in range(2):
        assert torch.equal(run.model.decode_first_stage(run.z), run.rough())
    assert run.strips == 3
    run.release()
    assert_same(run.model.decode_first_stage(run.z), run.eager, 1e-6)
    run.toggle.off()


@MODES
def test_what_was_interrupted_while_sampling_is_decoded(settings: Settings) -> None:
    """The WebUI shows how far it came."""
    run = Run(settings)
    run.state.interrupted = True
    assert_same(run.model.decode_first_stage(run.z), run.eager, 1e-6)
    run.toggle.off()
    assert "stopped" not in run.toggle.report()


@MODES
def test_an_encode_stops_at_interrupt_and_not_at_skip(settings: Settings) -> None:
    run = Run(settings)
    expected = Model(run.vae).encode_first_stage(run.pixels)
    run.press("skipped")
    assert_same(run.model.encode_first_stage(run.pixels), expected, 1e-6)
    run.press("interrupted")
    assert torch.equal(run.model.encode_first_stage(run.pixels), torch.zeros(1, 4, 8, 8))
    run.toggle.off()
    assert run.set_methods() == run.before


@MODES
def test_who_decodes_in_another_way_is_not_stopped(settings: Settings) -> None:
    """There is nobody to catch it."""
    run = Run(settings)
    run.press("interrupted")
    assert_same(run.vae.decode(run.z), run.eager, 1e-6)
    run.toggle.off()


@MODES
def test_live_previews_are_not_counted(settings: Settings) -> None:
    run = Run(settings)
    assert_same(run.previews.single_sample_to_image(run.z[0]), run.eager[0], 1e-6)
    assert run.toggle.report() == "Patch Conv: nothing that it was asked to patch has run"
    told = run.previews.single_sample_to_image(run.z[0], approximation=0)  # asked for as a picture, to keep
    assert_same(told, run.eager[0], 1e-6)
    (figures,) = (each for each in run.toggle._figures.values() if each.calls)
    assert figures.calls == 1
    run.toggle.off()
    assert run.previews.single_sample_to_image is run.preview


@MODES
@BUTTONS
def test_a_live_preview_stops_and_the_decode_after_it_does_not(settings: Settings, button: str) -> None:
    run = Run(settings)
    run.press(button)
    assert torch.equal(run.previews.single_sample_to_image(run.z[0]), run.rough()[0])
    assert_same(run.model.decode_first_stage(run.z), run.eager, 1e-6)
    run.toggle.off()
    assert "stopped" not in run.toggle.report()


def test_errors_pass_through() -> None:
    run = Run(STREAM)
    with pytest.raises(RuntimeError, match="channels"):
        run.model.decode_first_stage(torch.randn(1, 5, 8, 8))
    run.toggle.off()
    assert run.set_methods() == run.before
    assert not issubclass(Stopped, Exception)
