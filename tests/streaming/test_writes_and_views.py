"""Writes in place through views of every sort, and operands that are written after use: the result is eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from products import crossed
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Tuning, streamed

from .comparing import FEW_ROWS, KEPT_ARE_ORDINARY, KEPT_STAY_LAZY, MODES, TUNINGS, Mode, assert_as_eager

WEIGHT = nn.Parameter(torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 6, requires_grad=False)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Function = Callable[[Tensor], Any]


def c(x: Tensor) -> Tensor:
    return F.conv2d(x, WEIGHT.to(x.dtype), padding=1)


def a_map(memory_format: torch.memory_format = torch.contiguous_format, *shape: int) -> Tensor:
    x = torch.randn(*(shape or (2, 4, 9, 7)), generator=torch.Generator().manual_seed(2))
    return x.contiguous(memory_format=memory_format)


# Writes through views


def permuted(x: Tensor) -> Any:
    y = c(x)
    t = y.permute(0, 2, 3, 1)
    t[..., :2].mul_(3)
    return y, t


def permuted_and_normed(x: Tensor) -> Any:
    t = F.layer_norm(c(x).permute(0, 2, 3, 1), (4,))
    t[..., :2].mul_(3)
    return t.permute(0, 3, 1, 2) + 0


def permuted_with_the_batch(x: Tensor) -> Any:
    y = c(x)
    y.permute(3, 0, 1, 2).mul_(2)
    y.permute(1, 0, 2, 3)[0].add_(1)
    return c(y)


def a_token(x: Tensor) -> Any:
    t = c(x).flatten(2).transpose(1, 2)
    t[:, 0] = 0
    return t * 1


def a_token_of_what_is_kept(x: Tensor) -> Any:
    y = c(x)
    t = y.flatten(2).transpose(1, 2)
    t[:, 3:5] *= 2
    t[:, -1].fill_(7)
    return y, c(y), t


def tokens_by_a_list(x: Tensor) -> Any:
    t = c(x).flatten(2).transpose(1, 2) * 1
    t[:, [0, 5, 62]] = 1.5
    t[0, torch.tensor([1, 2])] += 3
    return t.transpose(1, 2).unflatten(2, (9, 7))


def tokens_and_back(x: Tensor) -> Any:
    y = c(x)
    t = y.flatten(2).transpose(1, 2)
    back = t.transpose(1, 2).unflatten(2, (9, 7))
    back[:, :, 4].zero_()
    return y, t, c(back)


def a_view_of_the_tokens(x: Tensor) -> Any:
    y = c(x)
    y.view(2, 4, 63).add_(1) if y.is_contiguous() else y.flatten(2).add_(1)
    return y


def heads(x: Tensor) -> Any:
    y = c(x)
    q = y.flatten(2).transpose(1, 2).unflatten(2, (2, 2)).transpose(1, 2)
    q[:, 1].mul_(0.5)
    q.mul_(2)
    return F.scaled_dot_product_attention(q, q, q), y


def split_into_both_parts(x: Tensor) -> Any:
    y = c(x)
    first, rest = y.split([1, 3], 1)
    first.add_(x[:, :1])
    rest.mul_(x[:, 1:])
    return c(y) + y, first


def split_by_rows(x: Tensor) -> Any:
    y = c(x)
    upper, lower = y.split([4, 5], 2)
    upper.neg_()
    lower.copy_(x[:, :, 4:])
    return y, c(upper)


def split_by_columns(x: Tensor) -> Any:
    y = c(x)
    for part in y.chunk(3, 3):
        part.sub_(part.mean())
    return y


def split_the_batch(x: Tensor) -> Any:
    y = c(x)
    one, other = y.unbind(0)
    one.add_(other)
    other.zero_()
    return y


def split_with_numbers_of_its_own(x: Tensor) -> Any:
    y = c(x)
    for index, part in enumerate(y.tensor_split([1, 2, 6], 2)):
        part.mul_(index)
    return c(y)


def swapped_halves(x: Tensor) -> Any:
    y = c(x)
    a, b = y.chunk(2, 1)
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)
    return y


def expanded_is_read_after_a_write(x: Tensor) -> Any:
    g = c(x).mean((2, 3), keepdim=True)
    wide = g.expand(2, 4, 9, 7)
    g.mul_(2)
    return wide * x, wide


def expanded_source(x: Tensor) -> Any:
    y = torch.zeros_like(x)
    y.copy_(c(x)[:, :1].expand_as(y))
    y[:, 1:] += x[:, :1].expand(-1, 3, -1, -1)
    return y


def expanded_constant(x: Tensor) -> Any:
    row = torch.arange(7.0).expand(2, 4, 9, 7)
    y = c(x) + row
    y *= row
    return y


def strided_rows(x: Tensor) -> Any:
    y = c(x)
    y[:, :, ::2] *= 2
    y[:, :, 1::3].add_(1)
    return c(y)


def strided_columns(x: Tensor) -> Any:
    y = c(x)
    y[..., ::2], y[..., 1::2] = x[..., ::2] * 2, y[..., ::2][..., :3]
    return y


def strided_in_all(x: Tensor) -> Any:
    y = c(x)
    part = y[:, ::2, 1::2, ::3]
    part.fill_(2)
    part[..., 0] = 5
    return y, part


def strided_by_numbers(x: Tensor) -> Any:
    y = c(x).contiguous()
    y.as_strided((2, 9), (252, 7)).zero_()
    y.as_strided((5,), (3,), 4).add_(1)
    return y, c(y)


def a_row(x: Tensor) -> Any:
    y = c(x)
    z = y * 2
    y.select(2, 3).fill_(1)
    y[:, :, -1] = 0
    return y, z


def a_pixel(x: Tensor) -> Any:
    y = c(x)
    y[0, 1, 2, 3] = 100
    y[1, 0, 8, 6] += 50
    y[0, 0, 0, 0].mul_(2)
    return c(y)


def a_row_of_another_map(x: Tensor) -> Any:
    y, z = c(x), c(x) * 2
    y[:, :, 0] = z[:, :, -1]
    z[:, :, 1:3] = y[:, :, 5:7]
    return y, z


def a_diagonal(x: Tensor) -> Any:
    y = c(x)
    d = y.diagonal(0, 2, 3)
    d.zero_()
    y.diagonal(-1, 2, 3).add_(4)
    return y, d, c(y)


def a_diagonal_of_channels(x: Tensor) -> Any:
    y = c(x)
    y.diagonal(0, 1, 2).copy_(torch.ones(2, 7, 4))
    torch.diagonal(y, 1, 1, 3).mul_(3)
    return y


def windows_by_unfold(x: Tensor) -> Any:
    y = c(x)
    w = y.unfold(2, 3, 3)
    w[..., 1].mul_(2)
    y.unfold(3, 2, 2).add_(1)
    return y, w


def windows_by_reshape(x: Tensor) -> Any:
    y = c(x[:, :, :8, :6])
    w = y.unflatten(2, (4, 2)).unflatten(4, (3, 2)).permute(0, 2, 4, 3, 5, 1)
    w[:, 1:].mul_(2)
    w[..., 0].sub_(1)
    return y, w.reshape(-1, 4, 4)


def unflattened(x: Tensor) -> Any:
    y = c(x)
    part = y.unflatten(1, (2, 2)).transpose(1, 2)[:, 1]
    part[:, :1].mul_(x[:, :1])
    y.unflatten(2, (3, 3))[:, :, 1].zero_()
    return y, part


def unsqueezed(x: Tensor) -> Any:
    y = c(x)
    y.unsqueeze(2)[:, :, 0].add_(1)
    y[:, None, :, :, 3].mul_(2)
    y.unsqueeze(0).squeeze(0)[:, 0] = 0
    return y


def a_view_of_a_view_of_a_view(x: Tensor) -> Any:
    y = c(x)
    y[1:].permute(0, 2, 3, 1)[..., 1:3].transpose(1, 2).narrow(1, 2, 3).select(2, 4).add_(10)
    return y


def a_view_that_outlives_its_map(x: Tensor) -> Any:
    y = c(x)
    a, b = y[:, :3], y[:, 1:]
    del y
    a.add_(1)
    return a, b


def views_that_overlap(x: Tensor) -> Any:
    y = c(x)
    a, b = y[:, :, :6], y[:, :, 3:]
    doubled = a * 2
    a.add_(1)
    b.mul_(3)
    y.sub_(x)
    return y, a, b, doubled


def the_same_view_twice(x: Tensor) -> Any:
    y = c(x)
    a, b = y[:, 1], y[:, 1]
    a.add_(1)
    b.mul_(2)
    return a, b, y


def a_view_by_real_and_imaginary(x: Tensor) -> Any:
    y = c(x[..., :6]).contiguous().unflatten(3, (3, 2))
    z = torch.view_as_complex(y)
    z.mul_(1j)
    return y, torch.view_as_real(z).flatten(3)


def bits_of_another_type(x: Tensor) -> Any:
    y = c(x)
    y.view(torch.int32).bitwise_and_(0x7FFFFFFF)
    return y + 1


def sorted_out_by_a_mask(x: Tensor) -> Any:
    y = c(x)
    y[y > 0.3] = 0.3
    y[x < 0] *= 2
    y.masked_fill_(x.abs() < 0.1, -1.0)
    return c(y)


def a_mask_by_rows(x: Tensor) -> Any:
    y = c(x)
    rows = torch.arange(9) % 2 == 0
    y[:, :, rows] = 0
    y[:, torch.tensor([True, False, False, True])] += 1
    return y


def a_mask_of_the_batch(x: Tensor) -> Any:
    y = c(x)
    y[torch.tensor([False, True])] = x[:1]
    return y


def by_index_tensors(x: Tensor) -> Any:
    y = c(x)
    y[:, torch.tensor([3, 0])] = x[:, :2]
    y[torch.tensor([0, 1]), torch.tensor([2, 1])] = 1
    y.index_put_((torch.tensor([0]), torch.tensor([1])), torch.tensor(2.0), accumulate=True)
    return y


def by_index_operators(x: Tensor) -> Any:
    y, index = c(x), torch.tensor([2, 0])
    y.index_fill_(1, index, 0.5)
    y.index_copy_(2, index, x[:, :, :2])
    y.index_add_(3, index, x[..., :2], alpha=2)
    return y, c(y)


def by_scatter(x: Tensor) -> Any:
    y = c(x)
    index = x.argmax(1, keepdim=True)
    y.scatter_(1, index, 9.0)
    y.scatter_add_(2, index, torch.ones_like(y[:, :1]))
    y.masked_scatter_(x > 1, torch.arange(504.0))
    return y


def by_put(x: Tensor) -> Any:
    y = c(x)
    y.put_(torch.tensor([0, 7, 300]), torch.tensor([1.0, 2.0, 3.0]))
    return y * 2


# Views that are copies, and copies that are views


def contiguous_is_a_copy_in_one_format(x: Tensor) -> Any:
    y = c(x)
    z = y.contiguous()
    z.add_(1)
    return y, z


def contiguous_is_a_copy_of_what_was_permuted(x: Tensor) -> Any:
    q = c(x).permute(0, 2, 3, 1) * 1
    t = q.contiguous()
    t.add_(1)
    return q, t


def channels_last_is_a_copy_in_one_format(x: Tensor) -> Any:
    y = c(x)
    z = y.contiguous(memory_format=torch.channels_last)
    w = y.to(memory_format=torch.channels_last)
    z.add_(1)
    w.mul_(2)
    return y, z, w


def contiguous_of_one_channel_is_no_copy(x: Tensor) -> Any:
    y = c(x)[:, :1].clone()
    z = y.contiguous(memory_format=torch.channels_last)
    w = y.contiguous()
    z.add_(1)
    w.mul_(2)
    return y, z, w


def reshape_is_a_copy_or_a_view(x: Tensor) -> Any:
    y = c(x)
    one, other = y.reshape(2, -1), y.transpose(1, 2).reshape(2, -1)
    one.add_(1)
    other.mul_(3)
    return y, one, other


def flatten_is_a_copy_or_a_view(x: Tensor) -> Any:
    y = c(x)
    y.flatten(2).add_(1)
    y.flatten(1, 2).mul_(2)
    y.flatten().sub_(3)
    y.permute(0, 2, 3, 1).flatten(1, 2).neg_()
    return y


def to_is_a_copy_or_itself(x: Tensor) -> Any:
    y = c(x)
    y.to(torch.float32).add_(1)
    y.to(torch.float64).mul_(5)
    y.to(torch.float32, copy=True).mul_(7)
    y.type_as(x).mul_(3)
    y.float().sub_(1)
    y.cpu().add_(0.5)
    y.to("cpu").mul_(1.5)
    y.to(x).add_(0.25)
    return y


def dropout_that_is_off_is_no_copy(x: Tensor) -> Any:
    y = c(x)
    F.dropout(y, 0.5, training=False).sub_(2)
    nn.Identity()(y).mul_(2)
    return y


def ravel_and_its_like(x: Tensor) -> Any:
    y = c(x)
    y.ravel().add_(1)
    y.view_as(y).mul_(2)
    y.expand_as(y).sub_(1)
    y.broadcast_to(y.shape).add_(3)
    y.narrow_copy(1, 0, 2).zero_()
    y.resolve_conj().add_(1)
    y.real.mul_(2)
    y.positive().neg_()
    return y


def copies_are_no_views(x: Tensor) -> Any:
    y = c(x)
    for copy in (y.clone(), torch.cat([y]), y.flip(1), y.roll(0, 1), y.repeat(1, 1, 1, 1), y[:, [0, 1]], y + 0):
        copy.zero_()
    return y


def a_gathered_part_is_a_copy(x: Tensor) -> Any:
    y = c(x)
    y[:, torch.tensor([0])].zero_()
    y.index_select(1, torch.tensor([1])).zero_()
    y[y > 0].zero_()
    torch.take_along_dim(y, y.argsort(1), 1).zero_()
    return y


def detached_is_a_view(x: Tensor) -> Any:
    y = c(x)
    y.detach().add_(1)
    y.data.mul_(2)
    z = y.detach()
    y.sub_(3)
    return y, z


# `.data`, `set_`, dimensions exchanged in place


def data_is_replaced(x: Tensor) -> Any:
    y = c(x)
    z = y * 2
    y.data = torch.ones_like(y)
    return y + z, y


def data_is_replaced_by_a_map(x: Tensor) -> Any:
    y, z = c(x), c(c(x))
    seen = y.flatten(2)
    y.data = z
    y.add_(1)
    return y, seen


def data_of_the_argument_is_replaced(x: Tensor) -> Any:
    y = c(x)
    x.data = x * 2
    return y + x


def data_of_another_shape(x: Tensor) -> Any:
    y = c(x)
    y.data = F.avg_pool2d(y, 2)
    return y * 1


def dimensions_exchanged_in_place(x: Tensor) -> Any:
    y = c(x)
    y.transpose_(1, 2)
    y[:, 0].mul_(2)
    y.unsqueeze_(0)
    y.squeeze_(0)
    return y, y.swapaxes_(2, 3) * 1


# `out=`


def out_of_an_operator(x: Tensor) -> Any:
    y = x * 1
    z = y * 2
    torch.add(x, 1, out=y)
    return z, y


def out_into_a_part(x: Tensor) -> Any:
    y = c(x)
    torch.mul(x[:, :2], 2, out=y[:, 2:])
    torch.add(x[:, :, :1], 1, out=y[:, :, 3:4])
    return c(y)


def out_of_a_reduction(x: Tensor) -> Any:
    y, room = c(x), torch.empty(2, 1, 9, 7)
    torch.mean(y, 1, True, out=room)
    z = y * room
    torch.sum(y, 1, True, out=room)
    return z, room


def out_of_a_join(x: Tensor) -> Any:
    room = torch.zeros(2, 8, 9, 7)
    torch.cat([c(x), x], 1, out=room)
    before = room * 1
    torch.cat([x, x], 1, out=room)
    return before, c(room[:, 2:6])


def out_of_a_product(x: Tensor) -> Any:
    t = c(x).flatten(2)
    scores = torch.empty(2, 63, 63)
    torch.bmm(t.transpose(1, 2), t, out=scores)
    scores.mul_(0.1)
    return torch.bmm(t, scores.softmax(-1))


def out_of_what_gives_several(x: Tensor) -> Any:
    y = c(x)
    values, places = torch.empty(2, 9, 7), torch.empty(2, 9, 7, dtype=torch.long)
    torch.max(y, 1, out=(values, places))
    return values, places, y + values[:, None]


def out_that_is_an_operand(x: Tensor) -> Any:
    y = c(x)
    torch.sub(y, y.mean(1, keepdim=True), out=y)
    torch.mul(y, y, out=y)
    return y


# `out=` of another shape, which takes the result's


def out_of_nothing(x: Tensor) -> Any:
    y = c(x)
    room, other = y.new_empty(0), y.new_empty(0)
    torch.add(y, 1, out=room)
    return y, room, torch.mul(room, 2, out=other) is other, room.shape, c(other)


def out_of_nothing_of_joins(x: Tensor) -> Any:
    y = c(x)
    beside, behind = x.new_empty(0), torch.empty_like(y[:0])
    torch.cat([y, x], 1, out=beside)
    torch.stack([y, x], out=behind)
    return beside, behind.sum(0), c(beside[:, 2:6])


def out_of_nothing_that_is_a_part(x: Tensor) -> Any:
    y = c(x)
    before, part = y * 1, y[:1, :0]
    torch.add(y, 1, out=part)
    return before, y, part, y + part


def out_of_nothing_in_the_middle(x: Tensor) -> Any:
    y = c(x)
    part = y[1:, 2:, :0]
    torch.mul(x, 2, out=part)
    part.add_(1)
    return y, part


def out_of_nothing_of_several(x: Tensor) -> Any:
    y = c(x)
    values, places = y.new_empty(0), y.new_empty(0, dtype=torch.long)
    torch.max(y, 1, out=(values, places))
    return values, places, y + values[:, None]


def out_of_too_little(x: Tensor) -> Any:
    y = c(x)
    room = y.new_zeros(1, 3)
    part = room[:, :2]
    torch.add(y, 1, out=room)
    return y, room, part + 1


def out_of_too_much(x: Tensor) -> Any:
    y = c(x)
    before = y * 2
    torch.sum(x, 1, out=y)
    return before, y, y * 2


def out_of_the_argument(x: Tensor) -> Any:
    y = c(x)
    torch.mul(y[:, :2], 2, out=x)
    return y, x + 1


def out_of_nothing_by_another_layout(x: Tensor) -> Any:
    y = c(x).contiguous(memory_format=torch.channels_last)
    return torch.add(y, 1, out=y.new_empty(0)), torch.add(y, 1, out=y[:0])


def resized(x: Tensor) -> Any:
    y = c(x)
    y.resize_(2, 2).add_(1)
    x.resize_(3, 2)
    return y, x.resize_as_(torch.empty(2, 2)).mul_(2)


def data_in_its_own_shape(x: Tensor) -> Any:
    y = c(x)
    y.data = part = torch.cat([y.flatten() * 2, y.new_ones(3)])[: y.numel()].view_as(y)
    part.add_(1)
    return y + (1 + 2j), part.expand_as(y) * 2


def turned_once_it_is_ordinary(x: Tensor) -> Any:
    """Whose gradients, or memory, were asked for: the caller's own object is turned too."""
    y = c(x)
    x.requires_grad_(False)
    x.swapaxes_(1, 2)
    return y, x.unsqueeze_(0)


