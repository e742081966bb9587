"""The way that a decode runs by itself: by what it needs, and what is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional

import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor

from comfyui_patchconv import patched
from comfyui_patchconv.hosts.auto import AutoForward
from comfyui_patchconv.hosts.eager_needs import EagerNeeds
from comfyui_patchconv.hosts.figures import Figures
from comfyui_patchconv.hosts.memory_estimates import MARGIN, OF_FREE, AutoEstimate, Needs
from comfyui_patchconv.hosts.streamed import StreamedForward, Switch

from .vae import VAE, Holder

Z = (1, 4, 96, 64)


class Decoding:
    """A VAE's decode, with stand-ins as a host puts them on. ran: how calls ran. strips: of convolutions."""

    def __init__(self, free: int, budget: int = 0, fails: int = 0) -> None:
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
            self.decode,
            partial(self.switch.set_to, True),
            self.estimate.needs,
            lambda _: self.free,
            budget,
            self.in_strips,
            self.note,
        )

    def decode(self, z: Tensor) -> Tensor:
        if self.fails and not self.switch.on:
            self.fails -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return self.vae.decode(z)

    def note(self, way: str, why: str) -> None:
        self.ran.append((way, why))

    @contextmanager
    def in_strips(self, owner: Any) -> Iterator[Any]:
        assert owner is self

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
