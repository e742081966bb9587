"""A convolution in strips among others: threads, exceptions, a host's own methods, other extensions."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, Optional

import pytest
import torch
from conv_helpers import (
    MODES,
    SPLITS,
    Counting,
    HostConv3d,
    assert_same,
    attempt,
    gradients,
    hook,
    make_seamless,
    seamless_forward,
    square,
    tile,
    unchanged,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from comfyui_patchconv import TiledForward, convert_model, patched, restore_model

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same")


# Threads and exceptions


def test_threads_share_a_module() -> None:
    module, _ = square(nn.Conv2d)
    inputs = [torch.randn(2, 4, 10 + i, 11) for i in range(3)]
    with torch.no_grad():
        expected = [module(input) for input in inputs]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(150):
                    assert_same(module(inputs[index]), expected[index], 1e-5)
        except BaseException as error:
            failures.append(error)

    tile(module)
    with unchanged(module):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_no_attribute_changes_during_a_call(mode: str, sequential: bool) -> None:
    module = Counting(4, 6, 3, padding=1, padding_mode=mode)
    checks: list[Tensor] = []
    module.before_call = lambda piece: (check(), checks.append(piece))[1]
    tile(module, 4, sequential)
    with unchanged(module) as check:
        module(torch.randn(2, 4, 10, 11))
    assert len(checks) == (4 if sequential else 1)


@pytest.mark.parametrize("sequential", [True, False])
def test_an_exception_leaves_the_module_as_it_was(sequential: bool) -> None:
    module = Counting(4, 6, 3, padding=1)
    input = torch.randn(2, 4, 10, 11)
    expected = module(input)
    tile(module, 4, sequential)

    def fail_at_the_bottom(piece: Tensor) -> None:
        if len(module.seen) > 2 or not sequential:
            raise KeyboardInterrupt

    module.seen.clear()
    module.before_call = fail_at_the_bottom
    with unchanged(module), pytest.raises(KeyboardInterrupt):
        module(input)
    module.before_call = None
    assert_same(module(input), expected, 1e-5)
    restore_model(module)
    assert torch.equal(module(input), expected)


# Hosts and other extensions


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("splits", [1, 3, 4, 100])
def test_a_hosts_own_method_is_called_strip_by_strip_with_its_arguments(frames: int, splits: int) -> None:
    torch.manual_seed(0)
    module = HostConv3d(4, 6, 3, padding=(0, 1, 1))
    input = torch.randn(1, 4, frames, 10, 11)
    expected = module(input, autopad="causal_zero") if frames < 3 else module(input)
    module.seen.clear()
    tile(module, splits)
    with torch.no_grad():
        actual = module(input, autopad="causal_zero") if frames < 3 else module(input)
    assert_same(actual, expected, 1e-5)
    assert len(module.seen) == {1: 1, 3: 3, 4: 4, 100: 10}[splits]
    assert all(shape[2] == frames for shape in module.seen)
    assert splits == 1 or max(shape[3] for shape in module.seen) <= -(-10 // splits) + 2


@pytest.mark.parametrize("mode_x", ["constant", "circular", "reflect"])
@pytest.mark.parametrize("mode_y", ["constant", "reflect", "replicate", "circular"])
@settings(max_examples=6)
@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 3),
    padding=st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.just("same")),
    height=st.integers(8, 40),
    splits=SPLITS,
)
@example(kernel=3, stride=1, dilation=1, padding=(1, 1), height=40, splits=8)
def test_a_seamless_extension_is_run_in_strips(
    mode_x: str, mode_y: str, kernel: int, stride: int, dilation: int, padding: Any, height: int, splits: int
) -> None:
    torch.manual_seed(0)
    stride = 1 if padding == "same" else stride
    conv = nn.Conv2d(3, 4, kernel, stride, padding, dilation, dtype=torch.float64)
    module: Any = make_seamless(conv, mode_x, mode_y)
    input = torch.randn(2, 3, height, 14, dtype=torch.float64)
    expected = attempt(module, input)
    assume(isinstance(expected, Tensor))
    assert isinstance(expected, Tensor)
    input.requires_grad_()
    slopes = gradients(module, input)
    tile(module, splits)
    module.strip_shapes.clear()
    with torch.no_grad():
        assert_same(module(input), expected)
    rows = expected.shape[2]
    assert len(module.strip_shapes) == -(-rows // -(-rows // min(splits, rows)))
    for ours, eager in zip(gradients(module, input), slopes, strict=True):
        assert_same(ours, eager)
    restore_model(module)
    assert module._conv_forward.__func__ is seamless_forward


def test_a_seamless_extension_sees_strips_not_the_image() -> None:
    module: Any = make_seamless(nn.Conv2d(3, 4, 3, padding=1), "circular", "constant")
    with torch.no_grad():
        tile(module, 10)(torch.randn(1, 3, 100, 14))
    assert len(module.strip_shapes) == 10
    assert max(shape[2] for shape in module.strip_shapes) <= 10 + 2 + 6


@pytest.mark.parametrize("wrap", [lambda f, conv: partial(f, conv), lambda f, conv: lambda x, w, b: f(conv, x, w, b)])
def test_a_partial_or_lambda_is_chained(wrap: Any) -> None:
    torch.manual_seed(0)
    module: Any = make_seamless(nn.Conv2d(3, 4, 3, padding=1), "circular", "circular")
    theirs = module._conv_forward = wrap(seamless_forward, module)
    input = torch.randn(1, 3, 40, 14)
    with torch.no_grad():
        expected = module(input)
        with patched(module, 4, threshold=0):
            module.strip_shapes.clear()
            assert_same(module(input), expected, 1e-5)
            assert len(module.strip_shapes) == 4
    assert module._conv_forward is theirs


def test_a_leftover_bound_method_is_the_modules_own() -> None:
    module, input = square(nn.Conv2d)
    expected = module(input)
    module._conv_forward = module._conv_forward  # type: ignore[attr-defined]
    tile(module)
    assert hook(module).inner is None
    assert_same(module(input), expected, 1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", [{"stride": 2}, {"padding": 0}, {"padding": 3}, {"padding": 1, "dilation": 2}])
def test_an_extension_whose_output_has_another_height_runs_whole(change: dict[str, int], grad: bool) -> None:
    module, input = square(nn.Conv2d)
    another: Any = module
    another._conv_forward = lambda x, w, b: nn.functional.conv2d(x, w, b, **change)
    told: list[tuple[int, int]] = []
    with torch.set_grad_enabled(grad):
        expected = module(input)
        tile(module, on_strip=lambda _, *rows: told.append(rows))
        assert_same(module(input), expected, 1e-5)
    assert told == [(1, 1)]


def test_an_extension_that_enlarges_its_output_runs_whole() -> None:
    module, input = square(nn.Conv2d)
    another: Any = module
    another._conv_forward = lambda x, w, b: nn.functional.conv2d(x, w, b, padding=1).repeat_interleave(2, -2)
    with torch.no_grad():
        expected = module(input)
        assert_same(tile(module)(input), expected, 1e-5)


@pytest.mark.parametrize("of_input", [False, True])
def test_an_extensions_own_parameter_gets_its_gradient(of_input: bool) -> None:
    module, input = square(nn.Conv2d)
    scale = nn.Parameter(torch.tensor(2.0))
    another: Any = module
    another._conv_forward = lambda x, w, b: nn.functional.conv2d(x, w * scale, b, padding=1)
    module.requires_grad_(False)
    input.requires_grad_(of_input)
    (expected,) = torch.autograd.grad(module(input).square().sum(), scale)
    (actual,) = torch.autograd.grad(tile(module)(input).square().sum(), scale)
    assert_same(actual, expected, 1e-5)


class Adapted(nn.Conv2d):
    """A class whose method adds what parameters of its own make of the input."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.added = nn.Parameter(torch.randn(self.weight.shape))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        return super()._conv_forward(input, weight, bias) + super()._conv_forward(input, self.added, None)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("of_weight", [False, True])