def shortened_once_it_has_other_memory(x: Tensor) -> Any:
    y = c(x)
    x.data = torch.cat([x.flatten(), x.new_ones(3)])
    x.resize_(2, 2)
    return y, x


@KEPT_ARE_ORDINARY
@pytest.mark.filterwarnings("ignore:An output with one or more elements")
@crossed(
    2,
    function=[
        out_of_nothing, out_of_nothing_of_joins, out_of_nothing_that_is_a_part, out_of_nothing_in_the_middle,
        out_of_nothing_of_several, out_of_too_little, out_of_too_much, out_of_the_argument,
        out_of_nothing_by_another_layout, resized, data_in_its_own_shape, turned_once_it_is_ordinary,
        shortened_once_it_has_other_memory,
    ],
    tuning=TUNINGS,
    mode=MODES,
    memory_format=FORMATS,
)  # fmt: skip
def test_what_an_operator_writes_to_takes_its_shape(
    function: Function, tuning: Tuning, mode: Mode, memory_format: torch.memory_format
) -> None:
    assert_as_eager(function, a_map(memory_format), tuning=tuning, mode=mode)


@pytest.mark.skipif(not KEPT_STAY_LAZY, reason="this torch can make an ordinary tensor of a deferred one")
def test_a_torch_that_changes_no_shapes_says_so() -> None:
    with pytest.raises(RuntimeError, match="in a streamed call with this torch"):
        streamed(out_of_nothing, tuning=FEW_ROWS)(a_map())


