"""The way that a decode runs by itself: by what it needs, and what is free."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial, wraps
from typing import Any, Optional

import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor

from comfyui_patchconv import patched
from comfyui_patchconv.hosts import auto as choosing
from comfyui_patchconv.hosts.auto import AutoForward
from comfyui_patchconv.hosts.eager_needs import EagerNeeds
from comfyui_patchconv.hosts.figures import Figures
from comfyui_patchconv.hosts.memory_estimates import MARGIN, OF_FREE, AutoEstimate, Needs
from comfyui_patchconv.hosts.streamed import StreamedForward, Switch

from .vae import VAE, Holder

Z = (1, 4, 96, 64)


class Decoding:
    """A VAE's decode, with stand-ins as a host puts them on. ran: how calls ran. strips: of convolutions."""

    def __init__(
        self, free: int, budget: int = 0, fails: int = 0, replaced: Callable[[Any], Any] = lambda method: method
    ) -> None:
        torch.manual_seed(0)
        self.vae = VAE().requires_grad_(False)
        self.free, self.fails = free, fails
        self.ran: list[tuple[str, str]] = []
        self.strips = 0
        self.switch = Switch(False)
        self.part = StreamedForward(self.vae.decoder.forward, budget, lambda _: self.free, switch=self.switch)
        self.vae.decoder.forward = self.part
        self.estimate = AutoEstimate(
            Holder(self.vae), "decode", lambda shape, dtype: 1e15, total=lambda: 10**12, splits=64, threshold=0,
            budget=budget, part="decoder.forward",
        )  # fmt: skip
        self.auto = AutoForward(
            replaced(self.decode),
            partial(self.switch.set_to, True),
            self.estimate.needs,
            lambda _: self.free,
            budget,
            self.in_strips,
            self.note,
            self.vae,
        )
        self.estimate.starts = (self.auto.start,)

    def decode(self, z: Tensor) -> Tensor:
        if self.fails and not self.switch.on:
            self.fails -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return self.vae.decode(z)

    def note(self, way: str, why: str) -> None:
        self.ran.append((way, why))

    @contextmanager
    def in_strips(self, owner: Any) -> Iterator[Any]:
        assert owner is self.vae

        def count(module: Any, done: int, rows: int) -> None:
            self.strips += 1

        with patched(self.vae.decoder, 4, threshold=0, on_strip=count) as model:
            yield model

    @property
    def needs(self) -> Needs:
        return self.estimate.needs(torch.empty(Z))


def test_strips_need_less_than_eager() -> None:
    needs = Decoding(0).needs
    assert 0 < needs.patch < needs.eager


@pytest.mark.parametrize("budgeted", [False, True])
@pytest.mark.parametrize("way", ["eager", "patch", "stream"])
def test_the_least_change_that_fits(way: str, budgeted: bool) -> None:
    needs = Decoding(0).needs
    limit = {"eager": needs.eager, "patch": needs.eager - 1, "stream": needs.patch - 1}[way]
    decoding = Decoding(0 if budgeted else int(limit / OF_FREE) + 1, limit if budgeted else 0)
    z = torch.randn(Z)
    assert_same(decoding.auto(z), VAE.decode(Decoding(0).vae, z), 1e-5)
    ((ran, why),) = decoding.ran
    assert ran == way
    assert ("are allowed" if budgeted else "are free") in why
    assert bool(decoding.strips) == (way == "patch")
    assert (decoding.part._streamed.calls == 1) == (way == "stream")
    assert not decoding.switch.on


def test_a_batch_needs_as_much_for_each_sample() -> None:
    needs = Decoding(0).needs
    decoding = Decoding(int(1.5 * needs.eager / OF_FREE))
    for samples in (1, 2):
        decoding.auto(torch.randn(samples, *Z[1:]))
    assert [way for way, _ in decoding.ran] == ["eager", "stream"]