def test_parameters_of_a_class_get_their_gradients(of_input: bool, of_weight: bool, sequential: bool) -> None:
    torch.manual_seed(0)
    module, input = Adapted(4, 6, 3, padding=1), torch.randn(2, 4, 10, 11, requires_grad=of_input)
    module.weight.requires_grad_(of_weight)
    leaves = [one for one in (*module.parameters(), input) if one.requires_grad]
    expected = torch.autograd.grad(module(input).square().sum(), leaves)
    actual = torch.autograd.grad(tile(module, 4, sequential)(input).square().sum(), leaves)
    for ours, eager in zip(actual, expected, strict=True):
        assert_same(ours, eager, 1e-5)


def test_weight_parametrizations_are_kept() -> None:
    module, input = square(nn.Conv2d)
    nn.utils.parametrizations.weight_norm(module)
    expected = module(input)
    assert_same(tile(module)(input), expected, 1e-5)


def test_the_hook_is_told_the_weights_of_the_call() -> None:
    module, input = square(nn.Conv2d)
    weight, bias = torch.randn_like(module.weight), torch.randn(6)
    expected = nn.functional.conv2d(input, weight, bias, padding=1)
    tile(module)
    found = hook(module)
    assert isinstance(found, TiledForward)
    assert_same(found(input, weight, bias), expected, 1e-5)
    assert_same(found(input, weight, None), nn.functional.conv2d(input, weight, padding=1), 1e-5)