# Views of memory by numbers, whatever the view shows that they are asked of


def strided_from_a_part(x: Tensor) -> Any:
    y = F.relu(c(x))
    return y[:, 1:].as_strided((2, 3), (3, 1), 0) * 1, y[1, 2:].as_strided((2, 3), (3, 1)) * 1, y


def strided_from_a_row(x: Tensor) -> Any:
    y = F.relu(c(x))
    return y[0, :, 3:].as_strided((3, 5), (7, 1)) * 1, y[:, :, 3:5, 2].as_strided((6, 63), (63, 1), 63) + 1


def strided_beyond_what_is_shown(x: Tensor) -> Any:
    y = c(x)
    return y[0, 0, 0].as_strided((504,), (1,)).sum(), torch.as_strided(y[0, 3], (2, 4), (200, 2), 290) * 2


def strided_from_what_is_permuted(x: Tensor) -> Any:
    y = c(x).permute(0, 2, 3, 1)
    return y.as_strided((2, 9, 7), (252, 1, 9)) * 1, y.flatten(2).as_strided((4, 5), (3, 2), 7) * 1


def strided_of_what_is_strided(x: Tensor) -> Any:
    y = c(x)[:, 1:]
    windows = y.as_strided((2, 3, 6, 5), (100, 60, 2, 1), 40)
    return windows * 1, windows[:, 1:].as_strided((4, 4), (4, 1)) * 1, windows[1].as_strided((3,), (9,), 2) * 1


