"""The rows a strip needs, checked against an index computation that knows nothing of windows."""

from __future__ import annotations

import pytest
import torch
from conv_helpers import MODES
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from comfyui_patchconv.conv.halo import Axis, Window, equal_strips, padded_row, strips

ZERO = -1
AXES = st.builds(Axis, *[st.integers(1, 6)] + [st.integers(1, 4)] * 2, st.integers(0, 7), st.integers(0, 7))


def pad_rows(rows: list[int], before: int, after: int, mode: str) -> list[int]:
    """Row numbers with padding, by PyTorch itself: `ZERO` stands for a row of zeros."""
    row = torch.tensor(rows, dtype=torch.float64).view(1, 1, -1)
    if mode == "zeros":
        return [int(i) for i in F.pad(row, (before, after), value=ZERO).flatten()]
    return [int(i) for i in F.pad(row, (before, after), mode=mode).flatten()]


def taps(axis: Axis, rows: list[int]) -> list[list[int]]:
    """For each output row of a convolution without padding: the rows it reads."""
    count = (len(rows) - axis.dilation * (axis.kernel - 1) - 1) // axis.stride + 1
    return [[rows[o * axis.stride + axis.dilation * t] for t in range(axis.kernel)] for o in range(max(count, 0))]


def whole(axis: Axis, size: int, mode: str) -> list[list[int]]:
    """For each output row of the whole convolution: the input rows it reads."""
    assume(mode == "zeros" or mode == "replicate" or max(axis.before, axis.after) < size)
    expected = taps(axis, pad_rows(list(range(size)), axis.before, axis.after, mode))
    assume(expected)
    return expected


def some_strip(data: st.DataObject, rows: int) -> tuple[int, int]:
    first = data.draw(st.integers(0, rows - 1), "first")
    return first, data.draw(st.integers(first + 1, rows), "last")


@pytest.mark.parametrize("mode", MODES)
@given(axis=AXES, size=st.integers(1, 40), data=st.data())
@settings(max_examples=60)
def test_window_holds_exactly_the_rows_that_the_strip_reads(
    mode: str, axis: Axis, size: int, data: st.DataObject
) -> None:
    expected = whole(axis, size, mode)
    first, last = some_strip(data, len(expected))
    window = axis.window(first, last, size, mode)
    rows = [ZERO] * window.before + list(window.rows) + [ZERO] * window.after
    assert taps(axis, rows) == expected[first:last]
    assert len(rows) == (last - first - 1) * axis.stride + axis.span
    assert window.skip == 0


@pytest.mark.parametrize("mode", MODES)
@given(axis=AXES, size=st.integers(1, 60), data=st.data())
@settings(max_examples=80)
def test_opaque_window_gives_the_strip_whatever_padding_the_convolution_adds(
    mode: str, axis: Axis, size: int, data: st.DataObject
) -> None:
    expected = whole(axis, size, mode)
    first, last = some_strip(data, len(expected))
    window = axis.opaque_window(first, last, size)
    assert (window.before, window.after) == (0, 0)
    result = taps(axis, pad_rows(list(window.rows), axis.before, axis.after, mode))
    assert result[window.skip : window.skip + last - first] == expected[first:last]


@given(AXES, st.integers(1, 5), st.integers(0, 1000))
@example(Axis(3, before=1, after=1), 4, 500)
@example(Axis(1, before=1), 1, 1000)  # the last row is padding, and none is behind the image
@example(Axis(3, 2, 1, before=2), 1, 1000)
def test_opaque_window_of_a_tall_image_stays_small(axis: Axis, count: int, position: int) -> None:
    size = 1000
    rows = axis.output_size(size)
    first = min(position, rows - count)
    window = axis.opaque_window(first, first + count, size)
    assert len(window.rows) <= count * axis.stride + axis.opaque_rows  # what the element limit reckons with
    assert isinstance(window.rows, range) or first < 2 * (axis.before + axis.after) + 2 or first + count > rows - 20


@given(AXES, st.integers(1, 40))
def test_output_size_is_that_of_the_convolution(axis: Axis, size: int) -> None:
    padded = torch.zeros(1, 1, size + axis.before + axis.after)
    if padded.shape[-1] < axis.span:
        assert axis.output_size(size) == 0
    else:
        weight = torch.zeros(1, 1, axis.kernel)
        output = F.conv1d(padded, weight, stride=axis.stride, dilation=axis.dilation)
        assert axis.output_size(size) == output.shape[-1]