class Reparametrised(nn.Module):
    """As SPAN's blocks: branches that train, and one convolution that each call in evaluation makes of them anew."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.skip = nn.Conv2d(channels, channels, 1)
        self.branch = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(2 * channels, 2 * channels, 3),
            nn.Conv2d(2 * channels, channels, 1),
        )  # fmt: skip
        self.eval_conv = nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)

    def update(self) -> None:
        weights: Any = [one.weight for one in self.branch]
        first, middle, last = weights
        joined = nn.functional.conv2d(first.flip(2, 3).permute(1, 0, 2, 3), middle, padding=2).flip(2, 3)
        joined = nn.functional.conv2d(joined, last).flip(2, 3).permute(1, 0, 2, 3)
        self.eval_conv.weight.data = joined + nn.functional.pad(self.skip.weight, [1] * 4)
        self.eval_conv.bias.data = self.branch[2].bias + self.skip.bias  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.branch(nn.functional.pad(x, [1] * 4)) + self.skip(x)
        self.update()
        return self.eval_conv(x)


class Standardised(nn.Conv2d):
    """Weights computed in each call, and given to the method."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [Reparametrised, lambda: Standardised(4, 4, 3, padding=1)])
def test_weights_that_are_made_anew_in_each_call_give_eagers_result_and_gradients(build: Any, training: bool) -> None:
    """Two calls before one backward, with other weights in between."""

    def run(splits: int) -> list[Any]:
        torch.manual_seed(0)
        block = build().train(training)
        model = nn.Sequential(block, nn.SiLU(), block)
        image = torch.randn(2, 4, 15, 12, requires_grad=True)
        if splits:
            convert_model(model, splits, threshold=0, predicate=lambda *_: True)
        first = model(image)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter * 1.5
        second = model(image)
        leaves = [image, *(one for one in model.parameters() if one.requires_grad)]
        return [first, second, *torch.autograd.grad((first + 2 * second).square().sum(), leaves, allow_unused=True)]

    for ours, eager in zip(run(3), run(0), strict=True):
        assert (ours is None) == (eager is None)
        if eager is not None:
            assert_same(ours, eager, 1e-5)
