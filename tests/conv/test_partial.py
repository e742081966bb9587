"""Partial convolution against its formula, and what it promises beyond that."""

from __future__ import annotations

import math
from typing import Any, Optional

import pytest
import torch
from conv_helpers import Calls, assert_same, tile
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv import PartialConv2d, PartialConv3d, PConv2d, Tiling, convert_model, restore_model
from comfyui_patchconv.conv.partial import PartialPadding, partial_convolution
from comfyui_patchconv.streaming import stream

CLASSES: tuple[Any, ...] = (PartialConv2d, PartialConv3d)
STRIPS = Tiling(splits=3, threshold=0)


def formula(module: Any, input: Tensor, mask: Optional[Tensor], bias: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition in float64, window by window: what is padded and unfolded is both the image and its mask."""
    sides = len(module.kernel_size)
    input, weight = input.double(), module.weight.double()
    multi_channel = module.multi_channel and mask is not None
    mask = torch.ones(1, 1, *input.shape[2:]) if mask is None else mask
    mask = mask.double().expand(input.shape[0], input.shape[1] if multi_channel else 1, *input.shape[2:])
    edges = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    held, counted = F.pad(input * mask, edges, mode), F.pad(mask, edges, mode)
    for dim, (kernel, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation), 2):
        held, counted = (
            torch.stack(
                [
                    one.narrow(dim, tap * dilation, one.shape[dim] - dilation * (kernel - 1))[
                        (slice(None),) * dim + (slice(None, None, stride),)
                    ]
                    for tap in range(kernel)
                ],
                -1,
            )
            for one in (held, counted)
        )
    groups = module.groups
    of_masks = groups if multi_channel else 1
    counted = counted.unflatten(1, (of_masks, -1)).flatten(2 + 1 + sides).sum((2, -1))
    valid = counted.clamp(0, 1)
    size = math.prod(module.kernel_size) * (input.shape[1] // groups if multi_channel else 1)
    ratio = size / (counted + 1e-8) * valid
    held = held.unflatten(1, (groups, -1)).flatten(3 + sides)
    kernels = weight.unflatten(0, (groups, -1)).flatten(3)
    raw = torch.einsum("ngc...k,gock->ngo...", held, kernels)
    wide = (slice(None), slice(None), None)
    output = raw * ratio[wide]
    if bias is not None:
        output = (output + bias.double().view(1, groups, -1, *[1] * sides)) * valid[wide]
    return output.flatten(1, 2), valid


def random_mask(shape: tuple[int, ...], share: float = 0.5) -> Tensor:
    return (torch.rand(shape) < share).float()


@st.composite
def layers(draw: st.DrawFn, kind: Any) -> Any:
    """A small partial convolution of any geometry, and the input's sides."""
    sides = 2 if kind is PartialConv2d else 3
    numbers = [st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2)]
    kernel, stride, padding, dilation = (draw(st.tuples(*[number] * sides)) for number in numbers)
    module = kind(
        4,
        8,
        kernel,
        stride,
        padding,
        dilation,
        draw(st.sampled_from([1, 2, 4])),
        draw(st.booleans()),
        draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
        multi_channel=draw(st.booleans()),
        return_mask=True,
    )
    return module, draw(st.tuples(*[st.integers(6, 11)] * sides))