def strided_once_it_is_written(x: Tensor) -> Any:
    y = c(x)
    part, t = y[:, 1:], y.permute(0, 2, 3, 1)
    seen = part.as_strided((40, 4), (5, 1), 3)
    t[..., :2].mul_(2)
    before = seen * 1
    y.add_(1)
    y.permute(3, 0, 1, 2)[2].zero_()
    return before, seen * 1, part.as_strided((40, 4), (5, 1)) * 1


def strided_and_written(x: Tensor) -> Any:
    y = c(x)
    before = y * 1
    y[:, 1:].as_strided((2, 9), (252, 7), 1).zero_()
    y[1, 2].as_strided((5,), (3,)).add_(1)
    y[1:].as_strided((5,), (3,), 4).copy_(y[0, 0, 0, :5] * 1)
    return before, y, c(y)


def strided_with_the_argument(x: Tensor) -> Any:
    seen = x[:, 1:].as_strided((3, 4), (4, 1)) * 1
    x[1].as_strided((5,), (3,)).add_(1)
    return seen, c(x)


def strided_copies(x: Tensor) -> Any:
    y = c(x)[:, 1:]
    written = torch.as_strided_scatter(y, torch.ones(3, 4), (3, 4), (9, 1), 80)
    return torch.as_strided_copy(y, (2, 3), (3, 1), 2), written, written * 1


