"""Whatever a budget says, the result is the same; and what a schedule expects to take is what it is told to take."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from conv_helpers import assert_same
from model_zoo import CASES, draw_weights, image, kl
from torch import Tensor, nn

from comfyui_patchconv.streaming import Streamed, Tuning, expect, peak_activations, stream, streamed

SMALL = Tuning(strip_bytes=20_000, allocator_bytes=0, always=True)
CPU = torch.device("cpu")


@pytest.mark.parametrize("budget", [None, 1, 300_000, 10**9])
@pytest.mark.parametrize("name", ["kl decode", "kl encode", "tiny decode", "hunyuan decode", "qwen encode"])
def test_an_estimate_is_what_the_call_plans(name: str, budget: Optional[int]) -> None:
    build, _, input = CASES[name]
    model: Any = draw_weights(build())
    kind = name.split()[1]
    expected = expect(
        model, lambda copy, make: getattr(copy, kind)(make(input.shape)), device=CPU, budget=budget, tuning=SMALL
    )
    runner = Streamed(budget, tuning=SMALL)
    with torch.no_grad():
        eager = getattr(model, kind)(input)
        ours = runner.call(getattr(model, kind), (input,), {})
    assert runner.last is not None
    assert runner.last.planned == expected.work
    assert runner.last.peak <= expected.peak
    if name != "qwen encode":  # which keeps frames in lists of its own, that the estimate counts beside
        assert (runner.last.peak, runner.last.moved) == (expected.peak, expected.moved)
    assert runner.last.work == runner.last.planned
    pair = [value.sample if kind == "decode" else value.latent_dist.parameters for value in (ours, eager)]
    assert_same(pair[0], pair[1], 1e-5)


def test_a_budget_moves_maps() -> None:
    model: Any = draw_weights(kl(4))
    run = lambda copy, make: copy.decode(make((1, 4, 64, 64)))  # noqa: E731
    free = expect(model, run, device=CPU, tuning=SMALL)
    tight = expect(model, run, device=CPU, tuning=SMALL, budget=free.peak * 3 // 4)
    assert free.moved == 0 < tight.moved
    assert tight.peak <= free.peak * 3 // 4


def test_a_second_call_plans_nothing() -> None:
    model: Any = draw_weights(kl(4))
    runner, latent = Streamed(tuning=SMALL), image(4, 16, 16)
    with torch.no_grad():
        first = runner.call(model.decode, (latent,), {}).sample
        kept = dict(runner._schedules)
        second = runner.call(model.decode, (latent,), {}).sample
    assert kept
    assert dict(runner._schedules) == kept
    assert torch.equal(first, second)


@pytest.mark.parametrize("budget", [0, -1, 1.5, "2GiB", True])
def test_a_wrong_budget(budget: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"budget is .* give a whole number of bytes above 0"),
        stream(kl(4), budget=budget),
    ):
        pass


def test_only_modules_and_methods_are_streamed() -> None:
    with pytest.raises(TypeError, match="cannot be streamed: give a module, or a method"), stream(3):  # type: ignore
        pass


class TestFiles:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        return tmp_path

    def test_nothing_is_left_of_an_interrupted_call(self, folder: Path) -> None:
        model: Any = draw_weights(kl(4))
        steps = 0

        def stop(done: int, work: int) -> None:
            nonlocal steps
            steps += 1
            if steps == 5:
                raise KeyboardInterrupt

        with (
            pytest.raises(KeyboardInterrupt),
            torch.no_grad(),
            stream(model.decoder, budget=1, on_progress=stop, tuning=SMALL),
        ):
            model.decode(image(4, 19, 16))
        assert list(folder.iterdir()) == []
        assert "forward" not in model.decoder.__dict__

    def test_no_room_is_said_before_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model: Any = draw_weights(kl(4))
        usage, done = shutil.disk_usage(tempfile.gettempdir()), []
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        decode = streamed(model.decode, budget=1, on_progress=lambda *steps: done.append(steps), tuning=SMALL)
        with pytest.raises(OSError, match=r"feature maps lie in a file, and .+ has no room for it"), torch.no_grad():
            decode(image(4, 19, 16))
        assert done == []


def test_never_worse_than_eager() -> None:
    """A network that streaming cannot help runs as it is written, in eager's memory."""

    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).sort(2)[0].view(x.shape) + x.flip(2)

    model = Sorted()
    expected = expect(model, lambda copy, make: copy(make((1, 4, 64, 64)) * 2), device=CPU)
    assert expected.peak <= 1.5 * expected.eager


class TestCopies:
    """What is counted is a copy, and the model is left as it was."""

    def test_replaced_methods_are_not_run(self) -> None:
        model, calls = nn.Conv2d(2, 2, 1), []
        model.forward = lambda x: calls.append(x) or x  # type: ignore[method-assign]
        assert peak_activations(model, lambda copy, make: copy(make((1, 2, 8, 8))), device=CPU) == 2 * 2 * 64 * 4
        assert not calls

    def test_attributes(self) -> None:
        model, seen = nn.Sequential(nn.Dropout(0.5), nn.Identity()), []
        peak_activations(
            model,
            lambda copy, make: seen.extend([copy[0].p, hasattr(copy[1], "p")]),
            device=CPU,
            attributes={"p": 0.0},
        )
        assert seen == [0.0, False]
        assert model[0].p == 0.5

    def test_what_a_run_notes_and_hooks_hear_stays_in_the_copy(self) -> None:
        model, heard = nn.Sequential(nn.Conv2d(2, 2, 1)), []
        model.cache = {}  # type: ignore[assignment]
        model[0].register_forward_hook(lambda *given: heard.append(given))

        def run(copy: Any, make: Any) -> None:
            copy.cache["last"] = copy(make((1, 2, 8, 8)))

        peak_activations(model, run, device=CPU)
        assert not model.cache
        assert not heard

    def test_code_that_looks_at_values_raises(self) -> None:
        model = nn.Conv2d(2, 2, 1)
        with pytest.raises(RuntimeError, match="looks at values"):
            peak_activations(model, lambda copy, make: copy(make((1, 2, 8, 8))).sum().item(), device=CPU)
