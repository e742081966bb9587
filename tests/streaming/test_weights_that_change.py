"""Weights that change during the call: each step uses the values that eager's call of it saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from products import crossed
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Tuning, stream, streamed

from .comparing import FEW_ROWS, MODES, ONE_ROW, TUNINGS, Mode, assert_alike, assert_as_eager, copied

X = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(2))


def drawn(module: nn.Module, seed: int = 0) -> Any:
    """The module with seeded weights, for evaluation."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            values /= parameter[0].numel() ** 0.5
        else:
            values = 0.1 * values + (0.0 if name.endswith("bias") else 1.0)
        parameter.data.copy_(values)
    return module.eval().requires_grad_(False)


class Tokens(nn.Module):
    """A module that works on tokens, on a map."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class InFrames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.unsqueeze(2)).squeeze(2)


class InLines(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(2)).unflatten(2, x.shape[2:])


class Scaled(nn.Module):
    """A gate and an offset that are parameters of a model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.zeros(1, 4, 9, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bias


class EmbeddedStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.tensor([1, 3]))[..., None, None]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv2d": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "conv2d of one pixel": lambda: nn.Conv2d(4, 4, 1),
    "depthwise conv2d": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
    "upsampled conv2d": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, 2, 1)),
    "conv1d": InLines,
    "conv3d": InFrames,
    "group norm": lambda: nn.GroupNorm(2, 4),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer norm": lambda: Tokens(nn.LayerNorm(4)),
    "linear": lambda: Tokens(nn.Linear(4, 4)),
    "attention": lambda: Tokens(SelfAttention()),
    "prelu": lambda: nn.PReLU(4),
    "gate": Scaled,
    "embedding": EmbeddedStep,
}


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *[b for b in module.buffers() if b.is_floating_point()]]


# How a layer's weights change after it was called; and what puts back what it changed.


def zeroed_in_place(layer: nn.Module) -> None:
    for tensor in tensors_of(layer):
        tensor.zero_()


def added_to(layer: nn.Module) -> None:
    for tensor in tensors_of(layer):
        tensor.data += 0.5


def a_part_written(layer: nn.Module) -> None:
    for tensor in tensors_of(layer):
        tensor[:1].fill_(3)
        tensor.view(-1)[-1] = 7


def copied_over(layer: nn.Module) -> None:
    for tensor in tensors_of(layer):
        tensor.copy_(torch.ones_like(tensor))


def data_swapped(layer: nn.Module) -> None:
    for tensor in tensors_of(layer):
        tensor.data = torch.full_like(tensor, 2.0)


def data_swapped_for_nothing(layer: nn.Module) -> None:
    for tensor in tensors_of(layer):
        tensor.data = torch.empty(0)


def data_cast(layer: nn.Module) -> None:
    layer.to(torch.bfloat16)


def state_loaded(layer: nn.Module) -> None:
    layer.load_state_dict({name: torch.ones_like(value) for name, value in layer.state_dict().items()})


