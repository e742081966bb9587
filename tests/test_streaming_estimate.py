"""What a whole decode takes, of which a part is streamed chunk by chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_zoo import draw_weights, hunyuan, image, kl, wan
from torch import Tensor, nn

from comfyui_patchconv import planner
from comfyui_patchconv.streaming import Run, carry_out, choose, expect

CPU = torch.device("cpu")


class Chunks(nn.Module):
    """Decodes a video frame by frame, keeps the last frame for the next, and puts the frames together."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Frame()

    def decode(self, latent: Tensor) -> Tensor:
        kept: list[Any] = [None]
        frames = [self.decoder(latent[:, :, frame : frame + 1], kept) for frame in range(latent.shape[2])]
        return torch.cat(frames, 2)


class Frame(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 32, 3, padding=1)
        self.norm = nn.GroupNorm(8, 32)
        self.out = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor, kept: list[Any]) -> Tensor:
        x = x.squeeze(2)
        before, kept[0] = kept[0], x
        if before is not None:
            x = x + before
        return self.out(self.norm(self.wide(x))).unsqueeze(2)


def decode(latent: Tensor) -> Any:
    return lambda model: model.decode(torch.empty(latent.shape))


def test_frames_that_are_done_lie_beside_the_plan() -> None:
    """By hand: three frames, of which two are there already while the last is made; the sum of all is less."""
    model, latent = Chunks(), image(4, 3, 64, 48)
    first, later = (
        choose(model.decoder.forward, (latent[:, :, :1], [kept]), {}) for kept in (None, torch.empty(1, 4, 64, 48))
    )
    frame = 3 * 64 * 48 * 4
    expected = expect(model, "decoder.forward", decode(latent), device=CPU)
    assert expected.peak == latent.nbytes + 2 * frame + later.peak
    assert expected.work == first.work + 2 * later.work


def test_what_lies_beside_can_be_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many small frames the most is in use when they are put together."""
    monkeypatch.setattr(planner, "ALLOCATOR_BYTES", {"cpu": 0})
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 10_000)
    model, latent = Chunks(), image(4, 100, 32, 16)
    video = 3 * 100 * 32 * 16 * 4
    assert expect(model, "decoder.forward", decode(latent), device=CPU).peak == latent.nbytes + 2 * video


@pytest.mark.parametrize(
    ("build", "shape"),
    [(kl, (4, 24, 24)), (wan, (16, 3, 8, 8)), (hunyuan, (4, 2, 8, 8))],
    ids=["kl", "wan", "hunyuan"],
)
@pytest.mark.parametrize("budget", [None, 1])
def test_calls_are_those_that_run(build: Any, shape: tuple[int, ...], budget: int | None) -> None:
    model: Any = draw_weights(build(4) if build is kl else build())
    latent, forward, runs = image(*shape), model.decoder.forward, []
    expected = expect(model, "decoder.forward", decode(latent), device=CPU, budget=budget)
    assert "forward" not in model.decoder.__dict__

    def streamed(*args: Any, **kwargs: Any) -> Any:
        runs.append(Run(choose(forward, args, kwargs, budget=budget)))
        return carry_out(forward, args, kwargs, runs[-1])

    model.decoder.forward = streamed
    with torch.no_grad():
        model.decode(latent)
    assert expected.work == sum(run.work for run in runs)
    assert expected.peak >= max(run.peak for run in runs)


def test_a_method_that_is_streamed_as_a_whole() -> None:
    model: Any = kl(4)
    latent = image(4, 16, 16)
    assert (
        expect(model, "decode", decode(latent), device=CPU).peak
        == latent.nbytes + choose(model.decode, (latent,), {}).peak
    )


def test_time_that_runs_out() -> None:
    with pytest.raises(TimeoutError):
        expect(Chunks(), "decoder.forward", decode(image(4, 3, 64, 48)), device=CPU, seconds=0)