@pytest.mark.filterwarnings("ignore:Using padding=.same")
@given(st.integers(1, 6), st.integers(1, 4), st.integers(5, 30))
@settings(max_examples=50)
def test_same_gives_the_odd_row_to_the_end_as_pytorch_does(kernel: int, dilation: int, size: int) -> None:
    axis = Axis.of(kernel, 1, dilation, "same")
    row = torch.arange(1.0, size + 1, dtype=torch.float64).view(1, 1, -1)
    weight = torch.rand(1, 1, kernel, dtype=torch.float64)
    padded = F.pad(row, (axis.before, axis.after))
    expected = F.conv1d(row, weight, dilation=dilation, padding="same")
    torch.testing.assert_close(F.conv1d(padded, weight, dilation=dilation), expected)
    assert axis.after - axis.before == dilation * (kernel - 1) % 2


def test_axis_of_reads_numbers_pairs_and_valid() -> None:
    assert Axis.of(3, 2, 1, 4) == Axis(3, 2, 1, 4, 4)
    assert Axis.of(3, 2, 1, (4, 0)) == Axis(3, 2, 1, 4, 0)
    assert Axis.of(3, 2, 2, "valid") == Axis(3, 2, 2, 0, 0)


def test_windows_of_a_three_row_kernel() -> None:
    axis = Axis.of(3, 1, 1, 1)
    assert axis.window(0, 4, 10) == Window(range(0, 5), before=1)
    assert axis.window(4, 8, 10) == Window(range(3, 9))
    assert axis.window(8, 10, 10) == Window(range(7, 10), after=1)
    assert axis.window(0, 2, 10, "circular") == Window((9, 0, 1, 2))
    assert axis.window(8, 10, 10, "reflect") == Window((7, 8, 9, 8))
    assert axis.window(4, 8, 10, "reflect") == Window(range(3, 9))


@given(st.integers(1, 200), st.integers(1, 250))
def test_strips_cover_every_row_once(size: int, rows: int) -> None:
    found = list(strips(size, rows))
    assert [row for first, last in found for row in range(first, last)] == list(range(size))
    assert all(last - first == rows for first, last in found[:-1])
    assert 0 < found[-1][1] - found[-1][0] <= rows


@given(st.integers(1, 200), st.integers(1, 250))
def test_equal_strips_are_equal_and_cover_every_row(size: int, rows: int) -> None:
    found = equal_strips(size, rows)
    assert {last - first for first, last in found} == {min(size, rows)}
    assert {row for first, last in found for row in range(first, last)} == set(range(size))
    assert all(first >= 0 and last <= size for first, last in found)
    assert len(found) == len(list(strips(size, rows)))


@given(st.sampled_from(MODES[1:]), st.integers(2, 12), st.data())
def test_padded_row_is_where_pytorch_takes_it_from(mode: str, size: int, data: st.DataObject) -> None:
    before, after = data.draw(st.tuples(*[st.integers(0, size - 1)] * 2))
    expected = pad_rows(list(range(size)), before, after, mode)
    assert [padded_row(row, size, mode) for row in range(-before, size + after)] == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 1, 1, 0), "kernel 0"),
        ((3, 0, 1, 0), "stride 0"),
        ((3, 1, -2, 0), "dilation -2"),
        ((3, 1, 1, -1), r"padding \(-1, -1\)"),
        ((3, 1, 1, (0, -4)), r"padding \(0, -4\)"),
        ((3, 1, 1, "full"), "'full'"),
        ((3, 2, 1, "same"), "'same' needs stride 1, not 2"),
    ],
)
def test_a_bad_value_is_named_in_one_sentence(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^.]*{named}[^.]*\.$"):
        Axis.of(*arguments)


def test_an_unknown_padding_mode_is_named_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^[^.]*'mirror'[^.]*\.$"):
        Axis(3, before=1, after=1).window(0, 1, 5, "mirror")


@pytest.mark.parametrize("cut", [lambda rows: list(strips(10, rows)), lambda rows: equal_strips(10, rows)])
@pytest.mark.parametrize("rows", [0, -1])
def test_strips_of_no_rows_are_refused_in_one_sentence(cut: object, rows: int) -> None:
    assert callable(cut)
    with pytest.raises(ValueError, match=rf"^[^.]*{rows}[^.]*\.$"):
        cut(rows)