def state_assigned(layer: nn.Module) -> None:
    state = {name: torch.ones_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def replaced_and_their_memory_used_again(layer: nn.Module) -> None:
    """The parameters die, and others come to lie where they lay."""
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = parameter.shape
            del parameter
            setattr(module, name, None)
            setattr(module, name, nn.Parameter(torch.full(shape, 5.0), requires_grad=False))


def moved_to_nowhere(layer: nn.Module) -> None:
    layer.to("meta")


def through_a_view_taken_before(layer: nn.Module) -> None:
    views = [tensor.view(-1) for tensor in tensors_of(layer)]
    for view in views:
        view.mul_(3)


def several_at_once(layer: nn.Module) -> None:
    torch._foreach_add_(tensors_of(layer), 1.0)  # type: ignore[reportPrivateImportUsage]


def given_as_out(layer: nn.Module) -> None:
    for tensor in tensors_of(layer):
        torch.mul(tensor, 2, out=tensor)


def swapped_with_another(layer: nn.Module) -> None:
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module._parameters[name] = nn.Parameter(parameter * 2 + 1, requires_grad=False)


CHANGES: list[Callable[[nn.Module], None]] = [
    zeroed_in_place, added_to, a_part_written, copied_over, data_swapped, data_swapped_for_nothing, data_cast,
    state_loaded, state_assigned, replaced_and_their_memory_used_again, moved_to_nowhere,
    through_a_view_taken_before, several_at_once, given_as_out, swapped_with_another,
]  # fmt: skip


class ChangedAfterUse(nn.Module):
    """A layer between two convolutions, whose weights change when it was called; all are used once or twice."""

    def __init__(self, layer: Callable[[], nn.Module], change: Callable[[nn.Module], None], twice: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.layer, self.change, self.twice = layer(), change, twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.first(x))
        self.change(self.layer)
        self.change(self.first)
        if self.twice:
            y = self.layer(y) + self.first(x)
        return self.last(F.silu(y))


UNUSABLE = {data_swapped_for_nothing, data_cast, moved_to_nowhere}


@crossed(2, layer=list(LAYERS), change=CHANGES, tuning={"one row": ONE_ROW, "few rows": FEW_ROWS})
def test_a_layer_uses_the_weights_that_its_call_saw(
    layer: str, change: Callable[[nn.Module], None], tuning: Tuning
) -> None:
    twice = change not in UNUSABLE

    def fresh() -> ChangedAfterUse:
        return drawn(ChangedAfterUse(LAYERS[layer], change, twice))

    eager, ours, block = fresh(), fresh(), fresh()
    with torch.no_grad():
        expected = eager(X)
        strides = layer != "attention"  # its fast path, for ordinary tensors alone, lays its result out otherwise
        assert_alike(streamed(ours, tuning=tuning)(X), expected, strides=strides)
        with stream(block, tuning=tuning):
            assert_alike(block(X), expected, strides=strides)
        if twice:
            assert_alike(dict(ours.named_parameters()), dict(eager.named_parameters()))


# Weights that are there for the length of a call only


class MergedForTheCall(nn.Conv2d):
    """A LoRA that is added to the weight and taken off again."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data += 0.05
        try:
            return super().forward(input)
        finally:
            self.weight.data -= 0.05


class MergedInPlace(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        self.weight.add_(0.05)
        y = super().forward(input)
        self.weight.sub_(0.05)
        return y


class MergedBySwap(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        before = self.weight.data
        self.weight.data = before + 0.05
        y = super().forward(input)
        self.weight.data = before
        return y


class CastForTheCall(nn.Conv2d):
    """As hosts cast by hand: a copy of the weights in the input's type, gone when the call is over."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(torch.bfloat16).to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype, copy=True)
        return self._conv_forward(input, weight, bias)


class TemporaryParameter(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = nn.Parameter(self.weight * 2, requires_grad=False)
        y = F.conv2d(input, weight, self.bias, padding=self.padding)  # type: ignore[reportArgumentType]
        weight.data.zero_()
        return y


class Quantised(nn.Conv2d):
    """Eight bits and a scale; made floating point in one room for all layers."""

    room = torch.zeros(4 * 4 * 9)

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight.abs().amax() / 127
        stored = (self.weight / scale).round().to(torch.int8)
        weight = self.room[: stored.numel()].view(stored.shape)
        weight.copy_(stored).mul_(scale)
        return F.conv2d(input, weight, self.bias, padding=self.padding)  # type: ignore[reportArgumentType]


class StoredInHalf(nn.Conv2d):
    """Layerwise casting: stored in few bits, cast for the call and cast back."""

    def forward(self, input: Tensor) -> Tensor:
        self.to(input.dtype)
        y = super().forward(input)
        self.to(torch.bfloat16)
        return y


class Offloaded(nn.Conv2d):
    """Group offloading: the data of the parameters is brought for the call and taken away after it."""

    def forward(self, input: Tensor) -> Tensor:
        stored: dict[str, Tensor] = self.__dict__.setdefault("stored", {})
        for name, parameter in self.named_parameters():
            stored.setdefault(name, parameter.data.clone())
            parameter.data = stored[name].clone()
        y = super().forward(input)
        for parameter in self.parameters():
            parameter.data.fill_(float("nan"))
            parameter.data = torch.empty(0)
        return y


class OffloadedToStorage(nn.Conv2d):
    """One storage for all layers, brought to and taken from as the next layer needs it."""

    pinned = torch.zeros(300)

    def forward(self, input: Tensor) -> Tensor:
        stored: dict[str, Tensor] = self.__dict__.setdefault("stored", {})
        offset = 0
        for name, parameter in self.named_parameters():
            source = stored.setdefault(name, parameter.data.clone())
            place = self.pinned[offset : offset + source.numel()].view(source.shape)
            place.copy_(source)
            parameter.data = place
            offset += source.numel()
        y = super().forward(input)
        for name, parameter in self.named_parameters():
            parameter.data = stored[name]
        return y


class OnMeta(nn.Conv2d):
    """As accelerate offloads: on the meta device but for the call."""

    def forward(self, input: Tensor) -> Tensor:
        stored: dict[str, Tensor] = self.__dict__.setdefault("stored", {})
        for name, parameter in list(self.named_parameters()):
            stored.setdefault(name, parameter.data)
            setattr(self, name, nn.Parameter(stored[name].clone(), requires_grad=False))
        y = super().forward(input)
        for name, parameter in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        return y


class Functional(nn.Conv2d):
    """Called with other weights than its own, by torch.func."""

    def forward(self, input: Tensor) -> Tensor:
        if self.__dict__.get("inside"):
            return super().forward(input)
        self.__dict__["inside"] = True
        try:
            weights = {name: value * 1.5 for name, value in self.named_parameters()}
            return torch.func.functional_call(self, weights, (input,))
        finally:
            self.__dict__["inside"] = False


class NormalisedWeight(nn.Conv2d):
    """Weight demodulation, as StyleGAN does: the weights depend on what comes in."""

    def forward(self, input: Tensor) -> Tensor:
        style = input.mean((0, 2, 3))
        weight = self.weight * style[None, :, None, None]
        weight = weight * torch.rsqrt(weight.square().sum((1, 2, 3), keepdim=True) + 1e-3)
        return F.conv2d(input, weight, self.bias, padding=self.padding)  # type: ignore[reportArgumentType]


Layer = Callable[..., nn.Conv2d]
FOR_THE_CALL: list[Layer] = [
    MergedForTheCall, MergedInPlace, MergedBySwap, CastForTheCall, TemporaryParameter, Quantised, StoredInHalf,
    Offloaded, OffloadedToStorage, OnMeta, Functional, NormalisedWeight,
]  # fmt: skip


def network(kind: Layer) -> Any:
    """Three of them, so that each sees what the next leaves."""
    return drawn(
        nn.Sequential(kind(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), kind(4, 4, 1), kind(4, 4, 3, padding=1))
    )


@crossed(2, kind=FOR_THE_CALL, tuning=TUNINGS, budget=[None, 1])
def test_weights_that_are_there_for_a_layers_call_only(kind: Layer, tuning: Tuning, budget: Optional[int]) -> None:
    eager, ours = network(kind), network(kind)
    with torch.no_grad():
        expected = [eager(X), eager(X * 2)]
        with stream(ours, tuning=tuning, budget=budget):
            assert_alike([ours(X), ours(X * 2)], expected)
        if kind is not OnMeta:
            assert_alike(dict(ours.named_parameters()), dict(eager.named_parameters()))
        assert_alike(ours(X), eager(X))


def test_the_weights_of_a_second_call_are_not_those_of_the_first() -> None:
    net = drawn(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3)))
    with torch.no_grad(), stream(net, tuning=FEW_ROWS):
        for step in range(3):
            with_same = copied(tuple(net.parameters()))
            found = net(X)
            y = F.group_norm(F.conv2d(X, *with_same[:2], padding=1), 2, *with_same[2:4])
            assert_alike(found, F.conv2d(y, *with_same[4:]))
            net[step % 3].weight.data = net[step % 3].weight * 2
            net[2].bias.add_(1)


