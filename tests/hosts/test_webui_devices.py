"""A run of the WebUI over worker processes: the same pictures, stopped on all, and nothing left when they fail."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import ref

import devices_toys
import numpy as np
import pytest
import torch
from conv_helpers import assert_same
from devices_toys import Half, Kept, half
from devices_toys import latent as latent_of
from torch import Tensor, nn

from comfyui_patchconv.hosts.devices import spread as spreading
from comfyui_patchconv.hosts.devices.spread import end_all
from comfyui_patchconv.hosts.webui.host import Host
from comfyui_patchconv.hosts.webui.settings import Settings
from comfyui_patchconv.hosts.webui.several import Replaced, as_imported
from comfyui_patchconv.hosts.webui.toggle import Toggle

from .test_toggle import methods
from .upscaler import upscaler
from .vae import VAE
from .webui_state import Model, cheap, host_of, state_of_a_run
from .webui_upscalers import Upscalers, picture

STREAM = Settings("stream", budget=0.002, devices="all")


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(spreading.WORKERS, "2")


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture
def vae() -> VAE:
    """Its decoder does something in one process alone where it is asked to."""
    torch.manual_seed(0)
    made = VAE()
    made.decoder = half()  # type: ignore[assignment]
    return made.requires_grad_(False)


def latent() -> Tensor:
    """Of a size that is streamed within the budget."""
    return latent_of(160, 128)


def in_strips(vae: VAE) -> bool:
    """Whether the last decode was."""
    stand_in = vae.decoder.__dict__["forward"]
    return stand_in._run._streamed._streamed.last.in_strips


def pids() -> list[int]:
    return [pid for team in spreading._teams.values() for pid in team.processes]


def kept_by(vae: VAE, kept: Kept) -> None:
    vae.decoder.kept = kept  # type: ignore[assignment]


@pytest.mark.parametrize("settings", [STREAM, Settings("auto", budget=0.002, devices="2")], ids=["stream", "auto"])
def test_the_same_picture_and_latent_and_nothing_left(vae: VAE, settings: Settings) -> None:
    z, pixels, before = latent(), torch.randn(1, 3, 320, 256), methods(vae)
    decoded, encoded = vae.decode(z), vae.encode(pixels)
    toggle = Toggle(settings)
    toggle.follow([vae], [])
    assert_same(vae.decode(z), decoded, 1e-5)
    assert in_strips(vae)
    assert_same(vae.encode(pixels), encoded, 1e-5)
    toggle.off()
    assert methods(vae) == before
    report = toggle.report()
    assert report.count("streamed over 3 processes" if settings is STREAM else "streamed over 2 processes") == 2
    assert "on one device" not in report


def test_one_device_starts_no_worker(vae: VAE) -> None:
    end_all()
    toggle = Toggle(Settings("stream"))
    toggle.follow([vae], [])
    vae.decode(latent())
    toggle.off()
    assert "over" not in toggle.report()
    assert not pids()


def test_weights_that_change_between_runs(vae: VAE) -> None:
    """Another checkpoint, or another VAE, in the place of the one before."""
    z = latent()
    for _ in range(2):
        toggle = Toggle(STREAM)
        toggle.follow([vae], [])
        assert_same(vae.decode(z), type(vae).decode(vae, z), 1e-5)
        toggle.off()
        before = pids()
        vae.decoder.last.weight.mul_(3)  # type: ignore[operator]
    toggle = Toggle(STREAM)
    toggle.follow([vae], [])
    made = vae.decode(z)
    toggle.off()
    assert_same(made, vae.decode(z), 1e-5)
    assert pids() == before


class Pressed(SimpleNamespace):
    """The state of a run in which a button is pressed once it has been asked for so often."""

    asked, at = 0, 1 << 60

    @property
    def interrupted(self) -> bool:
        self.asked += 1
        return self.asked > self.at


def test_interrupt_ends_the_strips_on_all(vae: VAE) -> None:
    """While this process waits for the others, too; the workers stay."""
    shown = vars(state_of_a_run())
    del shown["interrupted"]
    state, model, z = Pressed(**shown), Model(vae), latent()
    host, _ = host_of(state, model)
    expected = model.decode_first_stage(z)
    toggle = Toggle(STREAM, host)
    toggle.follow([vae], [], models=[model])
    kept_by(vae, Kept("is slow"))
    assert_same(model.decode_first_stage(z), expected, 1e-5)
    before = pids()
    state.asked, state.at = 0, 2  # behind the questions before it begins
    rough = cheap(z).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(model.decode_first_stage(z), rough)
    assert state.asked == 3
    state.at = 1 << 60
    kept_by(vae, Kept())
    assert_same(model.decode_first_stage(z), expected, 1e-5)
    toggle.off()
    assert pids() == before
    assert "streamed over 3 processes" in toggle.report()
    assert toggle.report().endswith("of what was stopped there is only a rough picture")


def test_a_worker_that_is_killed(vae: VAE) -> None:
    """One sentence, and the picture is made on one device; the next over all again."""
    z = latent()
    expected = vae.decode(z)
    toggle = Toggle(STREAM)
    toggle.follow([vae], [])
    kept_by(vae, Kept("is killed"))
    assert_same(vae.decode(z), expected, 1e-5)
    assert "VAE decoder streamed, " in toggle.report()
    assert "on one device: rank 1 (cpu, process " in toggle.report()
    kept_by(vae, Kept())
    assert_same(vae.decode(z), expected, 1e-5)
    toggle.off()
    assert "VAE decoder streamed over 3 processes, " in toggle.report()


@pytest.mark.parametrize("way", ["upscale", "upscale_tensors"])
def test_a_picture_is_upscaled_over_workers(way: str) -> None:
    host, model, image = Upscalers(), upscaler(), picture(160, 200)
    upscale = getattr(host, way)
    whole = upscale(model, image, tile=0)
    toggle = Toggle(Settings(vae=False, upscalers=True, budget=0.003, devices="all"))
    toggle.follow([], [], upscaling=host.modules)
    for _ in range(2):
        made = upscale(model, image)
        assert np.abs(made - whole).max() <= 1
        assert (made != whole).mean() < 1e-3
    assert "upscaler Small streamed over 3 processes" in toggle.report()
    last = toggle._upscalers["upscaler Small"]._streamed._streamed.last
    assert last is not None
    assert last.in_strips
    assert hasattr(model, "architecture")
    weights = ref(model.model)
    del model
    gc.collect()
    assert weights() is None
    toggle.off()


def by_sigmoid(x: Tensor) -> Tensor:
    """What a host has put in the place of an activation: the same, by other operators."""
    return x * torch.sigmoid(x)


FUNCTIONS = SimpleNamespace(silu=by_sigmoid, interpolate=nn.functional.interpolate)


@pytest.mark.parametrize("known", [False, True])
def test_what_a_host_has_replaced_runs_as_workers_import_it(
    vae: VAE, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody knows of it the ranks would not do the same, which is said."""
    z, places = latent(), [Replaced(devices_toys, "F", devices_toys.F)]
    monkeypatch.setattr(devices_toys, "F", FUNCTIONS)
    expected = vae.decode(z)
    options: dict[str, Any] = {"imported": partial(as_imported, places)} if known else {}
    toggle = Toggle(STREAM, Host(state_of_a_run(), cheap, SimpleNamespace(), **options))
    toggle.follow([vae], [])
    assert_same(vae.decode(z), expected, 1e-5)
    toggle.off()
    assert devices_toys.F is FUNCTIONS
    report = toggle.report()
    assert ("streamed over 3 processes" in report) == known
    assert ("on one device: rank 1 is to compute something else than rank 0" in report) != known


def test_what_is_replaced_is_so_again_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    own, places = Half.forward, [Replaced(Half, "forward", Half.forward), Replaced(devices_toys, "F", nn)]
    functional = devices_toys.F
    monkeypatch.setattr(Half, "forward", VAE.encode)
    seen: list[Any] = []

    def fail() -> None:
        with as_imported(places):
            seen.extend((Half.forward, devices_toys.F))
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fail()
    assert seen == [own, nn]
    assert Half.forward is VAE.encode
    assert devices_toys.F is functional
    with as_imported(places):
        monkeypatch.setattr(Half, "forward", VAE.forward)  # the host has chosen another meanwhile
    assert Half.forward is VAE.forward
