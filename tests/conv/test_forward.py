"""A convolution in strips gives what the whole one gives, in every setting PyTorch has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conv_helpers import (
    KINDS,
    MODES,
    SPLITS,
    Calls,
    Counting,
    Kind,
    assert_same,
    attempt,
    convolutions_and_inputs,
    gradients,
    hook,
    square,
    tile,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from comfyui_patchconv import patched

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same")


# Every setting


@pytest.mark.parametrize("padding", ["number", "same", "valid"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(data=st.data(), splits=SPLITS, sequential=st.booleans())
def test_every_setting_gives_the_whole_result(
    kind: Kind, mode: str, padding: str, data: st.DataObject, splits: int, sequential: bool
) -> None:
    module, input = data.draw(convolutions_and_inputs(kind, mode, padding))
    expected = attempt(module, input)
    actual = attempt(tile(module, splits, sequential), input)
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        assert_same(actual, expected)
    else:
        assert actual == expected  # what PyTorch refuses is refused


@pytest.mark.parametrize("padding", ["number", "same", "valid"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(data=st.data(), splits=SPLITS, sequential=st.booleans())
def test_every_setting_gives_eagers_gradients(
    kind: Kind, mode: str, padding: str, data: st.DataObject, splits: int, sequential: bool
) -> None:
    module, input = data.draw(convolutions_and_inputs(kind, mode, padding))
    assume(isinstance(attempt(module, input), Tensor))
    expected = gradients(module, input)
    for ours, eager in zip(gradients(tile(module, splits, sequential), input), expected, strict=True):
        assert_same(ours, eager)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_within_1e_5_of_eager(kind: Kind, mode: str, sequential: bool) -> None:
    module, input = square(kind, 5, padding=2, padding_mode=mode)
    with torch.no_grad():
        expected = module(input)
        assert_same(tile(module, 4, sequential)(input), expected, 1e-5)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_no_farther_from_float64_than_eager(kind: Kind, dtype: torch.dtype, gradient: bool) -> None:
    torch.manual_seed(0)
    sides = KINDS.index(kind) + 1
    module = kind(8, 96, 3, padding=1, dtype=dtype)
    input = torch.randn(2, 8, *[(400,), (60, 40), (40, 12, 5)][sides - 1], dtype=dtype)
    if attempt(module, input) is RuntimeError:
        pytest.skip(f"this PyTorch has no {dtype} convolution on the CPU")
    exact = copy.deepcopy(module).double()
    run = gradients if gradient else lambda module, input: [module(input).detach()]
    allowed = 1.5 if gradient else 1.05  # a sum over strips is rounded once more than a whole one: by the root of 2
    references, eager = run(exact, input.double()), run(module, input)
    for ours, theirs, reference in zip(run(tile(module), input), eager, references, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert (ours - reference).norm() <= allowed * (theirs - reference).norm()


@pytest.mark.parametrize("last", ["input", "weight", "both", "neither"])
@pytest.mark.parametrize("channels", [(4, 6), (4, 1)])
@pytest.mark.parametrize(("size", "splits"), [((10, 11), 4), ((10, 1), 10)])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_memory_format_is_that_of_eager(
    kind: Kind, size: tuple[int, int], splits: int, channels: tuple[int, int], last: str
) -> None:
    module: Any = kind(*channels, 3, padding=1)
    channels_last = torch.channels_last if kind is nn.Conv2d else torch.channels_last_3d
    input = torch.randn(2, channels[0], *(() if kind is nn.Conv2d else (3,)), *size)
    if last in ("input", "both"):
        input = input.contiguous(memory_format=channels_last)
    if last in ("weight", "both"):
        module = module.to(memory_format=channels_last)
    with torch.no_grad():
        expected = module(input)
        for sequential in (True, False):
            actual = tile(module, splits, sequential)(input)
            assert actual.stride() == expected.stride()
            assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("last", ["input", "weight"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_memory_format_is_that_of_eager_whatever_is_padded_and_grouped(
    kind: Kind, mode: str, last: str, batch: int, autocast: bool
) -> None:
    """Single maps too, which torch batches itself; and rows that padding gathers at the border."""
    channels_last = torch.channels_last if kind is nn.Conv2d else torch.channels_last_3d
    for groups, dilation, outputs, padding in [
        (1, 1, 6, 1),
        (2, 1, 8, "same"),
        (4, 2, 4, 2),
        (1, 2, 1, 2),
        (1, 1, 6, 0),
    ]:
        size = (9, 5) if kind is nn.Conv2d else (3, 9, 5)
        module: Any = kind(4, outputs, 3, 1, padding, dilation, groups, padding_mode=mode)
        input = torch.randn(max(batch, 1), 4, *size)
        if last == "input":
            input = input.contiguous(memory_format=channels_last)
        else:
            module = module.to(memory_format=channels_last)
        input = input if batch else input[0]
        for grad in (False, True):
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, autocast):
                expected = attempt(module, input)
                for splits in (2, 9):
                    actual = attempt(tile(module, splits), input)
                    module.__dict__.pop("_conv_forward")
                    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
                        assert actual == expected
                        continue
                    assert actual.stride() == expected.stride(), (groups, dilation, outputs, padding, splits, grad)
                    assert_same(actual, expected, 2e-2 if autocast else 1e-5)


def test_an_input_that_is_itself_a_view_gives_the_same() -> None:
    module, _ = square(nn.Conv2d)
    input = torch.randn(2, 12, 4, 20).transpose(1, 2)[:, :, ::2, 3:]
    with torch.no_grad():
        expected = module(input)
        assert_same(tile(module)(input), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_stays_empty(kind: Kind) -> None:
    module, input = square(kind)
    expected = gradients(module, input[:0])
    for ours, eager in zip(gradients(tile(module), input[:0]), expected, strict=True):
        assert_same(ours, eager)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 10, 11, 1000])
def test_any_split_count_makes_at_most_so_many_strips(splits: int) -> None:
    module = Counting(4, 6, 3, padding=1)
    input = torch.randn(2, 4, 10, 11)
    expected = module(input)
    module.seen.clear()
    assert_same(tile(module, splits)(input), expected, 1e-5)
    assert 1 <= len(module.seen) <= min(splits, 10)
    assert splits == 1 or len(module.seen) > 1


def test_batched_is_one_call() -> None:
    module = Counting(4, 6, 3, padding=1)
    input = torch.randn(2, 4, 10, 11)
    expected = module(input)
    module.seen.clear()
    assert_same(tile(module, 5, sequential=False)(input), expected, 1e-5)
    assert module.seen == [(2 * 5, 4, 2 + 2, 11)]


# Modes of PyTorch


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_the_type_and_values_of_eager(kind: Kind, sequential: bool) -> None:
    module, input = square(kind)
    exact = module.double()(input.double()).detach()
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        eager = module(input)
        ours = tile(module, 4, sequential)(input)
    assert ours.dtype == eager.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.05 * (eager - exact).norm()


def test_autocast_takes_an_input_in_the_other_half_precision() -> None:
    """As between two parts of a model: only what joins tensors refuses it."""
    module, input = square(nn.Conv2d)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = module(input.half())
        for sequential in (True, False):
            assert_same(tile(module, 4, sequential)(input.half()), expected, 2e-2)


def test_autocast_gradients_are_those_of_eager() -> None:
    module, input = square(nn.Conv2d)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(module, input)
        actual = gradients(tile(module), input)
    for ours, eager in zip(actual, expected, strict=True):
        assert_same(ours, eager, 2e-2)


def test_backward_after_autocast_has_ended_still_runs_in_half_precision() -> None:
    module, input = square(nn.Conv2d)
    input.requires_grad_()
    tile(module)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(input).float().pow(2).sum()
    with Calls() as calls:
        loss.backward()
    assert {piece.dtype for piece in calls.inputs} == {torch.bfloat16}
    assert input.grad is not None
    assert input.grad.dtype == torch.float32


def test_a_second_derivative_after_autocast_has_ended_still_runs_in_half_precision() -> None:
    module, input = square(nn.Conv2d)
    input.requires_grad_()
    tile(module)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(input).float().pow(2).sum()
    with Calls() as calls:
        (slope,) = torch.autograd.grad(loss, input, create_graph=True)
    assert slope.requires_grad
    assert {piece.dtype for piece in calls.inputs} == {torch.bfloat16}


@pytest.mark.parametrize("sequential", [True, False])
def test_inference_mode_gives_an_inference_tensor(sequential: bool) -> None:
    module, input = square(nn.Conv2d)
    with torch.inference_mode():
        expected = module(input)
        actual = tile(module, 4, sequential)(input)
    assert actual.is_inference()
    assert_same(actual, expected, 1e-5)


def test_no_grad_gives_a_tensor_without_history() -> None:
    module, input = square(nn.Conv2d)
    with torch.no_grad():
        assert tile(module)(input.requires_grad_()).grad_fn is None
    assert module(input).grad_fn is not None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_those_of_finite_differences(kind: Kind, mode: str) -> None:
    torch.manual_seed(0)
    module = tile(kind(1, 2, 3, padding=1, padding_mode=mode, dtype=torch.float64))
    input = torch.randn(1, 1, *(5, 3, 3)[: KINDS.index(kind) + 1], dtype=torch.float64, requires_grad=True)
    weight, bias = module.weight.detach().requires_grad_(), module.bias

    def run(input: Tensor, weight: Tensor) -> Tensor:
        return hook(module)(input, weight, bias)

    assert torch.autograd.gradgradcheck(run, (input, weight), fast_mode=True)


@pytest.mark.parametrize("wanted", ["input", "weight", "bias"])
def test_a_gradient_of_one_tensor_alone_is_eagers(wanted: str) -> None:
    module, input = square(nn.Conv2d)
    module.requires_grad_(False)
    leaf = input.requires_grad_() if wanted == "input" else getattr(module, wanted).requires_grad_()
    (expected,) = torch.autograd.grad(module(input).square().sum(), leaf)
    (actual,) = torch.autograd.grad(tile(module)(input).square().sum(), leaf)
    assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_the_meta_device_gives_the_shape(grad: bool) -> None:
    module, input = square(nn.Conv2d)
    with torch.set_grad_enabled(grad):
        expected = module.to("meta")(input.to("meta"))
        assert tile(module)(input.to("meta")).shape == expected.shape


# Memory


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("last", [False, True])
def test_strips_are_views_and_the_output_is_made_once(mode: str, last: bool) -> None:
    module = tile(square(nn.Conv2d, 3, padding_mode=mode)[0], 8)
    input = torch.randn(1, 4, 64, 64)
    if last:
        input = input.contiguous(memory_format=torch.channels_last)
    start, end = input.data_ptr(), input.data_ptr() + input.nbytes
    with torch.no_grad(), Calls() as calls:
        output = module(input)
    assert len(calls.inputs) == 8
    if mode == "zeros":  # other modes pad the strip's columns, as the module does to the whole input
        assert all(start <= piece.data_ptr() < end for piece in calls.inputs[1:-1])
    strip = 6 * (8 + 2) * (64 + 2)
    assert [made for made in calls.made if made[1] > strip] == [("empty", output.numel())]


class Named(Tensor):
    """A tensor that carries something of its own from one operator's result to the next, as MONAI's `MetaTensor`."""

    name = ""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(found, Named) and args and isinstance(args[0], Named):
            found.name = args[0].name
        return found


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_subclass_stays_what_it_is(make: Any, last: bool, gradient: bool, sequential: bool) -> None:
    conv = make(3, 4, 3, padding=1).requires_grad_(gradient)
    sides = len(conv.kernel_size)
    input = torch.randn(2, 3, *(12,) * sides)
    if last and sides > 1:
        input = input.to(memory_format=torch.channels_last if sides == 2 else torch.channels_last_3d)
    input = input.as_subclass(Named).requires_grad_(gradient)
    setattr(input, "name", "scan")  # noqa: B010 - a Tensor has none
    expected = conv(input)
    with patched(conv, 3, threshold=0, sequential=sequential):
        result = conv(input)
    assert type(result) is type(expected) is Named
    assert result.name == expected.name == "scan"
    assert result.stride() == expected.stride()
    assert_same(result.as_subclass(Tensor), expected.as_subclass(Tensor))
    assert result.requires_grad == gradient
