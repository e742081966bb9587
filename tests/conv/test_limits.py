"""When a convolution runs in strips, how large a strip may get, and the progress that is told."""

from __future__ import annotations

import pytest
import torch
from conv_helpers import Calls, Counting, HostConv3d, assert_same, make_seamless
from torch import Tensor, nn

from comfyui_patchconv import convert_model, patched, restore_model
from comfyui_patchconv.conv.strip_sizes import DEFAULT_THRESHOLD

IMAGE = torch.randn(2, 3, 20, 18, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model: nn.Module, input: Tensor = IMAGE) -> Tensor:
    return model(input)


# Threshold and limits


@pytest.mark.parametrize("batch", [1, 4])
def test_the_threshold_counts_one_sample_and_is_reached_when_equal(batch: int) -> None:
    module, input = Counting(3, 4, 3, padding=1), torch.randn(batch, 3, 10, 9)
    expected = run(module, input)
    for threshold, calls in [(3 * 10 * 9 + 1, 1), (3 * 10 * 9, 5)]:
        module.seen.clear()
        convert_model(module, 5, threshold=threshold)
        assert_same(run(module, input), expected)
        assert len(module.seen) == calls


@pytest.mark.parametrize("sequential", [True, False])
def test_below_the_threshold_nothing_changes(sequential: bool) -> None:
    module, input = Counting(3, 4, 3, padding=1), IMAGE.clone().requires_grad_()
    expected = module(input)
    convert_model(module, 4, sequential)
    module.seen.clear()
    actual = module(input)
    assert torch.equal(actual, expected)
    assert module.seen == [tuple(IMAGE.shape)]
    assert type(actual.grad_fn) is type(expected.grad_fn)


def test_depth_counts_towards_the_threshold() -> None:
    module, input = HostConv3d(3, 4, 3, padding=1), torch.randn(1, 3, 5, 10, 9)
    convert_model(module, 5, threshold=3 * 5 * 10 * 9)
    run(module, input)
    assert len(module.seen) == 5


@pytest.mark.parametrize("splits", [0, 2])
def test_strips_on_a_cpu_are_no_larger_than_suits_it(splits: int) -> None:
    module, input = Counting(3, 5, 3, padding=1), torch.randn(1, 3, 40, 16)
    expected = run(module, input)
    module.seen.clear()
    assert_same(run(convert_model(module, splits, threshold=0, strip_bytes=4096), input), expected)
    rows = max(shape[2] for shape in module.seen) - 2
    assert 4096 / 2 < rows * 4 * 16 * (3 + 5) <= 4096


def test_automatic_leaves_small_images_whole() -> None:
    module = convert_model(Counting(3, 5, 3, padding=1), 0, threshold=0)
    run(module)
    assert module.seen == [tuple(IMAGE.shape)]


LIMITED = [
    (Counting(4, 6, 3, padding=1), (2, 4, 20, 16)),
    (Counting(4, 6, 3, padding=1), (7, 4, 5, 16)),  # one row of all samples is too large
    (Counting(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 20, 16)),
    (Counting(1, 16, 3, padding=1), (2, 1, 20, 16)),
    (Counting(4, 1, 5, stride=3, padding=(4, 2)), (2, 4, 31, 16)),
    (Counting(4, 6, 5, padding=2, dilation=2), (3, 4, 20, 6)),
    (Counting(4, 4, 3, padding=1), (1, 4, 24, 11)),
    (Counting(4, 6, 3, padding=(0, 1)), (7, 4, 3, 16)),  # a single output row
    (Counting(4, 4, 1, stride=(9, 1)), (1, 4, 18, 16)),  # the last rows are not read
]


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize(("module", "shape"), LIMITED, ids=range(len(LIMITED)))
def test_no_call_passes_the_element_limit(module: Counting, shape: tuple[int, ...], sequential: bool) -> None:
    input = torch.randn(shape)
    expected = run(module, input)
    whatever_size = {"predicate": lambda *_: True, "max_elements": 1100}
    with patched(module, 1, sequential, **whatever_size), Calls() as calls:
        actual = run(module, input)
    assert_same(actual, expected)
    assert max(piece.numel() for piece in calls.inputs) <= 1100
    assert max(shape.numel() for shape in calls.outputs) <= 1100