@pytest.mark.parametrize("kind", CLASSES)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_equals_the_formula_whole_and_in_strips(kind: Any, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    module, size = data.draw(layers(kind))
    input = torch.randn(2, 4, *size, dtype=torch.float64)
    channels = 4 if module.multi_channel else 1
    share = data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    mask = random_mask((data.draw(st.sampled_from([1, 2])), channels, *size), share)
    mask = data.draw(st.sampled_from([mask, mask.bool(), mask.double(), None]))
    expected, valid = formula(module, input, mask, module.bias)
    for tiling in (Tiling(1), STRIPS):
        output, new = partial_convolution(module, input, module.weight, module.bias, mask, tiling=tiling)
        assert_same(output, expected, 1e-12)
        assert torch.equal(new.expand_as(valid), valid)
    output, new = module(input, mask)
    assert_same(output, expected, 1e-12)
    each = module.out_channels // valid.shape[1] if module.multi_channel else 1
    assert torch.equal(new.expand(2, *new.shape[1:]), valid.repeat_interleave(each, 1))


@pytest.mark.parametrize("bias", [False, True])
def test_nothing_valid_gives_zeros_and_everything_valid_the_unmasked_convolution(bias: bool) -> None:
    torch.manual_seed(0)
    layer = PartialConv2d(4, 6, 3, bias=bias, return_mask=True)
    input = torch.randn(2, 4, 10, 11)
    output, valid = layer(input, torch.zeros(1, 1, 10, 11))
    assert not output.any()
    assert not valid.any()
    output, valid = layer(input, torch.ones(1, 1, 10, 11))
    assert_same(output, F.conv2d(input, layer.weight, layer.bias), 1e-6)
    assert valid.all()


def test_what_is_masked_does_not_tell() -> None:
    torch.manual_seed(0)
    layer, input, mask = PartialConv2d(4, 6, 3, padding=1), torch.randn(1, 4, 12, 12), random_mask((1, 1, 12, 12))
    other = torch.where(mask.bool(), input, 1e6 * torch.randn_like(input))
    assert torch.equal(layer(input, mask), layer(other, mask))


def test_without_a_mask_borders_are_scaled_to_a_full_window() -> None:
    layer = PartialConv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(layer.weight)
    output = layer(torch.ones(1, 1, 5, 6))
    assert torch.allclose(output, torch.full_like(output, 9.0))


def test_no_mask_is_remembered() -> None:
    torch.manual_seed(0)
    layer, input = PartialConv2d(4, 6, 3, padding=1), torch.randn(1, 4, 12, 12)
    fresh = layer(input)
    layer(input, random_mask((1, 1, 12, 12)))
    assert torch.equal(layer(input), fresh)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("multi_channel", [False, True])
def test_half_precision_has_no_nan_in_holes(dtype: torch.dtype, multi_channel: bool) -> None:
    torch.manual_seed(0)
    layer = PartialConv2d(8, 6, 3, padding=1, dtype=dtype, multi_channel=multi_channel)
    try:
        F.conv2d(torch.zeros(1, 8, 4, 4, dtype=dtype), layer.weight)
    except RuntimeError as error:
        pytest.skip(f"this torch has no convolution in {dtype} on the CPU: {error}")
    input, mask = torch.randn(2, 8, 16, 16).to(dtype), random_mask((2, 8 if multi_channel else 1, 16, 16), 0.1)
    output = layer(input, mask.to(dtype))
    expected, _ = formula(layer, input, mask, layer.bias)
    assert output.dtype == dtype
    assert_same(output.double(), expected, 4 * torch.finfo(dtype).eps)


def test_counts_are_exact_under_autocast() -> None:
    torch.manual_seed(0)
    layer = PConv2d(64, 2, 9, padding=4)
    input, mask = torch.randn(1, 64, 24, 24), random_mask((1, 24, 24), 0.7)
    expected = layer.compute_masks(mask[:, None])
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.compute_masks(mask[:, None])
        output, _ = layer(input, mask)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    assert_same(output.float(), layer(input, mask)[0], 0.02)


@pytest.mark.parametrize("kind", CLASSES)
def test_gradients_are_those_of_the_formula_in_strips_too(kind: Any) -> None:
    torch.manual_seed(0)
    sides = 2 if kind is PartialConv2d else 3
    layer = kind(2, 4, 3, padding=1, stride=(2, 1, 1)[:sides], groups=2, dtype=torch.float64, multi_channel=True)
    input = torch.randn(2, 2, *(5, 6, 4)[:sides], dtype=torch.float64, requires_grad=True)
    mask = random_mask(input.shape)

    def run(tiling: Tiling) -> Any:
        return lambda x, w, b: partial_convolution(layer, x, w, b, mask, tiling=tiling)[0]

    leaves: Any = (input, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(run(STRIPS), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run(STRIPS), leaves, fast_mode=True)
    expected = torch.autograd.grad(formula(layer, input, mask, layer.bias)[0].sin().sum(), leaves)
    for tiling in (Tiling(1), STRIPS):
        found = torch.autograd.grad(run(tiling)(*leaves).sin().sum(), leaves)
        for one, other in zip(found, expected):
            assert_same(one, other, 1e-12)


def test_no_gradient_reaches_the_mask() -> None:
    layer, mask = PartialConv2d(2, 3, 3, return_mask=True), torch.ones(1, 1, 8, 8, requires_grad=True)
    output, valid = layer(torch.randn(1, 2, 8, 8), mask)
    assert not valid.requires_grad
    assert torch.autograd.grad(output.sum(), mask, allow_unused=True) == (None,)


def test_masked_input_and_ratio_never_exist_as_a_whole() -> None:
    layer, input = PartialConv2d(16, 16, 3, padding=1), torch.randn(1, 16, 96, 32)
    convert_model(layer, splits=8, threshold=0)
    with torch.no_grad(), Calls() as calls:
        output = layer(input, random_mask((1, 1, 96, 32)))
    assert [size for _, size in calls.made if size >= input.numel() // 2] == [output.numel()]


def test_backward_keeps_input_weight_and_bias_alone() -> None:
    layer, input = PartialConv2d(16, 16, 3, padding=1), torch.randn(1, 16, 96, 32, requires_grad=True)
    convert_model(layer, splits=8, threshold=0)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(input, random_mask((1, 1, 96, 32)))
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (input, layer.weight, layer.bias)]  # type: ignore[union-attr]


def test_convert_and_restore_leave_the_result() -> None:
    torch.manual_seed(0)
    layer, input, mask = PartialConv2d(4, 6, 3, padding=1), torch.randn(1, 4, 40, 12), random_mask((1, 1, 40, 12))
    eager = layer(input, mask)
    with torch.no_grad(), Calls() as calls:
        strips = tile(layer, 5)(input, mask)
    assert len(calls.outputs) == 1 + 5
    assert_same(strips, eager)
    assert torch.equal(restore_model(layer)(input, mask), eager)


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (3, 1, 8, 8), (1, 1, 8, 9), (1, 8, 8)])
def test_masks_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mask_in is .*: for this input give \(2, 1, 8, 8\)"):
        PartialConv2d(4, 6, 3)(torch.randn(2, 4, 8, 8), torch.ones(shape))