def strided_bits(x: Tensor) -> Any:
    bits = c(x).mul(0).add(x)[:, 2:].view(torch.int32)
    return bits.as_strided((4, 4), (4, 1)) + 1, bits[1].as_strided((3,), (2,), 5) * 1


def strided_in_place(x: Tensor) -> Any:
    y = c(x)
    part = y[:, 1:]
    part.as_strided_((4, 5), (5, 1))
    y.mul_(2)
    return part * 1, y


def memory_that_is_set(x: Tensor) -> Any:
    y = c(x)
    z: Any = torch.empty(0)
    z.set_(y[1:, 1:])
    y.mul_(2)
    return z * 1


def windows_of_a_part(x: Tensor) -> Any:
    y = c(x)
    windows = y[:, 1:, 2:].unfold(2, 3, 2)[:, :, 1:].unfold(3, 2, 2)
    before = windows * 1
    y[:, 1:, 2:].unfold(3, 2, 3)[..., 1].mul_(3)
    return before, windows * 1


@crossed(
    2,
    function=[
        strided_from_a_part, strided_from_a_row, strided_beyond_what_is_shown, strided_from_what_is_permuted,
        strided_of_what_is_strided, strided_once_it_is_written, strided_and_written, strided_with_the_argument,
        strided_copies, strided_bits, strided_in_place, memory_that_is_set, windows_of_a_part,
    ],
    tuning=TUNINGS,
    mode=MODES,
    memory_format=FORMATS,
)  # fmt: skip
def test_a_view_by_numbers_is_one_of_all_memory(
    function: Function, tuning: Tuning, mode: Mode, memory_format: torch.memory_format
) -> None:
    assert_as_eager(function, a_map(memory_format), tuning=tuning, mode=mode)
    if memory_format is torch.contiguous_format:
        assert_as_eager(function, a_map(memory_format), tuning=tuning, mode=mode, budget=1)


# Operands written after use


def an_operand_written_after_use(x: Tensor) -> Any:
    bias, other = torch.zeros(1, 4, 1, 1), torch.ones(2, 4, 9, 7)
    y = c(x) + bias + other
    bias.add_(1)
    other.mul_(10)
    return y, y * other


def a_parameter_written_after_use(x: Tensor) -> Any:
    w = nn.Parameter(torch.ones(4, 4, 3, 3) / 9, requires_grad=False)
    t = F.conv2d(x, w, padding=1)
    w.mul_(2)
    return t, F.conv2d(x, w, padding=1)


def an_index_written_after_use(x: Tensor) -> Any:
    index = torch.tensor([3, 1])
    y = c(x)[:, index]
    index.zero_()
    return y * 2, index


def a_mask_written_after_use(x: Tensor) -> Any:
    mask = torch.arange(7) > 3
    y = torch.where(mask, c(x), x).masked_fill(mask, 2.0)
    mask.logical_not_()
    return y * mask


def a_grid_written_after_use(x: Tensor) -> Any:
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 7), indexing="ij")[::-1], -1)
    grid = grid.expand(2, 9, 7, 2).clone()
    y = F.grid_sample(c(x), grid, align_corners=True)
    grid.zero_()
    return y + c(x)


def a_scalar_written_after_use(x: Tensor) -> Any:
    s = torch.tensor(2.0)
    y = c(x) * s
    s.fill_(3)
    return y, y + s


def an_attention_mask_written_after_use(x: Tensor) -> Any:
    t = c(x).flatten(2).transpose(1, 2)
    mask = torch.zeros(63, 63).masked_fill(torch.ones(63, 63).triu(1).bool(), -torch.inf)
    y = F.scaled_dot_product_attention(t, t, t, mask)
    mask.zero_()
    return y


def the_argument_written_after_use(x: Tensor) -> Any:
    y = c(x)
    x.add_(1)
    return y + x


