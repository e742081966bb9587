"""The WebUI's upscalers run whole and streamed while the toggle, or Extras, has them so, and leave no trace."""

from __future__ import annotations

import gc
import re
import sys
from types import ModuleType
from typing import Any, Optional
from weakref import ref

import numpy as np
import pytest
import torch
from torch import nn

from comfyui_patchconv.hosts.webui.extras import Extras
from comfyui_patchconv.hosts.webui.host import Host
from comfyui_patchconv.hosts.webui.settings import Settings
from comfyui_patchconv.hosts.webui.stopping import Stopped
from comfyui_patchconv.hosts.webui.toggle import Toggle
from comfyui_patchconv.hosts.webui.upscalers import having_them

from .upscaler import upscaler
from .webui_state import cheap, state_of_a_run
from .webui_upscalers import Upscalers, picture

SETTINGS = Settings(vae=False, upscalers=True)


def toggled(host: Upscalers, settings: Settings = SETTINGS, of: Optional[Host] = None) -> Toggle:
    toggle = Toggle(settings, of)
    toggle.follow([], [], upscaling=host.modules)
    return toggle


def assert_level(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape
    assert np.abs(one - other).max() <= 1
    assert (one != other).mean() < 1e-3


@pytest.mark.parametrize("mode", ["auto", "patch", "stream"])
@pytest.mark.parametrize("way", ["upscale", "upscale_tensors"])
def test_a_picture_is_that_of_the_model_run_whole(mode: str, way: str) -> None:
    host, model, image = Upscalers(), upscaler(), picture()
    before, upscale = host.functions(), getattr(host, way)
    whole, tiled = upscale(model, image, tile=0), upscale(model, image)
    assert np.abs(whole - tiled).max() > 8
    toggle = toggled(host, Settings(mode, vae=False, upscalers=True, budget=0.001))
    assert host.functions() != before
    assert_level(upscale(model, image), whole)
    toggle.off()
    assert host.functions() == before
    assert np.array_equal(upscale(model, image), tiled)
    assert host.asked == [0, 16, 0, 16]
    report = toggle.report()
    # No peak is told where the process had room for so small an image.
    words = r"Patch Conv: upscaler Small streamed, (peak [^,]*\()?whole without Patch Conv: (at|not)"
    assert re.match(words, report), report
    assert set(vars(model)) == set(vars(upscaler()))
    assert not [value for value in vars(model.model).values() if callable(value)]


def test_what_is_not_ticked_is_left_alone() -> None:
    host = Upscalers()
    before = host.functions()
    toggle = toggled(host, Settings())
    assert host.functions() == before
    toggle.off()


def test_a_module_in_half_precision_that_nobody_describes() -> None:
    host, image = Upscalers(), picture()
    network = upscaler().model.to(torch.bfloat16)
    expected = host.upscale(network, image, tile=0)
    toggle = toggled(host)
    made = host.upscale(network, image)
    assert np.abs(made - expected).mean() < 1
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    assert "upscaler Network streamed" in toggle.report()


def test_what_has_no_weights_is_left_to_the_host() -> None:
    host, image = Upscalers(), picture()

    class Doubling:
        model = nn.Upsample(scale_factor=2)

    with pytest.raises(StopIteration):  # as without us
        host.upscale(Doubling(), image)
    toggle = toggled(host)
    with pytest.raises(StopIteration):
        host.upscale(Doubling(), image)
    assert host.asked == [16, 16]
    assert not toggle.has_run


def test_the_budget_is_kept_to() -> None:
    host, model = Upscalers(), upscaler(width=32)
    image = picture(384, 512)
    expected = host.upscale(model, image, tile=0)
    toggle = toggled(host, Settings(vae=False, upscalers=True, budget=0.08))
    assert_level(host.upscale(model, image), expected)
    figures = toggle._figures["upscaler Small"]
    last = toggle._upscalers["upscaler Small"]._streamed._streamed.last
    assert last is not None
    assert last.peak <= 0.08 * 2**30 < figures.eager
    assert last.in_strips


def test_an_error_of_the_model_passes_through() -> None:
    host, image = Upscalers(), picture()
    before = host.functions()
    toggle = toggled(host)
    with pytest.raises(RuntimeError, match="channels"):
        host.upscale(upscaler(input_channels=1, output_channels=1), image)
    toggle.off()
    assert host.functions() == before


@pytest.mark.parametrize("button", ["interrupted", "skipped"])
@pytest.mark.parametrize("way", ["upscale", "upscale_tensors"])
def test_a_button_stops_it_within_a_strip(button: str, way: str) -> None:
    host, model, image = Upscalers(), upscaler(width=32), picture(384, 512)
    upscale, state = getattr(host, way), state_of_a_run()
    toggle = toggled(host, Settings(vae=False, upscalers=True, budget=0.08), Host(state, cheap, None))
    whole, check = upscale(model, image), toggle.stops.check
    shown, strips = dict(vars(state)), []

    def pressing() -> None:
        strips.append(state.textinfo)
        if len(strips) == 3:
            setattr(state, button, True)
        check()

    toggle.stops.check = pressing
    assert np.array_equal(upscale(model, image), np.asarray(image))
    assert len(strips) == 3
    assert strips[-1] == "upscaler Small in strips"
    assert vars(state) == shown | {button: True}
    assert toggle.report().endswith(", stopped; the picture whose upscaling was stopped went on as it was")
    strips.clear()  # what was asked before it began ends it too
    assert np.array_equal(upscale(model, image), np.asarray(image))
    assert len(strips) == 1
    setattr(state, button, False)
    toggle.stops.check = check
    assert_level(upscale(model, image), whole)


def test_a_decode_behind_an_upscale_that_was_stopped_runs_to_its_end() -> None:
    """It shows how far the sampling came."""
    state = state_of_a_run()
    stops = Toggle(SETTINGS, Host(state, cheap, None)).stops
    state.interrupted = True
    with stops.caught("upscaler"), pytest.raises(Stopped):
        stops.check()
    with stops.caught("decoder"):
        stops.check()


def test_another_extension_that_covers_ours() -> None:
    host, model, image = Upscalers(), upscaler(), picture()
    before, tiled = host.functions(), host.upscale(model, image)
    toggle = toggled(host)
    ours = host.esrgan.__dict__["upscale_with_model"]

    def theirs(model: Any, img: Any, **options: Any) -> Any:
        return ours(model, img, **options)

    host.esrgan.__dict__["upscale_with_model"] = theirs
    whole = host.upscale(model, image)
    assert np.abs(whole - tiled).max() > 8
    toggle.off()
    assert np.array_equal(host.upscale(model, image), tiled)  # ours is idle under theirs
    host.esrgan.__dict__["upscale_with_model"] = ours
    toggle.off()
    assert host.functions() == before
    host.esrgan.__dict__["upscale_with_model"] = ours  # once more, and the next run finds it
    toggle = toggled(host)
    assert np.array_equal(host.upscale(model, image), whole)
    toggle.off()
    assert host.functions() == before


def test_one_that_calls_the_other_is_counted_once() -> None:
    host, model, image = Upscalers(), upscaler(), picture()
    function = host.esrgan.__dict__["upscale_with_model"]

    def theirs(model: Any, img: Any, **options: Any) -> Any:
        return host.utils.__dict__["upscale_with_model"](model, img, **options)

    theirs.__module__ = function.__module__
    host.esrgan.__dict__["upscale_with_model"] = theirs
    toggle = toggled(host)
    host.upscale(model, image)
    assert toggle._figures["upscaler Small"].calls == 1


def test_modules_that_have_the_functions_are_found() -> None:
    host, other = Upscalers(), ModuleType("other")
    other.__dict__["upscale_with_model"] = lambda *args, **kwargs: None  # its own
    lazy = type("Lazy", (ModuleType,), {"__getattribute__": lambda self, name: pytest.fail("was loaded")})("lazy")
    assert having_them([*sys.modules.values(), host.esrgan, other, lazy, None, *host.modules]) == [
        host.esrgan, host.utils,
    ]  # fmt: skip


class Tab:
    """A host's tab Extras."""

    def __init__(self, host: Upscalers) -> None:
        self.host, self.model, self.image = host, upscaler(), picture()
        self.module, self.told = ModuleType("modules.postprocessing"), []
        self.fails = self.upscales = False

        def run(mode: int, *, save_output: bool = True) -> tuple[list[np.ndarray], str, str]:
            if self.fails:
                raise RuntimeError("no such folder")
            return [self.host.upscale(self.model, self.image) if self.upscales else np.asarray(self.image)], "", ""

        self.original = run
        self.module.__dict__["run_postprocessing"] = run

    def run(self) -> Any:
        return self.module.__dict__["run_postprocessing"](0, save_output=False)

    def extras(self, begin: Any = None) -> Extras:
        begin = begin or (lambda: toggled(self.host))
        return Extras(self.module, "run_postprocessing", begin, lambda toggle: self.told.append(toggle.report()))


def test_extras_are_untiled_while_they_run() -> None:
    host = Upscalers()
    before, tab = host.functions(), Tab(host)
    tab.upscales = True
    (tiled,), *_ = tab.run()
    extras = tab.extras()
    assert host.functions() == before  # until it runs
    (whole,), _, said = tab.run()
    assert_level(whole, host.upscale(tab.model, tab.image, tile=0))
    assert np.abs(whole - tiled).max() > 8
    assert host.functions() == before
    assert said == f"<p>{tab.told[0]}</p>"
    assert said.startswith("<p>Patch Conv: upscaler Small streamed, ")
    tab.upscales = False  # a picture that is only turned, say
    assert tab.run()[1:] == ("", "")
    tab.fails = True
    with pytest.raises(RuntimeError, match="no such folder"):
        tab.run()
    assert host.functions() == before
    assert len(tab.told) == 1
    assert extras.leave()
    assert tab.module.__dict__["run_postprocessing"] is tab.original


def test_extras_with_settings_that_cannot_be_or_covered_when_they_are_left() -> None:
    host = Upscalers()
    tab = Tab(host)
    tab.upscales = True
    (tiled,), *_ = tab.run()
    extras = tab.extras(lambda: None)
    assert np.array_equal(tab.run()[0][0], tiled)
    extras.leave()
    extras = tab.extras()
    ours = tab.module.__dict__["run_postprocessing"]
    tab.module.__dict__["run_postprocessing"] = lambda *args, **options: ours(*args, **options)
    assert not extras.leave()
    assert np.array_equal(tab.run()[0][0], tiled)
    assert tab.told == []


def test_a_model_is_not_held_beyond_its_picture() -> None:
    """The WebUI loads one for each."""
    host, model = Upscalers(), upscaler()
    toggle = toggled(host)
    weights = ref(model.model)
    host.upscale(model, picture())
    del model
    gc.collect()
    assert weights() is None
    assert toggle.has_run