def test_weights_change_between_two_streamed_calls_by_every_way() -> None:
    for change in CHANGES:
        if change in UNUSABLE:
            continue
        eager, ours = network(nn.Conv2d), network(nn.Conv2d)
        run = streamed(ours, tuning=FEW_ROWS)
        with torch.no_grad():
            run(X)
            change(eager)
            change(ours)
            assert_alike(run(X), eager(X))


# One conv, used twice with other weights in between


def test_one_layer_with_other_weights_each_time_it_is_called() -> None:
    def fresh() -> tuple[Any, Callable[[Tensor], Tensor]]:
        layer = drawn(nn.Conv2d(4, 4, 3, padding=1))

        def run(x: Tensor) -> Tensor:
            for _ in range(4):
                x = F.group_norm(layer(x), 2)
                layer.weight.data = layer.weight * 0.5 + 0.1
                layer.bias.add_(0.1)
            return x

        return layer, run

    (one, eager), (other, ours) = fresh(), fresh()
    with torch.no_grad():
        assert_alike(streamed(ours, tuning=ONE_ROW)(X), eager(X))
    assert_alike(dict(other.named_parameters()), dict(one.named_parameters()))


def test_a_staging_buffer_holds_one_layers_weights_after_anothers() -> None:
    stored = [torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(step)) / 6 for step in range(4)]
    staging = torch.empty(4 * 4 * 9)

    def run(x: Tensor) -> Tensor:
        for weight in stored:
            staging.copy_(weight.flatten())
            x = F.silu(F.conv2d(x, staging.view(4, 4, 3, 3), padding=1))
        staging.fill_(float("nan"))
        return x

    for tuning in TUNINGS.values():
        assert_as_eager(run, X, tuning=tuning)