def test_inputs_without_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="input has 3 dimensions: give 4"):
        PartialConv2d(4, 6, 3)(torch.randn(4, 8, 8))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_partial_padding_scales_the_borders_of_any_convolution(kind: Any) -> None:
    torch.manual_seed(0)
    sides = (nn.Conv1d, nn.Conv2d, nn.Conv3d).index(kind) + 1
    conv, input = kind(4, 6, 3, padding=1), torch.randn(2, 4, *(13, 7, 5)[:sides])
    inside = (..., *[slice(1, -1)] * sides)
    eager = conv(input)
    conv.bias.data.zero_()
    scaled = conv(input)
    scaled[..., 0] *= 3 / 2
    scaled[..., -1] *= 3 / 2
    for tiling in (Tiling(1), STRIPS):
        conv.__dict__["_conv_forward"] = PartialPadding(conv, tiling)
        found = conv(input)
        assert_same(found[inside], scaled[inside])
        middle = (..., *[3] * (sides - 1), slice(None))
        assert_same(found[middle], scaled[middle])
        del conv.__dict__["_conv_forward"]
    assert not torch.equal(eager, scaled)


@pytest.mark.parametrize("options", [{"padding": 0}, {"padding": 1, "padding_mode": "reflect"}])
def test_partial_padding_leaves_what_is_not_padded_with_zeros(options: dict[str, Any]) -> None:
    conv, input = nn.Conv2d(4, 6, 3, **options), torch.randn(2, 4, 13, 9)
    eager = conv(input)
    conv.__dict__["_conv_forward"] = PartialPadding(conv, Tiling(1))
    assert torch.equal(conv(input), eager)


def test_another_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="padding is 'zeros': use 'plain' or 'partial'"):
        convert_model(nn.Conv2d(4, 4, 3), padding="zeros")


def test_partial_padding_is_streamed_strip_by_strip() -> None:
    """Streamed, the borders are scaled strip by strip: nothing is evaluated whole for them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1))
    input, report = torch.randn(1, 4, 64, 12), dict[str, int]()
    convert_model(model, 1, threshold=10**12, padding="partial")
    with torch.no_grad():
        expected = model(input)
        with stream(model, report=report):
            assert_same(model(input), expected)
    assert not report


def test_partial_padding_of_a_model_is_put_on_and_taken_off() -> None:
    torch.manual_seed(0)
    model, input = (
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1)),
        torch.randn(1, 4, 12, 12),
    )
    layers = [PartialConv2d(4, 4, 3, padding=1) for _ in range(2)]
    for layer, conv in zip(layers, (model[0], model[2])):
        layer.load_state_dict(conv.state_dict())
    expected = layers[1](F.silu(layers[0](input)))
    eager = model(input)
    for splits, threshold in ((1, 10**9), (3, 0)):
        convert_model(model, splits, threshold=threshold, padding="partial")
        assert_same(model(input), expected)
        restore_model(model)
        assert torch.equal(model(input), eager)