def a_part_of_the_argument_written_after_use(x: Tensor) -> Any:
    y = c(x)
    x[:, 1:3] = y[:, :2]
    x.permute(0, 2, 3, 1)[..., 0].zero_()
    return x * 2, y


def the_argument_through_its_view(x: Tensor) -> Any:
    t = x.flatten(2).transpose(1, 2)
    y = c(x)
    t[:, 0] = 0
    return y, c(x)


def a_map_written_between_two_readers(x: Tensor) -> Any:
    y = c(x)
    one = F.group_norm(y, 2)
    y.add_(1)
    other = F.group_norm(y, 2)
    y.mul_(2)
    return one, other, y, c(y)


def a_map_written_while_its_mean_is_wanted(x: Tensor) -> Any:
    y = c(x)
    mean = y.mean((2, 3), keepdim=True)
    y.sub_(mean)
    again = y.square().mean((2, 3), keepdim=True)
    y.div_((again + 1e-5).sqrt_())
    return y, mean, again


def a_map_written_by_what_reads_it(x: Tensor) -> Any:
    y = c(x)
    y += c(y)
    y *= y.sigmoid()
    y.copy_(y.flip(2))
    return y


def a_list_of_maps_at_once(x: Tensor) -> Any:
    maps = [c(x), x * 2, c(c(x))]
    torch._foreach_mul_(maps, 0.5)  # type: ignore[reportPrivateImportUsage]
    torch._foreach_add_(maps, [x, x, x])  # type: ignore[reportPrivateImportUsage]
    return maps


# Maps that are filled


def a_made_map_part_by_part(x: Tensor) -> Any:
    y = torch.empty_like(x)
    y[:, :1], y[:, 1:] = x[:, -1:] * 2, c(x)[:, :3]
    return c(y)


def a_made_map_row_by_row(x: Tensor) -> Any:
    y, source = torch.empty_like(x), c(x)
    for row in range(9):
        y[:, :, row] = source[:, :, 8 - row] * row
    return y


def an_accumulator(x: Tensor) -> Any:
    total, count = torch.zeros(2, 4, 12, 7), torch.zeros(1, 1, 12, 1)
    for top in (0, 3):
        total[:, :, top : top + 9] += c(x)
        count[:, :, top : top + 9] += 1
    return total / count


def a_buffer_of_tiles_blended(x: Tensor) -> Any:
    tiles = [c(x[:, :, top : top + 5]) for top in (0, 4)]
    for row in range(2):
        tiles[1][:, :, row] = tiles[0][:, :, row + 3] * (1 - row / 2) + tiles[1][:, :, row] * (row / 2)
    return torch.cat([tiles[0][:, :, :3], tiles[1]], 2)


def a_ring_of_frames(x: Tensor) -> Any:
    ring, given = torch.zeros(3, 2, 4, 9, 7), []
    for step in range(5):
        ring[step % 3] = c(x) * step
        given.append(ring.mean(0))
    return given, ring


def another_type(x: Tensor) -> Any:
    y = torch.empty(2, 4, 9, 7, dtype=torch.float64)
    y[:, :1], y[:, 1:] = x[:, :1], c(x)[:, :3]
    z = torch.zeros(2, 4, 9, 7, dtype=torch.int32)
    z.copy_(torch.where(c(x) > 0.2, 3.7, -1.2))
    return y, z


def zeroed_before_it_is_read(x: Tensor) -> Any:
    y = c(x)
    y.zero_()
    y += x
    z = c(x).fill_(2)
    return y, z + 1


def inplace_activations(x: Tensor) -> Any:
    y = F.silu(c(x), inplace=True)
    before = y * 1
    F.relu_(y)
    F.leaky_relu(y[:, 2:], 0.1, inplace=True)
    nn.Hardtanh(-0.5, 0.5, inplace=True)(y[:, :, 2:4])
    return y, before


def arithmetic_in_place(x: Tensor) -> Any:
    y = c(x)
    y.lerp_(x, 0.3).addcmul_(x, x, value=0.2).addcdiv_(x, x.abs() + 1).clamp_(-2, 2)
    y.sub_(x, alpha=2).pow_(2).sqrt_().nan_to_num_()
    y[:, :2].atan2_(x[:, :2].abs() + 1)
    return y


def booleans_in_place(x: Tensor) -> Any:
    m = c(x) > 0
    n = m.clone()
    m[:, 0] = True
    m.logical_and_(x > 0)
    m |= n
    return m, torch.where(m, x, 0.0)


def a_sum_in_place_over_a_broadcast(x: Tensor) -> Any:
    y = c(x)
    y += x.mean((0, 2, 3)).view(4, 1, 1)
    y[:, :, :, 1:] -= x[:, :, :, :1]
    y[...] *= torch.linspace(0, 1, 9)[:, None]
    return y


def the_whole_is_assigned(x: Tensor) -> Any:
    y, z = c(x), c(x) * 2
    y[:] = z
    z[...] = 1
    return y, z


def noise_in_place(x: Tensor) -> Any:
    y = c(x)
    y[:, :2].normal_()
    y.permute(0, 2, 3, 1)[..., 3].uniform_()
    y[:, :, 1].bernoulli_(0.5)
    return y


def cumulated_in_place(x: Tensor) -> Any:
    y = c(x)
    y.cumsum_(2)
    y[:, 1:].cumprod_(1)
    return c(y)


def scores_scaled_in_place(x: Tensor) -> Any:
    t = c(x).flatten(2)
    scores = torch.bmm(t.transpose(1, 2), t)
    turned = scores.transpose(1, 2)
    scores *= 0.1
    scores -= scores.amax(-1, keepdim=True)
    scores[:, 5].zero_()
    return torch.bmm(t, turned.softmax(1)), scores


