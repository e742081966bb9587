"""What hosts are told that a VAE takes, without a host."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from comfyui_patchconv.hosts.attributes import FORGE_CASTS
from comfyui_patchconv.hosts.eager_needs import EagerNeeds, signature, without_values
from comfyui_patchconv.hosts.memory_estimates import MARGIN, StreamEstimate, StripEstimate

from .vae import VAE, Holder

SHAPE = (2, 4, 256, 256)
MAP = 8 * 256 * 256 * 4  # of one sample, inside


def huge(shape: Any, dtype: torch.dtype) -> float:
    return 1e15


class Video(nn.Module):
    """Decodes a frame at a time and keeps the last one for the next, as Wan's."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Frame()

    def decode(self, z: Tensor) -> Tensor:
        done, last = [], torch.zeros_like(z[:, :, 0])
        for frame in z.unbind(2):
            done.append(self.decoder(torch.cat([last, frame], dim=1)))
            last = frame
        return torch.stack(done, dim=2)


class Frame(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.convolutions(x)


def test_strips_need_their_maps_and_no_more_than_the_host_thinks() -> None:
    estimate = StripEstimate(Holder(VAE()), "decode", huge, splits=4, threshold=0)
    found = estimate(SHAPE, torch.float32)
    assert 2 * MAP < estimate.eager() < found / MARGIN < 2 * estimate.eager()
    estimate.host = lambda shape, dtype: 5.0
    assert estimate(SHAPE, torch.float32) == 5.0


def test_what_cannot_be_counted_is_the_hosts_to_say(caplog: pytest.LogCaptureFixture) -> None:
    estimate = StripEstimate(Holder(VAE()), "decode", huge, splits=4, threshold=0)
    assert estimate.eager() == 0
    with caplog.at_level(logging.INFO):
        assert estimate((2, 5, 256, 256), torch.float32) == 1e15
        assert estimate((2, 5, 256, 256), torch.float32) == 1e15
    assert caplog.text.count("decode of VAE not counted") == 1
    assert estimate.eager() == 0


def test_a_question_begins_a_decode_and_says_how_much_there_is_to_do() -> None:
    begun: list[str] = []
    work: list[int] = []
    estimate = StreamEstimate(
        Holder(VAE()), "decode", huge, budget=0, part="decoder.forward", on_work=work.append,
        starts=[lambda: begun.append("start")],
    )  # fmt: skip
    found = estimate(SHAPE, torch.float32)
    assert found / MARGIN < 6 * MAP  # a CPU convolves whole blocks of channels: here of twice as many as there are
    assert estimate((1, *SHAPE[1:]), torch.float32) == found
    assert begun == ["start", "start"]
    assert work[0] == 2 * work[1] > 0
    assert estimate.eager() > 2 * MAP
    assert not estimate.at_once(torch.zeros(SHAPE))


def test_a_budget_bounds_what_the_host_is_told() -> None:
    shape = (1, 4, 1024, 1024)
    free, bounded = (
        StreamEstimate(Holder(VAE()), "decode", huge, budget=budget, part="decoder.forward")(shape, torch.float32)
        for budget in (0, MAP)
    )
    assert bounded < free


def test_chunks_are_decoded_at_once_where_that_takes_less() -> None:
    holder: Any = Holder(VAE())
    holder.first_stage_model = Video()
    chunks = StreamEstimate(holder, "decode", huge, budget=0, part="decoder.forward")
    shape = (1, 4, 6, 128, 128)
    found, at_once = chunks(shape, torch.float32), chunks.at_once(torch.zeros(shape))
    whole = StreamEstimate(holder, "decode", huge, budget=0)
    assert found <= whole(shape, torch.float32) or not at_once
    assert not whole.at_once(torch.zeros(shape))


def test_calls_are_counted_once_without_the_hosts_casts() -> None:
    class Casting(nn.Conv2d):
        counted = 0

        def forward(self, input: Tensor) -> Tensor:
            Casting.counted += 1
            assert not self.__dict__[FORGE_CASTS]
            return super().forward(input)

    module = Casting(4, 8, 3, padding=1)
    module.__dict__[FORGE_CASTS] = True
    needs, image = EagerNeeds(module), torch.zeros(1, 4, 64, 64)
    found = [needs.of_call("forward", (image,), {}, image.device) for _ in range(2)]
    assert found == [(4 + 8) * 64 * 64 * 4] * 2
    assert Casting.counted == 1
    assert needs.of_call("forward", (torch.zeros(1, 5, 64, 64),), {}, image.device) == 0
    assert module.__dict__[FORGE_CASTS]


def test_an_error_of_a_count_is_raised_each_time() -> None:
    def run(copy: Any, make: Any) -> None:
        runs.append(1)
        raise RuntimeError("looks at values")

    runs: list[int] = []
    needs = EagerNeeds(VAE())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="looks at values"):
            needs.of("key", run, torch.device("cpu"))
    assert len(runs) == 1


def test_what_is_noted_of_a_call_keeps_none_of_its_tensors() -> None:
    """However deep they lie: models are given lists of reference images, and lists of such lists."""

    class Pair(NamedTuple):
        one: Tensor
        other: str

    tensors = [torch.zeros(2, number + 1, dtype=torch.bfloat16).t() for number in range(5)]
    alive = [ref(tensor) for tensor in tensors]
    one, two, three, four, five = tensors
    values = [one, [two, (three, None)], {"references": [{"inside": four}], 1: "text"}, Pair(five, "b"), 0.5]
    noted = without_values(values)
    meta = tree_map(lambda each: each.to("meta") if isinstance(each, Tensor) else each, values)
    assert signature(noted) == signature(meta)
    del tensors, values, one, two, three, four, five
    assert not any(tensor() is not None for tensor in alive)
    assert noted[2][1] == "text"
    assert noted[3].other == "b"
    assert noted[1][1][1] is None