@pytest.mark.parametrize("limit", ["eager", "patch"])
def test_streaming_takes_over_where_memory_runs_out_all_the_same(limit: str) -> None:
    needs = Decoding(0).needs
    decoding = Decoding(int({"eager": needs.eager, "patch": needs.eager - 1}[limit] / OF_FREE) + 1, fails=1)
    z = torch.randn(Z)
    assert_same(decoding.auto(z), VAE.decode(Decoding(0).vae, z), 1e-5)
    assert [way for way, _ in decoding.ran] == [limit, "stream"]
    assert "memory ran out" in decoding.ran[1][1]
    decoding.auto(z)  # what was too much once is not tried again
    assert decoding.ran[2] == ("stream", "memory ran out before")
    decoding.auto(torch.randn(1, 4, 8, 8))
    assert decoding.ran[3][0] == "eager"


@pytest.mark.parametrize("replaced", [lambda method: method, lambda method: lambda z: method(z)])
def test_the_model_is_known_whatever_another_pack_has_put_in_the_place_of_its_method(replaced: Any) -> None:
    """A method of an object of its own, or a function."""
    needs = Decoding(0).needs
    decoding = Decoding(int((needs.eager - 1) / OF_FREE) + 1, replaced=replaced)
    z = torch.randn(Z)
    assert_same(decoding.auto(z), VAE.decode(Decoding(0).vae, z), 1e-5)
    assert [way for way, _ in decoding.ran] == ["patch"]
    assert decoding.strips


def test_a_method_of_a_model_tells_it_through_what_wraps_it() -> None:
    """As `torch.compile` does: a pack may compile the method of another model than the one that is patched."""
    other, asked = VAE(), []
    functions = [other.decode, wraps(other.decode)(lambda z: z), partial(other.decode), torch.compile(other.decode)]
    for function in functions:
        auto = AutoForward(
            function, nullcontext, lambda _: Needs(2, 1), lambda _: 0, 1,
            lambda model: asked.append(model) or nullcontext(),
            model=VAE(),
        )  # fmt: skip
        with suppress(RuntimeError):
            auto(torch.zeros(1, 5, 1, 1))
    assert [model is other for model in asked] == [True] * len(functions)


def test_what_is_free_is_asked_of_the_device_that_a_call_names() -> None:
    """The host hands some encoders pixels that lie elsewhere."""
    asked: list[str] = []
    vae, named = VAE(), []

    def encode(x: Tensor, device: Any = None) -> Tensor:
        named.append(device)
        return x

    auto = AutoForward(
        encode, nullcontext, lambda _: Needs(2, 1), lambda device: asked.append(str(device)) or 100, 0,
        lambda _: nullcontext(), model=vae,
    )  # fmt: skip
    for device in ("meta", torch.device("meta"), None):
        auto(torch.zeros(1, 3, 8, 8), device=device)
    assert asked == ["meta", "meta", "cpu"]
    assert named == ["meta", torch.device("meta"), None]