def test_two_staging_buffers_in_turn_with_views_kept_by_parameters() -> None:
    stored = [torch.randn(148, generator=torch.Generator().manual_seed(step)) / 6 for step in range(5)]
    rooms = [torch.empty(148), torch.empty(148)]
    layers = [drawn(nn.Conv2d(4, 4, 3, padding=1)) for _ in stored]

    def run(x: Tensor) -> Tensor:
        for step, (values, layer) in enumerate(zip(stored, layers)):
            room = rooms[step % 2]
            room.copy_(values)
            layer.weight.data, layer.bias.data = room[:144].view(4, 4, 3, 3), room[144:]
            x = F.group_norm(layer(x), 2)
        return x

    assert_as_eager(run, X, tuning=ONE_ROW)


def test_temporary_tensors_whose_memory_is_used_again() -> None:
    """Many short-lived operands of one size: none is taken for another that lay there before."""

    def run(x: Tensor) -> Tensor:
        for step in range(30):
            x = F.conv2d(x, torch.full((4, 4, 1, 1), 0.2 + step / 100)) + torch.full((4, 1, 1), step / 50)
        return x

    assert_as_eager(run, X, tuning=ONE_ROW, calls=2)


def test_biases_and_statistics_that_change_after_use() -> None:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        mean, variance, weight, bias = torch.zeros(4), torch.ones(4), torch.ones(4), torch.zeros(4)
        kernel = torch.full((4, 4, 3, 3), 0.1)
        one = F.batch_norm(F.conv2d(x, kernel, bias, padding=1), mean, variance, weight, bias)
        other = F.group_norm(one, 2, weight, bias)
        for tensor in (mean, variance, weight, bias, kernel):
            tensor.add_(1)
        return one, other, F.batch_norm(F.conv2d(other, kernel, bias), mean, variance, weight, bias)

    assert_as_eager(run, X)


def trains_after_use(train: Callable[[Tensor, Tensor, Tensor], Any]) -> Function:
    """A norm whose statistics deferred steps read, and `train` changes then."""

    def run(x: Tensor) -> Any:
        mean, variance = torch.zeros(4), torch.ones(4)
        kernel = torch.full((4, 4, 3, 3), 0.1)
        y = F.batch_norm(F.conv2d(x, kernel, padding=1), mean, variance)
        train(torch.full((3, 4, 5, 5), 5.0).mul_(torch.arange(5.0)), mean, variance)
        return y, F.batch_norm(y, mean, variance), mean, variance

    return run


