"""What a call takes, counted before its input is there: the right number, wherever the weights lie."""

from __future__ import annotations

import random
from typing import Any, Optional

import numpy as np
import pytest
import torch
from model_zoo import draw_weights, hunyuan, image, kl
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.conv.patch import convert_model
from comfyui_patchconv.streaming import Make, Streamed, Tuning, expect, peak_activations

KIB = 2**10
CPU = torch.device("cpu")
SMALL = Tuning(strip_bytes=20_000, allocator_bytes=0, always=True)


class TestEager:
    """What is alive at once where nothing is streamed."""

    def test_what_is_alive_at_once(self) -> None:
        def run(copy: Any, make: Make) -> Tensor:
            a = make((KIB,), torch.uint8)
            b = torch.cat([a, a])  # 1 + 2
            del a
            return torch.cat([b, b])  # 2 + 4

        assert peak_activations(nn.Identity(), run, device=CPU) == 6 * KIB

    def test_views_and_in_place_operations_are_free(self) -> None:
        def run(copy: Any, make: Make) -> Tensor:
            x = make((4, KIB), torch.uint8)
            return x.view(2, -1).narrow(0, 0, 1).add_(1).t().unsqueeze(0).expand(5, -1, -1)

        assert peak_activations(nn.Identity(), run, device=CPU) == 4 * KIB

    def test_weights_are_free(self) -> None:
        model = nn.Linear(1024, 1024, bias=False)
        assert peak_activations(model, lambda copy, make: copy.weight.view(2, -1).t(), device=CPU) == 0

    def test_an_input_that_is_not_counted_is_free(self) -> None:
        model = nn.Conv2d(4, 8, 3, padding=1)
        peak = peak_activations(model, lambda copy, make: copy(make((1, 4, 16, 16), counted=False)), device=CPU)
        assert peak == 8 * 16 * 16 * 4

    @pytest.mark.parametrize("inference", [False, True])
    def test_peak_is_counted_in_inference_mode_and_leaves_it_as_it_was(self, inference: bool) -> None:
        layer = nn.Conv2d(4, 8, 3, padding=1)
        with torch.inference_mode(inference):
            peak = peak_activations(layer, lambda copy, make: copy(make((1, 4, 16, 16))), device=CPU)
            assert torch.is_inference_mode_enabled() is inference
        assert peak == (4 + 8) * 16 * 16 * 4


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.register_buffer("scale", torch.ones(1))
        self.steps = [self.conv]
        self.act = self.activate

    def activate(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.steps[0](self.act(x)) * self.scale


class TestCopies:
    """What is counted is a copy, and the model is left as it was."""

    def test_a_model_in_another_place_and_type(self) -> None:
        """Weights that lie elsewhere, or nowhere, do not matter, and do not count."""
        with torch.device("meta"):
            model = nn.Sequential(Block(16), Block(16))
        before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
        one = 16 * 64 * 64 * 2
        peak = peak_activations(model, lambda copy, make: copy(make((1, 16, 64, 64))), device=CPU, dtype=torch.float16)
        # x of the first block, x of the second, and two in the midst of it; the statistics of the norm beside them
        assert 4 * one <= peak <= 4.1 * one
        assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before

    def test_a_converted_model_counts_as_it_was(self) -> None:
        model, calls = Block(16), []
        run = lambda copy, make: copy(make((1, 16, 64, 64)))  # noqa: E731
        eager = peak_activations(model, run, device=CPU)
        convert_model(model, threshold=0, on_strip=lambda module, done, rows: calls.append(done))
        assert peak_activations(model, run, device=CPU) == eager
        assert not calls
        model(torch.randn(1, 16, 8, 8))
        assert calls

    def test_shared_modules_and_weights_stay_shared(self) -> None:
        layer = nn.Linear(4, 4)
        nested = nn.Sequential(layer)
        model, found = nn.ModuleList([layer, nested]), []
        nested.weight = layer.weight

        def run(copy: Any, make: Make) -> None:
            found.extend([copy[0] is copy[1][0], copy[0].weight is copy[1].weight, copy[0] is not layer])

        peak_activations(model, run, device=CPU)
        assert found == [True, True, True]

    def test_a_configuration_that_refuses_to_change(self) -> None:
        """As that of diffusers' models: the copy can read it."""

        class Frozen(dict[str, object]):
            def update(self, *args: object, **kwargs: object) -> None:
                raise TypeError("frozen")

        model, found = nn.Conv2d(2, 2, 1), []
        model.config = Frozen(widths=[1, 2])  # type: ignore[assignment]
        peak_activations(model, lambda copy, make: found.append(copy.config), device=CPU)
        assert type(found[0]) is Frozen
        assert found[0] == {"widths": [1, 2]}

    def test_what_a_run_notes_stays_in_the_copy(self) -> None:
        model: Any = nn.Identity()
        model.cache, model.frames = {}, []

        def run(copy: Any, make: Make) -> None:
            copy.cache["last"] = make((1,))
            copy.frames.append(make((1,)))

        peak_activations(model, run, device=CPU)
        assert model.cache == {}
        assert model.frames == []

    @pytest.mark.parametrize("look", [Tensor.item, int, bool])
    def test_code_that_looks_at_values_raises(self, look: Any) -> None:
        with pytest.raises(RuntimeError, match="looks at values"):
            peak_activations(nn.Identity(), lambda copy, make: look(make((1,)) + 1), device=CPU)


class TestParts:
    """What a whole decode takes, of which a part is streamed chunk by chunk."""

    @pytest.mark.parametrize(
        ("build", "shape"),
        [(lambda: kl(4), (4, 24, 24)), (hunyuan, (4, 2, 8, 8))],
        ids=["kl", "hunyuan"],
    )
    @pytest.mark.parametrize("budget", [None, 1])
    def test_calls_are_those_that_run(self, build: Any, shape: tuple[int, ...], budget: Optional[int]) -> None:
        model: Any = draw_weights(build())
        latent, forward, runs = image(*shape), model.decoder.forward, []
        expected = expect(
            model,
            lambda copy, make: copy.decode(make(latent.shape)),
            device=CPU,
            part="decoder.forward",
            budget=budget,
            tuning=SMALL,
        )
        assert "forward" not in model.decoder.__dict__
        runner = Streamed(budget, tuning=SMALL)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = runner.call(forward, args, kwargs)
            runs.append(runner.last)
            return result

        model.decoder.forward = watched
        with torch.no_grad():
            model.decode(latent)
        assert expected.calls == len(runs)
        assert expected.work == sum(run.work for run in runs)
        assert expected.offloaded == sum(run.offloaded for run in runs)
        assert expected.peak >= max(run.peak for run in runs)

    def test_a_method_that_is_streamed_as_a_whole(self) -> None:
        """What calls it holds the latent."""
        model: Any = kl(4)
        run = lambda copy, make: copy.decode(make((1, 4, 16, 16)))  # noqa: E731
        part = expect(model, run, device=CPU, part="decode", tuning=SMALL)
        whole = expect(model, run, device=CPU, tuning=SMALL)
        assert part.calls == whole.calls == 1
        assert part.work == whole.work
        assert part.peak == 4 * 16 * 16 * 4 + whole.peak


def test_large_results_of_a_part_count_once() -> None:
    """Each of four calls gives a map of 1 MiB, and all are held: four, and the two that a call works with."""

    class Chunks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.SiLU()

        def decode(self, x: Tensor) -> Tensor:
            return torch.cat([self.part(chunk) for chunk in x.split(1)])

    one, model = 4 * 512 * 512, Chunks()
    expected = expect(model, lambda copy, make: copy.decode(make((4, 1, 512, 512))), device=CPU, part="part.forward")
    assert expected.calls == 4
    assert expected.eager == 12 * one  # the input, its chunks, and these put together
    assert 8 * one <= expected.peak <= 12 * one + 2 * one


def test_a_large_input_counts_once() -> None:
    """Of 1 MiB and more a program's own tensors take no memory in an estimate; inputs are none of these."""
    model, shape = nn.Identity(), (1, 4, 512, 512)
    assert (
        peak_activations(model, lambda copy, make: copy(make(shape)), device=torch.device("cpu")) == 4 * 4 * 512 * 512
    )


class Fetches(nn.Module):
    """A convolution and a scale whose weights come to the input's device and type at each call, as hosts have them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv = way, nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(4))
        self.table: Tensor
        self.register_buffer("table", torch.arange(4.0))
        self.dropout = nn.Dropout(0.1, inplace=True)

    def fetched(self, weight: Tensor, x: Tensor) -> Tensor:
        if self.way == "to like":
            return weight.to(x)
        if self.way == "to device":
            return weight.to(x.device).to(device=x.device, dtype=x.dtype)
        if self.way == "to cpu":
            return weight.cpu().to(x.device, non_blocking=True)
        if self.way == "cast with a table":
            return weight.to(x.dtype) * (self.table.sum() / 6).to(weight)
        room = torch.empty_like(weight, device=x.device)
        room.copy_(weight)
        return room

    def forward(self, x: Tensor) -> Tensor:
        assert self.conv.bias is not None
        x = self.dropout(F.conv2d(x, self.fetched(self.conv.weight, x), self.fetched(self.conv.bias, x), padding=1))
        return x * self.fetched(self.scale, x).view(1, 4, 1, 1)


@pytest.mark.parametrize("way", ["to like", "to device", "to cpu", "copied into room", "cast with a table"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_come_to_the_input(way: str, dtype: torch.dtype) -> None:
    counted = peak_activations(
        Fetches(way).eval(), lambda copy, make: copy(make((1, 4, 256, 256))), device=CPU, dtype=dtype
    )
    assert counted in (2 * 4 * 256 * 256 * dtype.itemsize, 3 * 4 * 256 * 256 * dtype.itemsize)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_all_tensors_say_where_they_will_be(device: str) -> None:
    """A host asks a map for its device, to see what is free there."""
    if device != "cpu" and not torch.cuda.is_available():
        pytest.skip("indexing looks for CUDA, which is missing here")
    seen: list[torch.device] = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            tokens = y.flatten(2).transpose(1, 2)
            parts = [x[:, :2], x.reshape(1, 4, -1), y[0], tokens, torch.softmax(tokens @ tokens.transpose(1, 2), -1)]
            parts += [torch.zeros_like(x, device=self.conv.weight.device), x.unsqueeze(0).squeeze(0), x.chunk(2, 1)[1]]
            parts += [torch.zeros(1, 4, 512, 512, device=self.conv.weight.device)]
            seen.extend(part.device for part in parts)
            return y

    peak_activations(Asks(), lambda copy, make: copy(make((1, 4, 64, 64))), device=torch.device(device))
    assert {str(one) for one in seen} == {device}


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_dropout_in_place_that_drops_nothing_stores_nothing(rate: float) -> None:
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Dropout(rate, inplace=True), nn.Conv2d(8, 1, 3, padding=1)]
    model: Any = draw_weights(nn.Sequential(*layers))
    runner, x = Streamed(tuning=SMALL), image(4, 64, 48)
    with torch.no_grad():
        result = runner.call(model, (x,), {})
        assert torch.allclose(result, model(x), atol=1e-6)
    assert runner.last is not None
    assert runner.last.stored == result.nbytes
    assert runner.report == {}


def test_what_is_evaluated_whole_is_named_and_strips_are_told() -> None:
    """As a streamed call does: of an operator that no row is known of, and of one that is small."""

    def run(copy: Any, make: Make, side: int) -> Tensor:
        return torch.fft.rfft2(copy(make((1, 4, side, side)))).abs()

    model = nn.Conv2d(4, 8, 3, padding=1)
    report: dict[str, int] = {}
    whole = expect(model, lambda copy, make: run(copy, make, 512), device=CPU, report=report)
    assert [name for name in report if "fft" in name]
    assert whole.peak > 0
    layers = nn.Sequential(model, nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1))
    large, small = (
        expect(layers, lambda copy, make, side=side: copy(make((1, 4, side, side))), device=CPU) for side in (2048, 8)
    )
    assert large.in_strips
    assert not small.in_strips


def test_nothing_is_drawn() -> None:
    """An encoder that samples has, once it was counted, the noise that it has without."""

    class Sampling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn(x.shape) * random.random() * float(np.random.rand())
            return F.conv2d(x, torch.ones(4, 4, 3, 3), padding=1) + noise

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), *map(str, np.random.get_state())]

    before = states()
    expect(Sampling(), lambda copy, make: copy(make((1, 4, 64, 64))), device=torch.device("cpu"))
    assert states() == before