def frames_of_a_video(x: Tensor) -> Any:
    v = torch.stack([c(x), x, x * 2], 2)
    v[:, :, 0].mul_(2)
    first, _, last = v.unbind(2)
    last.copy_(first)
    v.select(2, 1).add_(5)
    v.transpose(1, 2).flatten(0, 1)[1].zero_()
    return v, F.conv3d(v, torch.ones(2, 4, 2, 3, 3), padding=(0, 1, 1))


def pixels_shuffled_and_written(x: Tensor) -> Any:
    y = F.pixel_shuffle(c(x), 2)
    y[..., ::2].add_(1)
    z = F.pixel_unshuffle(y, 2)
    z[:, 1].zero_()
    return y, z


def padding_written(x: Tensor) -> Any:
    y = F.pad(c(x), (1, 1, 2, 2))
    y[:, :, :2], y[:, :, -2:] = y[:, :, 2:4], y[:, :, -4:-2]
    return F.conv2d(y, WEIGHT)


def a_crop_written_into_the_padded(x: Tensor) -> Any:
    y = torch.zeros(2, 4, 13, 11)
    y[:, :, 2:-2, 2:-2] = c(x)
    y[:, :, 2:-2, 2:-2].mul_(2)
    return c(y)[:, :, 2:-2, 2:-2]


FUNCTIONS: list[Function] = [
    permuted, permuted_and_normed, permuted_with_the_batch, a_token, a_token_of_what_is_kept, tokens_by_a_list,
    tokens_and_back, a_view_of_the_tokens, heads, split_into_both_parts, split_by_rows, split_by_columns,
    split_the_batch, split_with_numbers_of_its_own, swapped_halves, expanded_is_read_after_a_write, expanded_source,
    expanded_constant, strided_rows, strided_columns, strided_in_all, strided_by_numbers, a_row, a_pixel,
    a_row_of_another_map, a_diagonal, a_diagonal_of_channels, windows_by_unfold, windows_by_reshape, unflattened,
    unsqueezed, a_view_of_a_view_of_a_view, a_view_that_outlives_its_map, views_that_overlap, the_same_view_twice,
    a_view_by_real_and_imaginary, bits_of_another_type, sorted_out_by_a_mask, a_mask_by_rows, a_mask_of_the_batch,
    by_index_tensors, by_index_operators, by_scatter, by_put, contiguous_is_a_copy_in_one_format,
    contiguous_is_a_copy_of_what_was_permuted, channels_last_is_a_copy_in_one_format,
    contiguous_of_one_channel_is_no_copy, reshape_is_a_copy_or_a_view, flatten_is_a_copy_or_a_view,
    to_is_a_copy_or_itself, dropout_that_is_off_is_no_copy, ravel_and_its_like, copies_are_no_views,
    a_gathered_part_is_a_copy, detached_is_a_view, data_is_replaced, data_is_replaced_by_a_map,
    data_of_the_argument_is_replaced, data_of_another_shape, dimensions_exchanged_in_place, out_of_an_operator,
    out_into_a_part, out_of_a_reduction, out_of_a_join, out_of_a_product, out_of_what_gives_several,
    out_that_is_an_operand, an_operand_written_after_use, a_parameter_written_after_use, an_index_written_after_use,
    a_mask_written_after_use, a_grid_written_after_use, a_scalar_written_after_use,
    an_attention_mask_written_after_use, the_argument_written_after_use, a_part_of_the_argument_written_after_use,
    the_argument_through_its_view, a_map_written_between_two_readers, a_map_written_while_its_mean_is_wanted,
    a_map_written_by_what_reads_it, a_list_of_maps_at_once, a_made_map_part_by_part, a_made_map_row_by_row,
    an_accumulator, a_buffer_of_tiles_blended, a_ring_of_frames, another_type, zeroed_before_it_is_read,
    inplace_activations, arithmetic_in_place, booleans_in_place, a_sum_in_place_over_a_broadcast,
    the_whole_is_assigned, noise_in_place, cumulated_in_place, scores_scaled_in_place, frames_of_a_video,
    pixels_shuffled_and_written, padding_written, a_crop_written_into_the_padded,
]  # fmt: skip


@crossed(2, function=FUNCTIONS, tuning=TUNINGS, memory_format=FORMATS, mode=MODES)
def test_a_write_is_seen_by_whom_eager_has_see_it(
    function: Function, tuning: Tuning, memory_format: torch.memory_format, mode: Mode
) -> None:
    assert_as_eager(function, a_map(memory_format), tuning=tuning, mode=mode)