@pytest.mark.parametrize("splits", range(2, 9))
def test_batched_strips_keep_to_the_element_limit(splits: int) -> None:
    module, input = Counting(4, 8, 3, padding=1), torch.randn(1, 4, 9, 10)
    expected = run(module, input)
    with patched(module, splits, False, 0, max_elements=expected.numel()), Calls() as calls:
        assert_same(run(module, input), expected)
    assert max(piece.numel() for piece in calls.inputs) <= expected.numel()
    assert max(shape.numel() for shape in calls.outputs) <= expected.numel()


def test_a_chained_extension_keeps_to_the_element_limit() -> None:
    module = make_seamless(nn.Conv2d(4, 4, 3, padding=1), "circular", "circular")
    input = torch.randn(1, 4, 60, 16)
    expected = run(module, input)
    with patched(module, 2, max_elements=1100), Calls() as calls:
        assert_same(run(module, input), expected)
    assert max(piece.numel() for piece in calls.inputs) <= 1100


def test_a_shortened_kernel_keeps_to_the_element_limit() -> None:
    module = HostConv3d(1, 16, 3, padding=(0, 1, 1))
    input = torch.randn(1, 1, 1, 20, 12)
    with torch.no_grad():
        expected = module(input, autopad="causal_zero")
        with patched(module, 2, max_elements=1100), Calls() as calls:
            assert_same(module(input, autopad="causal_zero"), expected)
    assert max(shape.numel() for shape in calls.outputs) <= 1100


# Progress


def test_on_strip_is_told_the_rows_done() -> None:
    seen: list[tuple[nn.Module, int, int]] = []
    module = nn.Conv2d(3, 4, 3)
    run(convert_model(module, 4, threshold=0, on_strip=lambda *progress: seen.append(progress)), IMAGE)
    assert seen == [(module, 5, 18), (module, 10, 18), (module, 15, 18), (module, 18, 18)]


def test_on_strip_is_told_of_untouched_and_batched_calls() -> None:
    seen: list[tuple[int, int]] = []
    module = nn.Conv2d(3, 4, 3)
    run(convert_model(module, 4, on_strip=lambda _, *rows: seen.append(rows)))
    run(convert_model(module, 4, False, 0, on_strip=lambda _, *rows: seen.append(rows)))
    assert seen == [(1, 1), (18, 18)]


@pytest.mark.parametrize("grad", [False, True])
def test_on_strip_can_end_the_forward(grad: bool) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(module: nn.Module, done: int, rows: int) -> None:
        if done > rows // 2:
            raise Interrupted

    module = Counting(3, 4, 3, padding=1)
    expected = run(module)
    module.seen.clear()
    convert_model(module, 5, threshold=0, on_strip=interrupt)
    with torch.set_grad_enabled(grad), pytest.raises(Interrupted):
        module(IMAGE)
    assert len(module.seen) == 3
    assert torch.equal(run(restore_model(module)), expected)


def test_on_strip_grows_over_groups_of_samples() -> None:
    seen: list[tuple[int, int]] = []
    conv, note = nn.Conv2d(4, 6, 3, padding=1), lambda _, *rows: seen.append(rows)
    module = convert_model(conv, on_strip=note, max_elements=1100)
    run(module, torch.randn(7, 4, 5, 16))
    assert seen == sorted(set(seen))
    assert len({rows for _, rows in seen}) == 1
    assert seen[-1][0] == seen[-1][1]


def test_what_has_no_rows_to_cut_runs_whole() -> None:
    module, input = nn.Conv2d(3, 4, 3, padding=1), IMAGE.to_mkldnn()
    with torch.no_grad():
        expected = module(input)
        convert_model(module, threshold=0)
        assert_same(module(input).to_dense(), expected.to_dense())
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Conv2d(0, 4, 3, padding=1)
    expected = run(empty, IMAGE[:, :0])
    for threshold in (0, DEFAULT_THRESHOLD):
        convert_model(empty, threshold=threshold)
        assert_same(run(empty, IMAGE[:, :0]), expected)
