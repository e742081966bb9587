"""The WebUI's toggle patches models for a run, and leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor, nn

from comfyui_patchconv.conv.forward import TiledForward
from comfyui_patchconv.hosts.eager_needs import EagerNeeds
from comfyui_patchconv.hosts.memory_estimates import OF_FREE, needs_of
from comfyui_patchconv.hosts.webui import stand_ins
from comfyui_patchconv.hosts.webui.toggle import Settings, Toggle
from comfyui_patchconv.memory import usage as memory
from comfyui_patchconv.units import GIB

from .vae import VAE, Half, Holder
from .webui_state import Model, host_of, state_of_a_run


class ForgeConv2d(nn.Conv2d):
    """Calls what is set on the module only if it casts, as Forge's does."""

    parameters_manual_cast = False

    def forward(self, x: Tensor) -> Tensor:
        if self.parameters_manual_cast:
            weight, bias = (None if tensor is None else tensor.to(x) for tensor in (self.weight, self.bias))
            return self._conv_forward(x, weight, bias)  # pyright: ignore[reportArgumentType]
        return super()._conv_forward(x, self.weight, self.bias)


@pytest.fixture
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE().requires_grad_(False)


def methods(model: nn.Module) -> dict[str, Any]:
    """Everything that is set on a module itself and could stand in for a method."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
        if callable(value)
    }


@pytest.mark.parametrize("mode", ["patch", "stream"])
def test_the_result_is_the_same_on_and_nothing_is_left_off(vae: VAE, mode: str) -> None:
    z, pixels, before = torch.randn(1, 4, 24, 16), torch.randn(1, 3, 24, 16), methods(vae)
    decoded, encoded = vae.decode(z), vae.encode(pixels)
    toggle = Toggle(Settings(mode=mode, threshold=0.0, splits=3))
    toggle.follow([vae], [])
    assert toggle.on
    assert methods(vae) != before
    assert_same(vae.decode(z), decoded, 1e-6)
    assert_same(vae.encode(pixels), encoded, 1e-6)
    toggle.off()
    assert not toggle.on
    assert methods(vae) == before
    assert torch.equal(vae.decode(z), decoded)
    for half in ("decoder", "encoder"):
        assert f"VAE {half} {'streamed' if mode == 'stream' else 'in up to 3 strips'}" in toggle.report()
    assert "without Patch Conv: " in toggle.report()


def test_a_unet_runs_in_strips_in_any_mode(vae: VAE) -> None:
    unet = Half((4, 4))
    toggle = Toggle(Settings(mode="stream", vae=False, unet=True, splits=2, threshold=0.0))
    toggle.follow([vae], [unet])
    assert not methods(vae)
    assert isinstance(unet.conv_in._conv_forward, TiledForward)
    unet(torch.randn(1, 4, 12, 8))
    toggle.off()
    assert not methods(unet)
    assert toggle.report() == "Patch Conv: U-Net in up to 2 strips"


def test_nothing_is_compared_that_ran_as_without_us(vae: VAE) -> None:
    toggle = Toggle(Settings(mode="patch", threshold=16.0))
    toggle.follow([vae], [])
    vae.decode(torch.randn(1, 4, 24, 16))
    toggle.off()
    assert "VAE decoder whole" in toggle.report()
    assert "without Patch Conv" not in toggle.report()


def test_a_unet_without_convolutions() -> None:
    """A transformer."""
    toggle = Toggle(Settings(vae=False, unet=True))
    toggle.follow([], [nn.Linear(4, 4)])
    assert toggle.report() == "Patch Conv: nothing that it was asked to patch has run"


def test_forges_convolutions_are_made_to_cast_and_left_as_they_were(vae: VAE) -> None:
    for _, conv in list(vae.named_modules()):
        if isinstance(conv, nn.Conv2d):
            conv.__class__ = ForgeConv2d
    z, before = torch.randn(1, 4, 24, 16), methods(vae)
    decoded = vae.decode(z)
    toggle = Toggle(Settings(mode="patch", splits=3, threshold=0.0))
    toggle.follow([vae], [])
    assert_same(vae.decode(z), decoded, 1e-6)
    assert "VAE decoder in up to 3 strips" in toggle.report()
    forward = vae.decoder.conv_in.forward
    # Meanwhile the host moves weights out of the device's memory.
    vae.decoder.conv_in.__dict__["parameters_manual_cast"] = True
    assert_same(vae.decode(z), decoded, 1e-6)
    toggle.off()
    assert methods(vae) == before
    assert [name for name, conv in vae.named_modules() if getattr(conv, "parameters_manual_cast", False)] == [
        "decoder.conv_in"
    ]
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(forward(x), vae.decoder.conv_in(x))


@pytest.mark.parametrize("settings", [Settings("patch", splits=4), Settings("stream")], ids=["patch", "stream"])
def test_the_host_hears_what_a_decode_takes(vae: VAE, settings: Settings) -> None:
    holder = Holder(vae)
    before, shape = dict(holder.__dict__), (2, 4, 256, 256)
    eager = holder.memory_used_decode(shape, torch.float32)
    toggle = Toggle(settings)
    toggle.follow([vae], [], [holder])
    estimate = holder.memory_used_decode(shape, torch.float32)
    maps = 2 * 8 * 256 * 256 * 4  # of one sample: the norm's input and output
    assert (maps if settings.mode == "patch" else 0) < estimate < eager / 20
    assert holder.memory_used_decode((1, *shape[1:]), torch.float32) == estimate
    assert holder.memory_used_decode(shape, torch.float64) > estimate  # half precision is widened by some processors
    assert holder.memory_used_decode((2, 5, 256, 256), torch.float32) == eager  # cannot be counted, so the host's own
    assert holder.memory_used_encode((1, 3, 8, 8), torch.float32) == 8 * 8 * 4  # never above the host's own
    copied = copy.copy(holder)
    toggle.follow([vae], [], [copied])
    assert holder.__dict__ == before
    assert copied.memory_used_decode(shape, torch.float32) == estimate
    kept = copy.copy(copied)
    toggle.off()
    assert copied.__dict__ == before
    assert kept.memory_used_decode(shape, torch.float32) == eager


class Decoder:
    value = 1

    def decode(self) -> int:
        return self.value


def test_a_copy_of_what_is_stood_in_for_computes_with_its_own_and_is_left_without_a_trace() -> None:
    model = Decoder()
    first = stand_ins.StandIn(Toggle(Settings()), model, "decode")
    copied = copy.copy(model)
    copied.value = 2
    second = stand_ins.StandIn(Toggle(Settings()), copied, "decode")
    assert copied.decode() == 2
    assert second.leave()
    assert copied.__dict__ == {"value": 2}
    assert first.leave()
    assert not model.__dict__


def test_a_model_that_is_no_longer_followed_is_restored(vae: VAE) -> None:
    other = VAE()
    toggle = Toggle(Settings())
    toggle.follow([vae], [])
    before = methods(vae)
    toggle.follow([vae, other], [])
    assert methods(vae) == before
    toggle.follow([other], [])
    assert not methods(vae)
    assert methods(other)
    toggle.off()
    assert not methods(other)


def test_errors_of_the_model_pass_through(vae: VAE) -> None:
    toggle = Toggle(Settings(mode="stream"))
    toggle.follow([vae], [])
    with pytest.raises(RuntimeError, match="channels"):
        vae.decode(torch.randn(1, 5, 8, 8))
    toggle.off()
    assert not methods(vae)


def test_a_stand_in_of_another_extension_is_left_alone(vae: VAE) -> None:
    """Tiled VAE puts one on the decoder, before us or after us."""
    theirs = vae.decoder.forward
    vae.decoder.forward = lambda x: theirs(x) + 1
    before = methods(vae)
    z = torch.randn(1, 4, 8, 8)
    expected = vae.decode(z)
    toggle = Toggle(Settings(mode="stream"))
    toggle.follow([vae], [])
    assert torch.equal(vae.decode(z), expected)
    toggle.off()
    assert methods(vae) == before
    assert toggle.report() == "Patch Conv: VAE decoder left to another extension"
    toggle = Toggle(Settings(mode="patch", splits=3, threshold=0.0))
    toggle.follow([vae], [])
    assert_same(vae.decode(z), expected, 1e-6)
    toggle.off()
    assert toggle.report() == ("Patch Conv: VAE decoder left to another extension, its convolutions in up to 3 strips")


def test_a_decoder_that_another_extension_takes_later(vae: VAE) -> None:
    toggle = Toggle(Settings(mode="stream"))
    toggle.follow([vae], [])
    ours = vae.decoder.forward
    vae.decoder.forward = lambda x: x[:, :3]
    vae.decode(torch.randn(1, 4, 8, 8))
    toggle.follow([vae], [])  # as before each decode
    vae.decoder.forward = ours
    toggle.off()
    assert not methods(vae)
    assert toggle.report() == "Patch Conv: VAE decoder left to another extension"


def test_a_stand_in_that_comes_later_and_puts_back_what_it_found(vae: VAE) -> None:
    """Tiled VAE does, behind us: what it found is ours, or, from an earlier run, the module's own method."""
    z = torch.randn(1, 4, 24, 16)
    expected = VAE.decode(vae, z)
    original: list[Any] = []
    for _ in range(2):
        toggle = Toggle(Settings(mode="stream"))
        toggle.follow([vae], [])
        original.append(vae.decoder.forward)
        vae.decoder.forward = lambda x: original[0](x) + 1
        assert_same(vae.decode(z), expected + 1, 1e-6)
        toggle.off()
        vae.decoder.forward = original[0]  # found in the first run
        assert torch.equal(vae.decode(z), expected)
        toggle.off()
        assert not methods(vae)
    vae.decoder.forward = vae.decoder.forward
    toggle = Toggle(Settings(mode="stream"))
    toggle.follow([vae], [])
    vae.decode(z)
    assert "VAE decoder streamed" in toggle.report()