Function = Callable[[Tensor], Any]
TRAINED: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "batch norm": lambda z, mean, variance: F.batch_norm(z, mean, variance, training=True),
    "instance norm": lambda z, mean, variance: F.instance_norm(z, mean, variance),
    "native batch norm": lambda z, mean, variance: torch.native_batch_norm(z, None, None, mean, variance, True, 0.1, 0),
    "by its parts": lambda z, mean, variance: torch.ops.aten._batch_norm_impl_index(
        z, None, None, mean, variance, True, 0.1, 1e-5, False
    ),
    "into results": lambda z, mean, variance: torch.native_batch_norm(
        z, None, None, mean, variance, True, 0.1, 0, out=(torch.empty_like(z), torch.empty(4), torch.empty(4))
    ),
    "statistics alone": lambda z, mean, variance: torch.batch_norm_update_stats(z, mean, variance, 0.1),
    "in the part": lambda z, mean, variance: F.batch_norm(z[:, :2], mean[:2], variance[1:3], training=True),
}


@crossed(2, name=list(TRAINED), tuning=TUNINGS, mode=MODES)
def test_statistics_that_an_ordinary_tensor_changes_after_use(name: str, tuning: Tuning, mode: Mode) -> None:
    assert_as_eager(trains_after_use(TRAINED[name]), X, tuning=tuning, mode=mode)


@crossed(2, name=list(TRAINED), tuning=TUNINGS, mode=MODES)
def test_statistics_that_a_map_changes_after_use(name: str, tuning: Tuning, mode: Mode) -> None:
    def run(x: Tensor) -> Any:
        kernel = torch.full((4, 4, 1, 1), 0.1)
        changed = trains_after_use(lambda z, *statistics: TRAINED[name](F.conv2d(x[:1], kernel), *statistics))
        return changed(x)

    assert_as_eager(run, X, tuning=tuning, mode=mode)


@crossed(2, name=list(TRAINED), tuning=TUNINGS, mode=MODES)
def test_statistics_of_maps_that_training_changes(name: str, tuning: Tuning, mode: Mode) -> None:
    def run(x: Tensor) -> Any:
        y = F.conv2d(x, torch.full((4, 4, 1, 1), 0.1)) * torch.arange(1.0, 5.0)[:, None, None]
        mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3))
        before = mean * 2 + variance
        TRAINED[name](y, mean, variance)
        return mean, variance, before, mean * 1

    assert_as_eager(run, X, tuning=tuning, mode=mode)