def test_memory_is_given_back_on_the_device_that_a_call_names(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[str] = []
    monkeypatch.setattr(choosing, "release", lambda device: released.append(str(device)))
    decoding = Decoding(10**12, fails=1)
    decoding.auto.forward = lambda z, device: decoding.decode(z)
    decoding.auto(torch.zeros(Z), device="meta")
    assert released == ["meta"]


def test_a_choice_is_logged_once_for_each_decode_and_where_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    """A tiled decode calls for each tile, and a clone for another device is begun where the first one is."""
    needs = Decoding(0).needs
    decoding = Decoding(int(3.5 * needs.eager / OF_FREE))
    clone = copy.copy(decoding.auto)

    def logged(auto: AutoForward, *samples: int) -> list[str]:
        caplog.clear()
        for count in samples:
            auto(torch.randn(count, *Z[1:]))
        return [re.sub(r".*auto: (.*) \(.*", r"\1", line) for line in caplog.messages]

    with caplog.at_level(logging.INFO, "comfyui_patchconv"):
        assert logged(decoding.auto, 1, 1, 2, 3) == ["eager"]
        assert logged(decoding.auto, 1) == []
        decoding.estimate(Z, torch.float32)
        assert logged(clone, 1, 1) == ["eager"]
        assert logged(decoding.auto, 5, 6, 1, 1) == ["streamed", "eager"]
        decoding.fails = 1
        assert logged(decoding.auto, 1, 1, 1) == ["streamed"]
    assert len(decoding.ran) == 15


def test_other_errors_are_the_callers() -> None:
    decoding = Decoding(10**16)
    with pytest.raises(RuntimeError, match="size"):
        decoding.auto(torch.randn(1, 3, 8, 8))
    assert [way for way, _ in decoding.ran] == ["eager"]


def test_what_cannot_be_counted_goes_by_the_hosts_own_estimate() -> None:
    decoding = Decoding(10**12)
    decoding.estimate._eager = EagerNeeds(torch.nn.Identity())  # has no decode
    decoding.auto(torch.randn(Z))
    assert decoding.ran[0][0] == "stream"


@pytest.mark.parametrize(("total", "eagerly"), [(10**12, True), (10**9, False)])
def test_the_host_makes_room_for_eager_where_the_device_has_that(total: int, eagerly: bool) -> None:
    decoding, shape = Decoding(0), (1, 4, 4096, 4096)
    decoding.estimate.total = lambda: total
    said, needs = decoding.estimate(shape, torch.float32), decoding.estimate.needs(torch.empty(shape, device="meta"))
    assert (said >= int(MARGIN * needs.eager)) == eagerly


@pytest.mark.parametrize("budget", [0.0, 1.0, 2.7])
@pytest.mark.parametrize("host", [1e15, 1.0])
def test_a_batch_that_the_host_cuts_by_what_it_is_told_runs_eagerly(host: float, budget: float) -> None:
    """Whatever is free, and however little the host itself reckons with; a host takes as many samples as fit."""
    needs = Decoding(0).needs
    decoding = Decoding(0, int(budget * needs.eager))
    total = 40 * needs.eager
    decoding.estimate.host, decoding.estimate.total = lambda shape, dtype: host, lambda: total
    batches = set()
    for samples in (1, 2, 64):
        told = decoding.estimate((samples, *Z[1:]), torch.float32)
        for free in range(int(told), total, needs.eager // 7):
            batch = min(max(1, int(free / told)), samples)
            batches.add(batch)
            input = torch.empty(batch, *Z[1:], device="meta")
            decoding.free = free - batch * needs.eager // 20  # some lies there since the host has looked
            assert decoding.auto.choose(input, torch.device("cpu")).way == "eager"
    assert max(batches) >= (int(budget) or 20)


def test_a_budget_has_the_host_make_no_more_room_for_what_is_within_it() -> None:
    needs = Decoding(0).needs
    free, budgeted = Decoding(0), Decoding(0, int(2.5 * needs.eager))
    for samples, same in ((1, True), (2, True), (3, False)):
        told = [one.estimate((samples, *Z[1:]), torch.float32) for one in (free, budgeted)]
        assert (told[0] == told[1]) == same


@pytest.mark.parametrize(
    ("streamed", "strips", "way"),
    [(False, 0, "eager"), (False, 3, "in up to 3 strips"), (True, 7, "streamed in 7 strips")],
)
def test_the_report_says_what_was_chosen_and_why(streamed: bool, strips: int, way: str) -> None:
    figures = Figures("VAE decoder", streamed, strips, why="eager needs 10.20 GiB, 7.10 GiB are free")
    assert figures.words()["way"] == f"auto: {way} (eager needs 10.20 GiB, 7.10 GiB are free)"


@pytest.mark.parametrize(("budget", "missed"), [(1000, True), (10**9, False), (0, False)])
def test_a_budget_that_could_not_be_kept_is_told(budget: int, missed: bool) -> None:
    told: list[int] = []
    vae: VAE = Decoding(0).vae
    forward: Optional[Any] = vae.decoder.forward
    part = StreamedForward(type(vae.decoder).forward.__get__(vae.decoder), budget, lambda _: 0, on_miss=told.append)
    assert forward is not None
    part(torch.randn(1, 4, 256, 256))
    assert bool(told) == missed
    assert all(expected > budget for expected in told)