def test_what_others_still_hold_of_ours_is_idle(vae: VAE) -> None:
    toggle = Toggle(Settings(mode="stream"))
    toggle.follow([vae], [])
    ours = vae.decoder.forward
    toggle.off()
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(ours(z), vae.decoder(z))
    assert toggle.report() == "Patch Conv: nothing that it was asked to patch has run"


def test_the_host_hears_how_far_a_decode_is(vae: VAE) -> None:
    state = state_of_a_run()
    told: list[tuple[str, int]] = []
    host, _ = host_of(state, Model(vae))
    toggle = Toggle(Settings(mode="stream", budget=0.001), host)
    toggle.follow([vae], [])
    check = toggle.stops.check
    toggle.stops.check = lambda: (told.append((state.textinfo, state.sampling_steps)), check())[1]
    vae.decode(torch.randn(1, 4, 64, 64))
    assert told[0] == (None, 20)
    assert told[-1] == ("VAE decoder in strips", 1000)
    assert (state.textinfo, state.sampling_step, state.sampling_steps) == (None, 20, 20)


def chosen(vae: VAE, z: Tensor, free: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str:
    """The report of a decode whose way is chosen where so many bytes are free. It gives the right values."""
    expected, before = vae.decode(z), methods(vae)
    monkeypatch.setattr(stand_ins, "free", lambda device: free)
    toggle = Toggle(Settings(splits=64, threshold=0.0, **settings))
    toggle.follow([vae], [])
    assert_same(vae.decode(z), expected, 1e-6)
    toggle.off()
    assert methods(vae) == before
    return toggle.report()


@pytest.mark.parametrize("forge", [False, True])
def test_a_decode_runs_as_it_fits(vae: VAE, forge: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for conv in [conv for conv in vae.modules() if forge and isinstance(conv, nn.Conv2d)]:
        conv.__class__ = ForgeConv2d
    z = torch.randn(2, 4, 96, 64)
    maps = EagerNeeds(vae.decoder).of_call("forward", (z[:1],), {}, z.device)
    eager, patch = (2 * size for size in needs_of(maps, 64, 0, "cpu", z.dtype))
    assert chosen(vae, z, 1 << 40, monkeypatch).startswith("Patch Conv: VAE decoder auto: eager (eager needs ")
    assert " auto: in up to 48 strips (" in chosen(vae, z, int(eager / OF_FREE) - 2, monkeypatch)
    assert " auto: streamed (" in chosen(vae, z, int(patch / OF_FREE) - 2, monkeypatch)
    assert " are allowed)" in chosen(vae, z, 1 << 40, monkeypatch, budget=patch / GIB / 2)


def test_what_cannot_be_counted_is_streamed(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EagerNeeds, "of_call", lambda *args: 0)
    report = chosen(vae, torch.randn(1, 4, 24, 16), 1 << 40, monkeypatch)
    assert "auto: streamed (what eager needs is not known)" in report


class Full:
    """Stands in for `group_norm` where memory runs out, `times` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
        self.times, self._norm = times, nn.functional.group_norm
        monkeypatch.setattr(nn.functional, "group_norm", self)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.times and type(x) is Tensor:  # what is counted has no values
            self.times -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return self._norm(x, *args, **kwargs)


def test_streaming_takes_over_where_memory_runs_out(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(1, 4, 24, 16)
    expected = vae.decode(z)
    full = Full(monkeypatch)
    toggle = Toggle(Settings())
    toggle.follow([vae], [])
    for _ in range(2):
        assert_same(vae.decode(z), expected, 1e-6)
    assert full.times == 0
    assert "VAE decoder auto: streamed (memory ran out before)" in toggle.report()


def test_whoever_only_wants_to_be_rescued_hears_of_nothing_else(
    vae: VAE, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    z, before, holder = torch.randn(1, 4, 24, 16), methods(vae), Holder(vae)
    expected, estimates = vae.decode(z), dict(holder.__dict__)
    for conv in [conv for conv in vae.modules() if isinstance(conv, nn.Conv2d)]:
        conv.__class__ = ForgeConv2d
    toggle = Toggle(Settings(), only_rescue=True)
    toggle.follow([vae], [], [holder])
    assert not [name for name in methods(vae) if "conv" in name]
    assert holder.__dict__ == estimates
    assert torch.equal(vae.decode(z), expected)
    assert toggle.report() == ""
    assert "auto" not in caplog.text
    Full(monkeypatch)
    assert_same(vae.decode(z), expected, 1e-6)
    # No peak is told where the process had room for so small a decode.
    assert toggle.report().startswith("Patch Conv: VAE decoder auto: streamed (memory ran out eagerly), ")
    toggle.off()
    assert methods(vae) == before
    Full(monkeypatch)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        vae.decode(z)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "tile"}, "mode is 'tile': use 'auto', 'patch' or 'stream'."),
        ({"vae": 1}, "vae is 1: use True or False."),
        ({"splits": 1.5}, "splits is 1.5: use a number of strips, or 0."),
        ({"threshold": -1}, "threshold is -1: use a number of millions of elements, or 0."),
        ({"budget": float("nan")}, "budget is nan: use a number of GiB, or 0."),
        ({"budget": 1e6}, "budget is 1000000.0: use at most 1024 GiB."),
        ({"budget": "2"}, "budget is '2': use a number of GiB, or 0."),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Settings(**values)
    assert str(error.value) == message


def test_free_memory_is_what_the_system_calls_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.free(torch.device("cpu")) > 2**20
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  4096 kB\nMemFree:  1 kB\nMemAvailable:  2048 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    assert memory.free(torch.device("cpu")) == 2 * 2**20