def test_a_norm_that_trains_on_an_ordinary_tensor_between() -> None:
    """A module that is in evaluation for the map, and in training for something else."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.norm.eval()
            y = self.norm(self.c(x))
            self.norm.train()
            self.norm(torch.full((4, 4, 8, 8), 5.0))
            return y

    block = drawn(Block())
    assert_as_eager(lambda x: copied(block)(x), X)


def test_a_bias_given_by_name_and_weights_in_half_that_is_cast() -> None:
    stored = torch.randn(4, 4, 3, 3).to(torch.float16)

    def run(x: Tensor) -> Tensor:
        weight = stored.to(x.dtype)
        y = F.conv2d(input=x, weight=weight, bias=torch.arange(4.0), padding=1)
        weight.zero_()
        return F.conv2d(y, weight=stored.float() / 6)

    assert_as_eager(run, X)


# Weights that are made of maps


CUBE = torch.randn(8, 8, 8, 8, generator=torch.Generator().manual_seed(3))
SQUARE = torch.randn(8, 8, generator=torch.Generator().manual_seed(4))


def one_by_one(y: Tensor, times: float = 1.0) -> Tensor:
    """Values of each channel, deferred, as many as the map has rows along any of its dimensions."""
    return y.mean((0, 2, 3)) * times


WITH_WEIGHTS_OF_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch norm": lambda y: F.batch_norm(y, one_by_one(y), y.var((0, 2, 3)), one_by_one(y), one_by_one(y, 2.0)),
    "batch norm of sound": lambda y: F.batch_norm(y.flatten(2)[..., :8], one_by_one(y), y.var((0, 2, 3))),
    "batch norm of a stored map": lambda y: F.batch_norm(y, one_by_one(y), y.var((0, 2, 3))) + y.sum().item(),
    "batch norm of volumes": lambda y: F.batch_norm(y[:, :, None], one_by_one(y), y.var((0, 2, 3)), one_by_one(y)),
    "batch norm by rows of a matrix": lambda y: F.batch_norm(y, (y[0, 0] @ SQUARE)[:, 0], y[0, 1].abs()[:, 1] + 1),
    "native batch norm": lambda y: torch.native_batch_norm(
        y, one_by_one(y), None, one_by_one(y), y.var((0, 2, 3)), False, 0.1, 1e-5
    )[0],
    "group norm": lambda y: F.group_norm(y, 2, one_by_one(y), one_by_one(y, 2.0)),
    "instance norm": lambda y: F.instance_norm(y, None, None, one_by_one(y), one_by_one(y, 2.0)),
    "instance norm by statistics": lambda y: F.instance_norm(y, one_by_one(y), y.var((0, 2, 3)), use_input_stats=False),
    "layer norm": lambda y: F.layer_norm(y, (8,), one_by_one(y), one_by_one(y, 2.0)),
    "layer norm of rows": lambda y: F.layer_norm(y, (8, 8), y[0, 0] + 1, y[0, 1]),
    "prelu": lambda y: F.prelu(y, one_by_one(y)),
    "linear": lambda y: F.linear(y, y[0, 0], one_by_one(y)),
    "linear by its own input": lambda y: F.linear(y[0, 0], y[0, 0]),
    "linear's bias": lambda y: F.linear(y, SQUARE, one_by_one(y)),
    "convolution": lambda y: F.conv2d(y, y[:, :, :3, :3] / 9, one_by_one(y), padding=1),
    "convolution's bias": lambda y: F.conv2d(y, SQUARE[:, :, None, None], one_by_one(y)),
    "transposed convolution": lambda y: F.conv_transpose2d(y, y[:, :, :3, :3] / 9, one_by_one(y), padding=1),
    "addmm": lambda y: torch.addmm(one_by_one(y), y[0, 0], y[0, 1]),
    "baddbmm": lambda y: torch.baddbmm(one_by_one(y), y[0], y[1]),
    "fake quantisation": lambda y: torch.fake_quantize_per_channel_affine(
        y, one_by_one(y).abs() / 9 + 0.01, torch.zeros(8, dtype=torch.int32), 2, -8, 7
    ),
    "places": lambda y: y.index_select(3, y[0, 0, 0].argsort()) + y.gather(2, y.argsort(2)),
    "embedding": lambda y: F.embedding(y[0, 0].abs().long().clamp(0, 7), y[0, 1]),
}


@crossed(2, name=list(WITH_WEIGHTS_OF_MAPS), tuning=TUNINGS, written=(False, True))
def test_weights_that_are_made_of_maps_are_read_whole(name: str, tuning: Tuning, written: bool) -> None:
    """Also where they have as many values as the map has rows. written: the map was in between, and is read by rows
    that its last operator fixed."""
    kernel = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(5)) / 9

    def run(x: Tensor) -> Tensor:
        y = F.silu(F.conv2d(x, kernel, padding=1))
        if written:
            y[:, :, 3:5].mul_(2)
        return WITH_WEIGHTS_OF_MAPS[name](y)

    assert_as_eager(run, CUBE, tuning=tuning)


# Parametrised weights


def weight_norm_by_hooks(layer: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(layer)


def weight_norm_parametrised(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


def spectral_norm_parametrised(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(layer)


def orthogonal_parametrised(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.orthogonal(layer)


def pruned(layer: nn.Module) -> nn.Module:
    from torch.nn.utils import prune

    return prune.random_unstructured(layer, "weight", amount=0.3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "norm",
    [weight_norm_by_hooks, weight_norm_parametrised, spectral_norm_parametrised, orthogonal_parametrised, pruned],
    ids=lambda norm: norm.__name__,
)
def test_weights_that_are_computed_at_each_call(norm: Callable[[nn.Module], nn.Module]) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        layers = [norm(nn.Conv2d(4, 4, 3, padding=1)), nn.SiLU(), norm(nn.Conv2d(4, 4, 3, padding=1))]
        return nn.Sequential(*layers).eval().requires_grad_(False)

    eager, ours = fresh(), fresh()
    with torch.no_grad():
        expected = eager(X)
        with stream(ours, tuning=ONE_ROW):
            assert_alike(ours(X), expected)
        assert_alike(ours.state_dict(), eager.state_dict())


def test_parametrised_weights_that_are_cached() -> None:
    from torch.nn.utils import parametrize

    layer = drawn(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)))

    def run(x: Tensor) -> Tensor:
        with parametrize.cached():
            return layer(F.silu(layer(x)))

    assert_as_eager(run, X)


# Hosts and libraries


@contextmanager
def a_hook(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    yield
    for handle in handles:
        handle.remove()


def test_hooks_that_bring_and_take_weights_from_disk(tmp_path: Path) -> None:
    def fresh(folder: Path) -> Any:
        net = network(nn.Conv2d)
        folder.mkdir()
        for index, layer in enumerate(net):
            torch.save(layer.state_dict(), folder / f"{index}.pt")

            def bring(module: nn.Module, args: Any, index: int = index) -> None:
                for name, value in torch.load(folder / f"{index}.pt", weights_only=True).items():
                    getattr(module, name).data = value

            def take(module: nn.Module, args: Any, out: Any) -> None:
                for parameter in module.parameters():
                    parameter.data = torch.empty(0)

            layer.register_forward_pre_hook(bring)
            layer.register_forward_hook(take)
        return net

    eager, ours = fresh(tmp_path / "one"), fresh(tmp_path / "other")
    with torch.no_grad():
        expected = eager(X)
        for tuning in TUNINGS.values():
            with stream(ours, tuning=tuning):
                assert_alike(ours(X), expected)


def test_accelerate_brings_weights_for_each_layer() -> None:
    accelerate: Any = pytest.importorskip("accelerate")
    eager, ours = network(nn.Conv2d), network(nn.Conv2d)
    accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
    with torch.no_grad():
        expected = eager(X)
        with stream(ours, tuning=FEW_ROWS):
            assert_alike(ours(X), expected)
        assert_alike(ours(X), expected)


def test_accelerate_brings_weights_from_disk(tmp_path: Path) -> None:
    accelerate: Any = pytest.importorskip("accelerate")
    eager, ours = network(nn.Conv2d), network(nn.Conv2d)
    accelerate.disk_offload(ours, str(tmp_path), execution_device=torch.device("cpu"))
    with torch.no_grad(), stream(ours, tuning=ONE_ROW):
        assert_alike(ours(X), eager(X))


def a_vae() -> Any:
    from model_zoo import draw_weights, kl

    return draw_weights(kl(4))


LATENT = torch.randn(1, 4, 19, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("storage", ["float8_e4m3fn", "bfloat16"])
def test_layerwise_casting_of_a_vae(storage: str) -> None:
    pytest.importorskip("diffusers")
    eager, ours = a_vae(), a_vae()
    if not hasattr(eager, "enable_layerwise_casting"):
        pytest.skip("diffusers has it from 0.33 on, which wants torch 2.6")
    for vae in (eager, ours):
        vae.enable_layerwise_casting(storage_dtype=getattr(torch, storage), compute_dtype=torch.float32)
    with torch.no_grad():
        expected = eager.decode(LATENT).sample
        for target in (ours.decoder, ours):
            with stream(target, tuning=Tuning(strip_bytes=4_000, always=True)):
                assert_alike(ours.decode(LATENT).sample, expected)
        assert_alike(ours.decode(LATENT).sample, expected)


@pytest.mark.parametrize(
    "options",
    [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}],
    ids=["leaf", "block"],
)
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_group_offloading_of_a_vae(options: dict[str, Any], disk: bool, tmp_path: Path) -> None:
    hooks: Any = pytest.importorskip("diffusers.hooks")
    if not hasattr(hooks, "apply_group_offloading"):
        pytest.skip("This diffusers has no group offloading.")
    eager, ours = a_vae(), a_vae()
    where = {"offload_to_disk_path": str(tmp_path)} if disk else {}
    cpu = torch.device("cpu")
    hooks.apply_group_offloading(ours, onload_device=cpu, offload_device=cpu, **options, **where)
    with torch.no_grad():
        expected = eager.decode(LATENT).sample
        assert_alike(ours.decode(LATENT).sample, expected)
        with stream(ours.decoder, tuning=Tuning(strip_bytes=4_000, always=True)):
            assert_alike(ours.decode(LATENT).sample, expected)


RESIZED = """
import torch
from torch import nn
from comfyui_patchconv.streaming import Tuning, stream