@pytest.mark.parametrize(
    "function",
    [dimensions_exchanged_in_place, data_of_another_shape, data_of_the_argument_is_replaced, detached_is_a_view,
     strided_in_place, lambda x: c(c(x).resize_(1, 4, 9, 7))],
)  # fmt: skip
@pytest.mark.parametrize("inference", [False, True])
def test_an_object_changes_its_shape_where_torch_makes_no_other_of_it(
    function: Any, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before torch 2.3, where it stays a deferred one."""
    monkeypatch.delattr(torch._C, "_swap_tensor_impl", raising=False)
    x = torch.randn(2, 4, 9, 7)
    with torch.inference_mode(inference), torch.no_grad():
        expected, actual = function(x.clone()), streamed(function, tuning=FEW_ROWS)(x.clone())
    for ours, eager in zip(*((one if isinstance(one, tuple) else (one,)) for one in (actual, expected)), strict=True):
        assert ours.shape == eager.shape
        torch.testing.assert_close(ours.as_subclass(Tensor), eager, rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_write_is_right_within_a_budget_and_at_a_second_call(function: Function) -> None:
    assert_as_eager(function, a_map(), budget=1, calls=2)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_write_is_right_in_what_is_a_part_of_other_memory(function: Function) -> None:
    """The input is a slice of a larger tensor, with strides of its own."""
    room = a_map(torch.contiguous_format, 3, 5, 11, 10)
    assert_as_eager(function, room[1:, 1:, 1:10, 3:])


def aliased(x: Tensor, y: Tensor) -> Any:
    z = c(x)
    x.add_(1)
    y.flatten(2)[..., 0] = 0
    return z + y[:, :4], c(x)


def aliased_and_permuted(x: Tensor, y: Tensor) -> Any:
    z = c(x)
    y.mul_(2)
    return z, c(x), y * 1


def parts(shape: tuple[int, ...], *indices: Any) -> tuple[Tensor, ...]:
    whole = a_map(torch.contiguous_format, *shape)
    return tuple(whole[index] for index in indices)


def with_a_view(view: Function) -> tuple[Tensor, ...]:
    x = a_map()
    return x, view(x)


ALL = slice(None)
PAIRS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = {
    "the same tensor twice": (aliased, lambda: with_a_view(lambda x: x)),
    "parts that overlap": (aliased, lambda: parts((2, 5, 9, 7), (ALL, slice(0, 4)), (ALL, slice(1, 5)))),
    "a view with dimensions exchanged": (aliased_and_permuted, lambda: with_a_view(lambda x: x.transpose(2, 3))),
    "a flat view": (aliased_and_permuted, lambda: with_a_view(lambda x: x.view(-1)[5:50])),
    "rows of one another": (
        aliased_and_permuted,
        lambda: parts((2, 4, 13, 7), (ALL, ALL, slice(0, 9)), (ALL, ALL, slice(4, 13))),
    ),
}


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("name", PAIRS)
def test_arguments_that_share_memory_see_each_others_writes(name: str, tuning: Tuning) -> None:
    function, arguments = PAIRS[name]
    assert_as_eager(function, *arguments(), tuning=tuning)


@torch.jit.script
def scripted_rows(y: Tensor) -> Tensor:
    y[:, :, 0] = 0
    return y * 2


@torch.jit.script
def scripted_in_place(y: Tensor) -> Tensor:
    y.relu_()
    y += 1
    return y[:, 1:].mul_(2)


class MarkedAsWritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        return y.relu_()


def written_by_a_script(x: Tensor) -> Any:
    y = c(x)
    return scripted_rows(y), scripted_in_place(y), y


def written_by_a_function_with_a_gradient(x: Tensor) -> Any:
    y = c(x)
    return MarkedAsWritten.apply(y), y


def memory_of_another(x: Tensor) -> Any:
    y = c(x)
    return torch.empty_like(y).set_(y).mul_(2), y  # type: ignore[reportArgumentType]


def version(x: Tensor) -> Any:
    return x * c(x).is_inference() + c(x)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    "function", [written_by_a_script, written_by_a_function_with_a_gradient, memory_of_another, version]
)
def test_what_writes_past_functions_is_seen(function: Any, mode: Mode) -> None:
    assert_as_eager(function, a_map(), mode=mode)


def meshed(x: Tensor) -> Any:
    y = c(x)
    one, other = torch.meshgrid(y[0, 0, 0], y[0, 0, 1], indexing="ij")
    y.mul_(3)
    return one * 1, other * 1, one.stride()


def broadcast(x: Tensor) -> Any:
    y = c(x)
    one, other = torch.broadcast_tensors(y, y[:, :1])
    y.mul_(3)
    with pytest.raises(RuntimeError, match="single memory location"):
        other.add_(1)
    return one * 1, other * 1, other.stride()


def diagonal_by_einsum(x: Tensor) -> Any:
    y = c(x)
    torch.einsum("ii->i", y[0, 0, :7]).add_(1)
    return y


def at_least(x: Tensor) -> Any:
    y = c(x)
    one, other = torch.atleast_3d(y[0, 0], y[0, 1])  # type: ignore[reportGeneralTypeIssues]
    one.mul_(2)
    return one * 1, other * 1, y


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("function", [meshed, broadcast, diagonal_by_einsum, at_least])
def test_several_results_share_the_memory_of_what_they_show(function: Any, mode: Mode) -> None:
    assert_as_eager(function, a_map(), mode=mode)


def test_a_write_that_eager_refuses_is_refused() -> None:
    def through_expanded(x: Tensor) -> Tensor:
        y = c(x)[:, :1].expand(2, 4, 9, 7)
        with pytest.raises(RuntimeError, match="single memory location"):
            y.add_(1)
        return y * 2

    def onto_itself(x: Tensor) -> Tensor:
        y = c(x)
        with pytest.raises(RuntimeError):
            y[:, 1:].add_(y.transpose(2, 3)[:, 1:])
        return y

    def of_another_type(x: Tensor) -> Tensor:
        counts = torch.zeros(2, 4, 9, 7, dtype=torch.long)
        with pytest.raises(RuntimeError):
            counts += c(x)
        return c(x) + counts

    for function in (through_expanded, onto_itself, of_another_type):
        assert_as_eager(function, a_map())


@pytest.mark.parametrize("steps", [30, 1500])
def test_a_long_chain_of_writes_through_views_is_right(steps: int) -> None:
    def run(x: Tensor) -> Tensor:
        y = c(x)
        for step in range(steps):
            y[:, step % 4, step % 9].mul_(0.5).add_(step % 3)
        return c(y)

    assert_as_eager(run, a_map(), tuning=FEW_ROWS)