class Sharded(nn.Conv2d):  # as FSDP does: the storage is there for the length of the call
    def forward(self, x):
        if "stored" not in self.__dict__:
            self.__dict__["stored"] = self.weight.detach().clone()
        stored, storage = self.__dict__["stored"], self.weight.untyped_storage()
        storage.resize_(stored.untyped_storage().nbytes())
        self.weight.copy_(stored)
        y = super().forward(x)
        storage.resize_(0)
        return y

torch.manual_seed(0)
net = nn.Sequential(Sharded(4, 4, 3, padding=1), nn.GroupNorm(2, 4), Sharded(4, 4, 3)).requires_grad_(False)
x = torch.randn(2, 4, 9, 7)
with torch.no_grad():
    expected = net(x)
    with stream(net, tuning=Tuning(strip_bytes=1, always=True)):
        print(float((net(x) - expected).abs().max()) < 1e-5)
"""


@pytest.mark.slow
def test_weights_whose_storage_is_resized_to_nothing() -> None:
    """In a process of its own: where this is wrong, memory is read that is not there."""
    from conv_helpers import run_python

    assert "was given back before the call was over: stream a part" in run_python(RESIZED, fails=True)


def test_loras_of_peft_like_wrappers_that_are_switched_during_the_call() -> None:
    class WithAdapters(nn.Module):
        """A layer, and two small ones beside it, one of which is active."""

        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Conv2d(4, 4, 3, padding=1)
            self.down = nn.ModuleList(nn.Conv2d(4, 2, 3, padding=1, bias=False) for _ in range(2))
            self.up = nn.ModuleList(nn.Conv2d(2, 4, 1, bias=False) for _ in range(2))
            self.active, self.scale = 0, torch.tensor(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.base(x) + self.up[self.active](self.down[self.active](x)) * self.scale
            self.active = 1 - self.active
            self.scale.mul_(2)
            return y

    def fresh() -> Any:
        return drawn(nn.Sequential(WithAdapters(), nn.SiLU(), WithAdapters()))

    eager, ours = fresh(), fresh()
    with torch.no_grad(), stream(ours, tuning=ONE_ROW):
        for _ in range(3):
            assert_alike(ours(X), eager(X))
    assert [layer.active for layer in (ours[0], ours[2])] == [layer.active for layer in (eager[0], eager[2])]
    assert_alike(ours[0].scale, eager[0].scale)


def test_inputs_that_the_caller_reuses() -> None:
    """A buffer that is filled anew for each call: no earlier result changes with it."""
    room = torch.empty_like(X)
    layer = drawn(nn.Conv2d(4, 4, 3, padding=1))
    run = streamed(lambda x: F.group_norm(layer(x), 2), tuning=ONE_ROW)
    results: list[Tensor] = []
    with torch.no_grad():
        for step in range(3):
            room.copy_(X * step)
            results.append(run(room))
        room.zero_()
        assert_alike(results, [F.group_norm(layer(X * step), 2) for step in range(3)])
