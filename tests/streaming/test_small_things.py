"""Small things that are easily wrong: empty maps, odd arguments, infinities, operands that broadcast, gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from products import crossed
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Tuning, streamed

from .comparing import (
    FEW_ROWS,
    MODES,
    ONE_ROW,
    TUNINGS,
    Mode,
    Progress,
    assert_alike,
    assert_as_eager,
    skip_without_convolutions,
)

WEIGHT = nn.Parameter(torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 6, requires_grad=False)
X = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(2))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Function = Callable[[Tensor], Any]
loose: Any = F  # odd arguments are what is tested
attend: Any = F.scaled_dot_product_attention


def c(x: Tensor) -> Tensor:
    return F.conv2d(x, WEIGHT.to(x.dtype), padding=1)


def w(*shape: int) -> Tensor:
    """Seeded values for the weights of an operator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(2, count, 4 // count, -1).transpose(2, 3)


def picked_and_changed(y: Tensor) -> Tensor:
    index = torch.tensor([2, 1, 0, 3])
    picked = y[:, index]
    index.fill_(0)
    return picked + y[:, index]


def or_raised(function: Callable[[], Tensor]) -> Any:
    try:
        return function()
    except IndexError as error:
        return torch.tensor(len(str(error)))


def written_real(z: Tensor) -> Tensor:
    z.real.mul_(3)
    return z


# Each is a function of a map of 2 x 4 x 9 x 7, deferred or not.

SMALL: dict[str, Function] = {
    # complex maps
    "real part": lambda x: torch.complex(c(x), c(x) * 2).real,
    "conjugate": lambda x: torch.view_as_real(torch.complex(c(x), c(x) * 2).conj().resolve_conj()),
    "write to the real part": lambda x: torch.view_as_real(written_real(torch.complex(c(x), c(x) * 2))),
    "spectrum": lambda x: torch.fft.fft2(c(x)).real * 1.0,
    "conjugate of a real map": lambda x: c(x).conj().real * 2,
    # paddings
    "padding that keeps the size": lambda x: F.conv2d(c(x), w(5, 4, 3, 2), padding="same"),
    "no padding by name": lambda x: F.conv2d(c(x), w(5, 4, 3, 2), padding="valid"),
    "pad by nothing": lambda x: F.pad(c(x), ()) * 1,
    "pad by zeros": lambda x: F.pad(c(x), (0, 0, 0, 0)) * 1,
    "pad one side": lambda x: F.pad(c(x), (0, 1)),
    "pad by a list": lambda x: c(F.pad(c(x), [1, 2, 3, 4])),
    "pad negatively": lambda x: c(F.pad(c(x), (-1, 2, -3, 1))),
    "pad down to nothing but one row": lambda x: c(F.pad(c(x), (0, 0, -4, -4))),
    "pad channels": lambda x: F.pad(c(x), (0, 0, 0, 0, 1, 2)),
    "pad channels down": lambda x: c(F.pad(F.pad(c(x), (1, 1, 1, 1, 2, 0)), (0, 0, 0, 0, -2, 0))),
    "pad the batch": lambda x: F.pad(c(x), (1, 1, 0, 0, 0, 0, 1, 0)),
    "pad with infinity": lambda x: F.max_pool2d(F.pad(c(x), (1, 1, 1, 1), value=-torch.inf), 3, 1),
    "pad with NaN": lambda x: F.pad(c(x), (0, 0, 1, 0), value=torch.nan),
    "pad booleans": lambda x: F.pad(c(x) > 0, (1, 1, 1, 1), value=True),
    "pad widely by reflection": lambda x: c(F.pad(c(x), (6, 6, 8, 8), "reflect")),
    "pad widely around": lambda x: c(F.pad(c(x), (7, 7, 9, 9), "circular")),
    "pad widely by repeating": lambda x: c(F.pad(c(x), (20, 0, 0, 20), "replicate")),
    "pad by a module": lambda x: nn.ZeroPad2d((1, 0, 2, 0))(nn.ReflectionPad2d(1)(c(x))),
    "pad tokens": lambda x: F.pad(c(x).flatten(2), (1, 1), "replicate"),
    # repetitions and choices
    "channels by a list": lambda x: c(c(x)[:, [2, 1, 0, 3]]),
    "channels by a tensor that changes": lambda x: picked_and_changed(c(x)),
    "channels by a mask": lambda x: c(x)[:, torch.tensor([True, False, True, True])] * 2,
    "columns by a list": lambda x: c(x)[..., [3, -1, 0]] * 2,
    "rows by a list": lambda x: c(x)[:, :, [5, 1, 1]] * 2,
    "places by two lists": lambda x: c(x)[:, [0, 2], [1, 3]] * 2,
    "places far apart by two lists": lambda x: c(x)[[0], :, [1]] * 2,
    "channels by a table": lambda x: c(x)[:, torch.tensor([[0, 1], [2, 3]])] * 2,
    "channels that are not there": lambda x: or_raised(lambda: c(x)[:, [4]]),
    "repeat_interleave by a tensor": lambda x: torch.repeat_interleave(c(x), torch.tensor([1, 2, 0, 3]), dim=1) * 2,
    "repeat_interleave of rows by a tensor": lambda x: c(x).repeat_interleave(torch.arange(9) % 3, 2),
    "repeat_interleave with its size": lambda x: torch.repeat_interleave(c(x), torch.tensor([2, 1]), 0, output_size=3),
    "repeat_interleave of all": lambda x: c(x).repeat_interleave(2),
    "repeat_interleave of counts": lambda x: c(x)[:, :, torch.repeat_interleave(torch.tensor([1, 0, 2]))],
    "repeat_interleave by nothing": lambda x: c(x).repeat_interleave(torch.zeros(4, dtype=torch.long), 1).sum(),
    "repeat with more dimensions": lambda x: c(x).repeat(2, 1, 1, 1, 3),
    "tile": lambda x: c(x).tile((2, 1)),
    "roll by rows": lambda x: c(c(x).roll((2, -3), (2, 3))),
    "roll of all": lambda x: c(x).roll(5),
    "an empty choice": lambda x: c(x)[:, []].sum() + c(x)[:, :0].sum() + c(x)[..., 3:3].sum(),
    "no split": lambda x: c(x).split([0, 4, 0], 1)[1] * 2,
    "an index that repeats": lambda x: c(c(x)[:, :, [0, 0, 8, 8, 3]]),
    "a negative index": lambda x: c(x)[:, -1],
    "an index of None": lambda x: c(x)[None, :, None, ..., None] * 2,
    "an index by a boolean": lambda x: c(x)[True].sum() + c(x)[False].sum(),
    "an index by a number tensor": lambda x: c(x)[:, torch.tensor(2)] + c(x)[:, :, torch.tensor(-1)].unsqueeze(2)[:, 0],
    # attention
    "heads that broadcast": lambda x: attend(heads(c(x), 4), heads(x, 4), heads(c(x), 4)),
    "values of one head": lambda x: attend(heads(c(x), 2), heads(x, 2), c(x).flatten(2).transpose(1, 2)[:, None]),
    "keys of one head": lambda x: attend(heads(c(x), 2), c(x)[:, :2].flatten(2).transpose(1, 2)[:, None], heads(x, 2)),
    "queries of one head": lambda x: attend(c(x)[:, :2].flatten(2).transpose(1, 2)[:, None], heads(x, 2), heads(x, 2)),
    "a batch of keys that broadcasts": lambda x: attend(heads(c(x), 2), heads(x, 2)[:1], heads(x, 2)[:1]),
    "values of another width": lambda x: attend(
        heads(c(x), 2), heads(x, 2), heads(x, 4)[..., :1].repeat(1, 1, 1, 3)[:, :2]
    ),
    "queries without heads": lambda x: attend(
        c(x).flatten(2).transpose(1, 2), x.flatten(2).transpose(1, 2), x.flatten(2).transpose(1, 2)
    ),
    "queries of one sample": lambda x: attend(c(x)[0].flatten(1).t(), x[0].flatten(1).t(), x[0].flatten(1).t()),
    "queries of five dimensions": lambda x: attend(*[heads(c(x), 2)[None] * n for n in (1, 2, 3)]),
    "a causal attention": lambda x: attend(*[heads(c(x), 2)] * 3, is_causal=True),
    "a mask that broadcasts": lambda x: attend(*[heads(c(x), 2)] * 3, attn_mask=w(63, 63)),
    "a mask of a row": lambda x: attend(*[heads(c(x), 2)] * 3, attn_mask=w(2, 1, 1, 63)),
    "a mask of booleans": lambda x: attend(*[heads(c(x), 2)] * 3, attn_mask=torch.ones(63, 63).tril().bool()),
    "a mask that depends on the map": lambda x: attend(
        *[heads(c(x), 2)] * 3, attn_mask=c(x).flatten(2).mean(1)[:, None, None] * 3
    ),
    "a mask that hides all but one": lambda x: attend(*[heads(c(x), 2)] * 3, attn_mask=torch.eye(63).bool()),
    "a scale": lambda x: attend(*[heads(c(x), 2)] * 3, scale=2.0),
    "few keys": lambda x: attend(heads(c(x), 2), w(2, 2, 5, 2), w(2, 2, 5, 2)),
    "one key": lambda x: attend(heads(c(x), 2), w(2, 2, 1, 2), w(2, 2, 1, 2)),
    "few queries": lambda x: attend(w(2, 2, 5, 2), heads(c(x), 2), heads(c(x), 2)),
    "queries of rows": lambda x: attend(*[c(x).permute(0, 2, 3, 1)] * 3),
    "queries of columns": lambda x: attend(*[c(x).permute(0, 3, 2, 1)] * 3),
    "queries of pixels": lambda x: attend(*[c(x).permute(0, 2, 3, 1).unsqueeze(3).expand(-1, -1, -1, 3, -1)] * 3),
    "channels that attend": lambda x: attend(*[c(x).flatten(2)] * 3),
    "attention by hand": lambda x: (
        torch.softmax(heads(c(x), 2) @ heads(x, 2).transpose(-1, -2) * 0.5, -1) @ heads(x, 2)
    ),
    "attention by hand over the other side": lambda x: (
        heads(x, 2).transpose(-1, -2) @ torch.softmax(heads(c(x), 2) @ heads(x, 2).transpose(-1, -2), -2)
    ),
    "scores that are returned": lambda x: torch.bmm(c(x).flatten(2).transpose(1, 2), c(x).flatten(2)),
    "scores with a bias": lambda x: (
        torch.baddbmm(w(1, 63, 63), c(x).flatten(2).transpose(1, 2), c(x).flatten(2), beta=0.5, alpha=0.1).softmax(-1)
        @ x.flatten(2).transpose(1, 2)
    ),
    "scores by einsum": lambda x: torch.einsum("bchw,bcij->bhwij", c(x), c(x)).flatten(3).softmax(-1).sum((1, 2)),
    "attention of a module": lambda x: loose.multi_head_attention_forward(
        *[c(x).flatten(2).permute(2, 0, 1)] * 3,
        4,
        2,
        w(12, 4) / 2,
        w(12),
        None,
        None,
        False,
        0.0,
        w(4, 4),
        w(4),
        training=False,
    )[0],
    "linear attention": lambda x: (
        torch.matmul(c(x).flatten(2).softmax(-1), x.flatten(2).transpose(1, 2)) @ c(x).flatten(2).softmax(1)
    ),
    # products
    "linear of one row": lambda x: F.linear(c(x).flatten(2).transpose(1, 2), torch.ones(4)),
    "linear of one row over a map": lambda x: F.linear(c(x), w(7)),
    "linear of one row and a bias": lambda x: F.linear(c(x).permute(0, 2, 3, 1), w(4)) + 1,
    "linear over a map": lambda x: F.linear(c(x), w(5, 7), w(5)),
    "linear with a number as bias": lambda x: F.linear(c(x), w(5, 7), torch.tensor([2.0])),
    "linear of a vector": lambda x: F.linear(c(x).mean((0, 1, 2)), w(3, 7), w(3)),
    "linear of a deferred weight": lambda x: F.linear(x, c(x)[0, 0]),
    "a vector times a map": lambda x: torch.matmul(w(9), c(x)),
    "a map times a vector": lambda x: torch.matmul(c(x), w(7)) + c(x) @ w(7, 1).squeeze(1),
    "a matrix times a map": lambda x: w(5, 9) @ c(x),
    "addmm": lambda x: torch.addmm(w(3), c(x)[0, 0], w(7, 3)),
    "bilinear": lambda x: F.bilinear(c(x), x, w(2, 7, 7), w(2)),
    "outer": lambda x: torch.outer(c(x).mean((0, 1, 3)), c(x).mean((0, 1, 2))),
    "tensordot": lambda x: torch.tensordot(c(x), w(4, 3), dims=([1], [0])),  # type: ignore[reportArgumentType]
    "kron": lambda x: torch.kron(c(x)[0, 0], torch.eye(2)),
    "distances": lambda x: torch.cdist(c(x).flatten(2).transpose(1, 2), w(2, 5, 4)),
    # pools
    "avg_pool3d without a batch": lambda x: F.avg_pool3d(c(x) * 1, 2),
    "avg_pool2d without a batch": lambda x: F.avg_pool2d(c(x)[0], 2),
    "avg_pool1d without a batch": lambda x: F.avg_pool1d(c(x)[0, 0], 2),
    "max_pool2d of integers": lambda x: F.max_pool2d((c(x) * 50).to(torch.int16), 3, 1, 1),
    "max_pool2d without a batch": lambda x: F.max_pool2d(c(x)[1], 3, 2, 1),
    "max_pool3d without a batch": lambda x: F.max_pool3d(c(x).contiguous(), (1, 2, 2)),
    "adaptive pool without a batch": lambda x: F.adaptive_avg_pool2d(c(x)[0], (2, None)),
    "conv2d without a batch": lambda x: F.conv2d(c(x)[0], WEIGHT),
    "conv3d without a batch": lambda x: F.conv3d(c(x)[:, :, :, :].transpose(0, 1), w(3, 4, 1, 3, 3)),
    "conv1d without a batch": lambda x: F.conv1d(c(x)[0, 0], w(2, 9, 3)),
    "conv_transpose2d without a batch": lambda x: F.conv_transpose2d(c(x)[0], WEIGHT, stride=2),
    "group norm without rows": lambda x: F.group_norm(c(x).mean((2, 3)), 2),
    "instance norm without a batch": lambda x: F.instance_norm(c(x)[0]),
    "upsampling of lines": lambda x: F.interpolate(c(x).flatten(2), scale_factor=2.0, mode="linear"),
    "pad without a batch": lambda x: F.pad(c(x)[0], (1, 1, 1, 1), "reflect"),
    "pixel_shuffle without a batch": lambda x: F.pixel_shuffle(c(x)[0], 2),
    "adaptive pool to one": lambda x: c(x) * F.adaptive_avg_pool2d(c(x), 1),
    "adaptive pool to few": lambda x: F.adaptive_avg_pool2d(c(x), (4, 3)),
    "adaptive pool to more": lambda x: c(F.adaptive_avg_pool2d(c(x), (13, 10))),
    "adaptive pool of one side": lambda x: (
        F.adaptive_avg_pool2d(c(x), (None, 1)) + F.adaptive_avg_pool2d(c(x), (1, None))
    ),
    "columns up by nearest exactly": lambda x: F.interpolate(c(x), scale_factor=(2.0, 41.0), mode="nearest-exact"),
    "rows up by nearest exactly": lambda x: F.interpolate(c(x), scale_factor=(41.0, 1.0), mode="nearest-exact"),
    "product with itself": lambda x: c(x)[:, :, :7] @ c(x)[:, :, :7],
    "product of one map with itself": lambda x: (lambda y: y @ y)(c(x)[:, :, :7]),
    "product of one turned map with itself": lambda x: (lambda y: y @ y)(c(x)[:, :, :7].mT),
    "largest of windows": lambda x: F.max_pool2d(c(x), 2, return_indices=True)[0],
    "largest of windows and where": lambda x: F.max_unpool2d(
        *F.max_pool2d(c(x), 2, return_indices=True), [2, 2], output_size=c(x).shape
    ),
    "adaptive maximum of few": lambda x: c(x) * F.interpolate(F.adaptive_max_pool2d(c(x), (8, 2)), c(x).shape[2:]),
    "adaptive pools of windows that overlap": lambda x: (
        c(F.adaptive_max_pool2d(c(x), (20, 3))) + c(F.adaptive_avg_pool2d(c(x), (20, 3)))
    ),
    "adaptive pools to more": lambda x: F.adaptive_max_pool2d(c(x), (100, 3)) + F.adaptive_avg_pool2d(c(x), (100, 3)),
    "adaptive maximum of one": lambda x: c(x) * F.adaptive_max_pool2d(c(x), 1),
    "adaptive maximum": lambda x: F.adaptive_max_pool2d(c(x), (3, 2)),
    "adaptive maximum and where": lambda x: F.adaptive_max_pool2d(c(x), 2, return_indices=True),
    "adaptive pool of frames": lambda x: F.adaptive_avg_pool3d(c(x).unsqueeze(2), (1, 3, 3)),
    "adaptive pool of lines": lambda x: F.adaptive_avg_pool1d(c(x).flatten(2), 5),
    "maximum and where": lambda x: F.max_pool2d(c(x), 2, return_indices=True),
    "maximum and back": lambda x: loose.max_unpool2d(*F.max_pool2d(c(x)[..., :8, :6], 2, return_indices=True), 2),
    "a dilated maximum": lambda x: F.max_pool2d(c(x), 3, 1, 1, 2),
    "a pool that counts padding": lambda x: (
        F.avg_pool2d(c(x), 3, 2, 1, True, True) + F.avg_pool2d(c(x), 3, 2, 1, True, False)
    ),
    "a pool with a divisor": lambda x: F.avg_pool2d(c(x), 2, divisor_override=3),
    "a pool by a power": lambda x: F.lp_pool2d(c(x).abs() + 0.1, 2.0, 3, 2),
    "a pool of all": lambda x: F.avg_pool2d(c(x), (9, 7)),
    "a pool of rows": lambda x: F.avg_pool2d(c(x), (9, 1)) * F.max_pool2d(c(x), (1, 7)),
    # activations
    "prelu": lambda x: F.prelu(c(x), w(4)),
    "prelu of one": lambda x: c(F.prelu(c(x), w(1))),
    "prelu of tokens": lambda x: F.prelu(c(x).flatten(2), w(4)),
    "prelu of a module": lambda x: nn.PReLU(4).requires_grad_(False)(c(x)),
    "prelu of a mean": lambda x: F.prelu(c(x).mean((2, 3)), w(4)),
    "glu": lambda x: F.glu(c(x), 1) + F.glu(c(x)[:, :, :8], 2).mean(),
    "softmax2d": lambda x: nn.Softmax2d()(c(x)),
    "softmax of rows": lambda x: c(x).softmax(2) + c(x).softmax(3) + c(x).softmax(0),
    "softmin": lambda x: F.softmin(c(x), 1),
    "gumbel without noise": lambda x: F.one_hot(c(x).argmax(1), 4).permute(0, 3, 1, 2) * c(x),
    "maxout": lambda x: c(x).unflatten(1, (2, 2)).amax(2),
    "celu and its like": lambda x: [
        f(c(x)) for f in (F.celu, F.selu, F.relu6, F.logsigmoid, F.tanhshrink, F.softsign, F.hardsigmoid)
    ],
    "gelu by tanh": lambda x: F.gelu(c(x), approximate="tanh"),
    "snake": lambda x: c(x) + torch.sin(c(x) * w(1, 4, 1, 1)).square() / (w(1, 4, 1, 1).abs() + 1),
    # gates
    "a gate from the left": lambda x: c(x).mean((2, 3), keepdim=True).sigmoid() * c(x),
    "a gate from the right": lambda x: c(x) * c(x).mean((2, 3), keepdim=True).sigmoid(),
    "a gate in place": lambda x: c(x).mul_(c(x).amax((2, 3), keepdim=True).sigmoid()),
    "a gate of rows": lambda x: c(x).mean(3, keepdim=True).sigmoid() * c(x) * c(x).mean(2, keepdim=True).sigmoid(),
    "a gate of pixels": lambda x: c(x).mean(1, keepdim=True).sigmoid() * c(x) + c(x) * c(x).amax(1, keepdim=True),
    "a gate of the batch": lambda x: c(x).mean((1, 2, 3), keepdim=True) * c(x) + c(x).mean(0, keepdim=True) * c(x),
    "a gate by layers": lambda x: (
        c(x) * F.conv2d(F.silu(F.conv2d(F.adaptive_avg_pool2d(c(x), 1), w(2, 4, 1, 1))), w(4, 2, 1, 1)).sigmoid()
    ),
    "a gate by linear layers": lambda x: (
        F.linear(F.relu(F.linear(c(x).mean((2, 3)), w(2, 4))), w(4, 2)).sigmoid()[..., None, None] * c(x)
    ),
    "a gate that is expanded": lambda x: c(x).mean((2, 3), keepdim=True).expand(2, 4, 9, 7) * c(x),
    "a gate without its dimensions": lambda x: c(x).mean((0, 2, 3))[:, None, None] * c(x) + c(x).mean() * c(x),
    "a gate of half the size": lambda x: F.interpolate(F.avg_pool2d(c(x), 2).sigmoid(), size=(9, 7)) * c(x),
    "a gate of a gate": lambda x: (
        lambda y: (y * y.mean((2, 3), True)) * (y * y.mean((2, 3), True)).mean((2, 3), True)
    )(c(x)),
    "a scalar from the left": lambda x: (
        torch.tensor(2.0) * c(x) + torch.tensor([3.0]) * c(x) - 2 + 5 / (c(x).abs() + 1)
    ),
    "a number over a map": lambda x: 2.0 ** c(x) + (1 - c(x)) + 3 // (c(x).abs() + 1) * 0,
    "a row from the left": lambda x: (
        torch.arange(7.0) * c(x) + torch.arange(9.0)[:, None] + c(x) * torch.ones(1, 1, 1, 1, 1)
    ),
    # norms
    "group norm of zeros": lambda x: F.group_norm(c(x) * 0, 1, w(4), w(4)),
    "group norm of each channel": lambda x: F.group_norm(c(x), 4, w(4)),
    "group norm without an epsilon": lambda x: F.group_norm(c(x), 2, eps=0.0),
    "group norm of one pixel": lambda x: F.group_norm(c(x)[:, :, :1, :1], 2),
    "group norm in sixteen bits": lambda x: F.group_norm(c(x).bfloat16(), 2).float(),
    "batch norm by its input": lambda x: F.batch_norm(c(x), None, None, training=True),
    "batch norm of variance zero": lambda x: F.batch_norm(c(x), torch.zeros(4), torch.zeros(4)),
    "layer norm of a map": lambda x: F.layer_norm(c(x), (4, 9, 7), w(4, 9, 7), w(4, 9, 7)),
    "layer norm of a row": lambda x: F.layer_norm(c(x), (7,)) + F.layer_norm(c(x), (9, 7)),
    "rms norm by hand": lambda x: c(x) * torch.rsqrt(c(x).pow(2).mean(1, keepdim=True) + 1e-6),
    "norm by length": lambda x: (
        loose.normalize(c(x), dim=1) * 2 + loose.normalize(c(x), dim=(2, 3)) + loose.normalize(c(x) * 0, dim=1)
    ),
    "response norm": lambda x: F.local_response_norm(c(x), 3),
    "variance of one value": lambda x: c(x)[:, :1].var(1, unbiased=False),
    "deviation by hand": lambda x: (c(x) - c(x).mean()) / c(x).std(),
    "cosine similarity": lambda x: F.cosine_similarity(c(x), x, dim=1),
    # infinities and NaN
    "infinity through upsampling and a convolution": lambda x: c(F.interpolate(with_infinity(x), scale_factor=2.0)),
    "infinity through smooth upsampling": lambda x: F.interpolate(with_infinity(x), scale_factor=2.0, mode="bilinear"),
    "infinity through aligned upsampling": lambda x: F.interpolate(
        with_infinity(x), scale_factor=2.0, mode="bilinear", align_corners=True
    ),
    "infinity through a cubic": lambda x: F.interpolate(with_infinity(x), scale_factor=2.0, mode="bicubic"),
    "infinity through a convolution": lambda x: c(c(with_infinity(x))),
    "infinity through a norm": lambda x: F.group_norm(with_infinity(x), 2),
    "infinity through a softmax": lambda x: with_infinity(x).softmax(1),
    "infinity through a pool": lambda x: (F.avg_pool2d(with_infinity(x), 2), F.max_pool2d(with_infinity(x), 3, 1, 1)),
    "infinity through a reduction": lambda x: (
        with_infinity(x).mean((2, 3)),
        with_infinity(x).amax(1),
        with_infinity(x).amin((2, 3)),
    ),
    "infinity through nan_to_num": lambda x: c(torch.nan_to_num(with_infinity(x), posinf=9.0, neginf=-9.0)),
    "infinity times zero": lambda x: with_infinity(x) * 0 + c(x),
    "infinity that a mask hides": lambda x: torch.where(with_infinity(x).isfinite(), with_infinity(x), 0.0).mean(
        (2, 3)
    ),
    "infinity through weights of zero": lambda x: F.conv2d(with_infinity(x), WEIGHT * (torch.arange(3) == 1)),
    "infinity through a transposed convolution": lambda x: F.conv_transpose2d(with_infinity(x), WEIGHT, stride=2),
    "infinity through attention": lambda x: attend(*[with_infinity(x).flatten(2).transpose(1, 2)] * 3),
    "NaN through upsampling and a convolution": lambda x: c(F.interpolate(with_nan(x), scale_factor=2.0)),
    "NaN through a norm": lambda x: F.group_norm(with_nan(x), 2),
    "NaN through a maximum": lambda x: (
        F.max_pool2d(with_nan(x), 3, 1, 1),
        with_nan(x).amax(1),
        with_nan(x).clamp(-1, 1),
    ),
    "NaN through a sort": lambda x: with_nan(x).sort(2)[0],
    # upsampling
    "upsampling by 41, which float32 has rows too early for": lambda x: F.interpolate(
        c(x).flatten(2), scale_factor=41.0
    ),
    "upsampling by 47 and by 3": lambda x: F.interpolate(c(x), scale_factor=(47.0, 3.0)),
    "upsampling to its own size": lambda x: F.interpolate(c(x), size=(9, 7), mode="bilinear"),
    "upsampling by odd factors": lambda x: c(F.interpolate(c(x), scale_factor=(1.7, 2.3), mode="bilinear")),
    "upsampling by recomputed factors": lambda x: F.interpolate(
        c(x), scale_factor=1.7, mode="bicubic", recompute_scale_factor=True
    ),
    "downsampling with antialiasing": lambda x: F.interpolate(c(x), size=(5, 4), mode="bilinear", antialias=True),
    "downsampling by area": lambda x: F.interpolate(c(x), size=(4, 3), mode="area"),
    "downsampling to nearest": lambda x: F.interpolate(c(x), scale_factor=0.4, mode="nearest-exact"),
    "upsampling to one row": lambda x: F.interpolate(c(x), size=(1, 12), mode="nearest"),
    "upsampling of frames": lambda x: F.interpolate(c(x).unsqueeze(2), scale_factor=(2.0, 2.0, 2.0), mode="trilinear"),
    "upsampling by repeating": lambda x: c(c(x).repeat_interleave(2, 2).repeat_interleave(2, 3)),
    "upsampling by expanding": lambda x: c(c(x)[:, :, :, None, :, None].expand(2, 4, 9, 2, 7, 2).reshape(2, 4, 18, 14)),
    "upsampling by four and a convolution": lambda x: c(F.interpolate(c(x), scale_factor=4.0)),
    "upsampling twice": lambda x: c(F.interpolate(c(F.interpolate(c(x), scale_factor=2.0)), scale_factor=2.0)),
    "upsampling that two read": lambda x: (lambda y: c(y) + y.mean(1, True))(F.interpolate(c(x), scale_factor=2.0)),
    # convolutions
    "a convolution as large as the map": lambda x: F.conv2d(c(x), w(3, 4, 9, 7)),
    "a convolution of even size": lambda x: F.conv2d(c(x), w(4, 4, 2, 2), padding="same"),
    "a convolution that skips rows": lambda x: F.conv2d(c(x), w(4, 4, 1, 1), stride=3),
    "a wide dilation": lambda x: F.conv2d(c(x), WEIGHT, padding=4, dilation=4),
    "a wide padding": lambda x: F.conv2d(c(x), WEIGHT, padding=(12, 3)),
    "a convolution of one column": lambda x: F.conv2d(c(x)[..., :1], WEIGHT, padding=1),
    "a convolution of one row": lambda x: F.conv2d(c(x)[:, :, :1], WEIGHT, padding=1),
    "a convolution by a map's weights": lambda x: F.conv2d(x, c(x)[:1, :, :3, :3]),
    "a convolution of each sample": lambda x: F.conv2d(c(x).flatten(0, 1)[None], w(8, 1, 3, 3), groups=8).unflatten(
        1, (2, 4)
    )[0],
    "a transposed convolution with all": lambda x: F.conv_transpose2d(c(x), w(4, 2, 3, 3), w(4), 2, 1, 1, 2, 2),
    "a transposed convolution to a size": lambda x: (
        nn.ConvTranspose2d(4, 4, 3, 2).requires_grad_(False).eval()(c(x) * 0, output_size=(20, 16)).shape
    ),
    "a convolution over time": lambda x: F.conv3d(torch.stack([c(x), x, x], 2), w(2, 4, 3, 3, 3), padding=(0, 1, 1)),
    "a convolution in double": lambda x: F.conv2d(c(x).double(), WEIGHT.double()),
    "a convolution of padding modes": lambda x: [
        nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode).requires_grad_(False)(c(x) * 0).shape
        for mode in ("reflect", "replicate", "circular")
    ],
    "a finite difference": lambda x: (
        F.conv2d(c(x).flatten(0, 1).unsqueeze(1), torch.tensor([[[[1.0, -1.0]]]])).unflatten(0, (2, 4)).squeeze(2)
    ),
    # others
    "to sparse and back": lambda x: c(x).to_sparse().to_dense(),
    "fourier and back": lambda x: c(torch.fft.irfft2(torch.fft.rfft2(c(x)), s=(9, 7))),
    "complex": lambda x: torch.view_as_real(torch.complex(c(x), x) * 1j).flatten(3),
    "cumulative": lambda x: c(c(x).cumsum(2)) + c(x).cumprod(3).flip(2) + c(x).cummax(1)[0],
    "a histogram": lambda x: c(x).flatten().quantile(torch.tensor([0.25, 0.5])),
    "a lookup": lambda x: F.embedding((c(x)[:, 0] > 0).long(), w(2, 3)),
    "a grid": lambda x: F.grid_sample(c(x), c(x).permute(0, 2, 3, 1)[..., :2].tanh() * 0.9, align_corners=False),
    "a fold": lambda x: F.fold(F.unfold(c(x), 3, padding=1), (9, 7), 3, padding=1),
    "a meshgrid": lambda x: (
        c(x) + torch.stack(torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij")).sum(0)
    ),
    "a triangle": lambda x: c(x).tril() + torch.triu(c(x), 1),
    "a trace": lambda x: torch.diagonal(c(x), 0, 2, 3).sum(-1) + torch.trace(c(x)[0, 0]),
    "a loss": lambda x: (F.mse_loss(c(x), x), F.l1_loss(c(x), x, reduction="none"), F.cross_entropy(c(x), x.argmax(1))),
    "counting": lambda x: ((c(x) > 0).sum((2, 3)), torch.count_nonzero(c(x) > 0, 1), (c(x) > 0).float().mean()),
    "lists of maps": lambda x: torch._foreach_mul([c(x), x], 2.0),  # type: ignore[reportPrivateImportUsage]
    "an empty concatenation": lambda x: torch.cat([torch.zeros(0), c(x).flatten()]) * 2,
    "a window": lambda x: c(x).unfold(2, 3, 3).unfold(3, 3, 2).permute(0, 2, 3, 1, 4, 5).flatten(3),
    "dimensions of names of their own": lambda x: (
        c(x).mean(dim=(-1, -3), keepdim=True) * c(x).amax(-2, True) + c(x).sum(dim=-4)
    ),
    "reductions of nothing": lambda x: (
        c(x).mean(()).sum() + c(x).sum(()).sum() + c(x)[:, :0].sum() + c(x)[:, :0].mean((2, 3)).sum()
    ),
    "in one channel after another": lambda x: torch.cat([c(x)[:, i : i + 1] * i for i in range(4)], 1),
    "nested calls": lambda x: c(c(c(c(c(c(x)))))),
}


def with_infinity(x: Tensor) -> Tensor:
    """A deferred map with infinities of both signs, apart and beside one another."""
    y = c(x)
    y[0, 1, 3, 2], y[1, 2, 6, 5], y[1, 2, 7, 5] = torch.inf, -torch.inf, torch.inf
    return y


def with_nan(x: Tensor) -> Tensor:
    y = c(x)
    y[0, 1, 3, 2] = torch.nan
    return y


@pytest.mark.filterwarnings("ignore")
@crossed(2, name=list(SMALL), tuning=TUNINGS, mode=MODES)
def test_a_small_thing_is_as_in_eager(name: str, tuning: Tuning, mode: Mode) -> None:
    assert_as_eager(SMALL[name], X, tuning=tuning, mode=mode)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SMALL)
def test_a_small_thing_in_another_layout_within_a_budget_and_called_again_is_as_in_eager(name: str) -> None:
    assert_as_eager(SMALL[name], X.contiguous(memory_format=torch.channels_last), budget=1, calls=2)


# Norms of maps that vary little: eager itself is far from right in some layouts


NORMS: dict[str, Function] = {
    "group norm": lambda x: F.group_norm(x, 2),
    "group norm of each channel": lambda x: F.group_norm(x, 4, w(4).to(x), w(4).to(x), 1e-3),
    "group norm of all": lambda x: F.group_norm(x, 1),
    "instance norm": lambda x: F.instance_norm(x),
    "layer norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2),
    "layer norm of all": lambda x: F.layer_norm(x, tuple(x.shape[1:])),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
}
STEADY: dict[str, Function] = {
    "constant": lambda x: torch.full_like(x, 3.0),
    "constant by arithmetic": lambda x: x * 0 + 0.1,
    "large constant": lambda x: torch.full_like(x, 1e4),
    "constant channels": lambda x: torch.arange(4.0).to(x)[:, None, None] + x * 0,
    "far from zero": lambda x: x * 0.1 + 30,
    "constant but for one pixel": lambda x: F.pad(x[:, :, :1, :1], (3, 3, 4, 4), value=5.0),
    "rows far apart": lambda x: x + torch.arange(9.0).to(x)[:, None] * 100,
}


@crossed(2, norm=list(NORMS), given=list(STEADY), tuning=TUNINGS, memory_format=FORMATS)
def test_a_norm_of_a_map_that_varies_little_is_as_near_to_the_truth_as_eagers(
    norm: str, given: str, tuning: Tuning, memory_format: torch.memory_format
) -> None:
    def run(x: Tensor) -> Tensor:
        return NORMS[norm](STEADY[given](x * 1))

    x = X.contiguous(memory_format=memory_format)
    with torch.no_grad():
        truth, eager = run(x.double()), run(x).double()
        ours = streamed(run, tuning=tuning)(x).double()
    off, error = (float((one - truth).abs().max()) for one in (eager, ours))
    assert error <= max(1.05 * off, 5e-5 * max(float(truth.abs().max()), 1.0))


# Sizes that are odd


NETWORKS: dict[str, Function] = {
    "convolutions": lambda x: c(F.silu(c(x))),
    "norm": lambda x: c(F.group_norm(c(x), 2)),
    "upsampled": lambda x: c(F.interpolate(c(x), scale_factor=2.0)),
    "arithmetic": lambda x: x * 2 + 1,
    "gate": lambda x: c(x) * c(x).amax(1, keepdim=True),
    "attention": lambda x: attend(*[c(x).flatten(2).transpose(1, 2)] * 3),
    "tokens": lambda x: F.layer_norm(c(x).flatten(2).transpose(1, 2), (4,)).transpose(1, 2).reshape(c(x).shape),
    "transposed": lambda x: F.conv_transpose2d(c(x), WEIGHT.to(x.dtype), stride=2),
    "joined": lambda x: torch.cat([c(x), x], 1)[:, 2:6],
    "padded": lambda x: F.conv2d(F.pad(c(x), (1, 1, 1, 1), "replicate"), WEIGHT.to(x.dtype)),
    "written": lambda x: (lambda y: y.mul_(2).add_(x))(c(x)),
    "pooled": lambda x: F.avg_pool2d(c(x), 2),
    "statistics": lambda x: (c(x).mean((2, 3)), c(x).sum(1)),
    "shuffled": lambda x: F.pixel_shuffle(c(x), 2),
    "written by rows": lambda x: (lambda y: (y[:, :, ::2].zero_(), y)[1])(c(x)),
    "double": lambda x: c(x.double()),
}
SHAPES = [
    (0, 4, 9, 7), (2, 4, 0, 7), (2, 4, 9, 0), (0, 4, 0, 0), (1, 4, 1, 1), (1, 4, 1, 7), (1, 4, 9, 1), (3, 4, 2, 2),
    (1, 4, 40, 2), (1, 4, 2, 40), (5, 4, 3, 3),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@crossed(2, name=list(NETWORKS), shape=SHAPES, tuning={"one row": ONE_ROW, "few rows": FEW_ROWS})
def test_maps_of_odd_sizes_are_as_in_eager_or_raise_what_eager_raises(
    name: str, shape: tuple[int, ...], tuning: Tuning
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        try:
            NETWORKS[name](x.clone())
        except (RuntimeError, ValueError) as error:
            with pytest.raises(type(error)):
                streamed(NETWORKS[name], tuning=tuning)(x.clone())
            return
    for budget in (None, 1):
        assert_as_eager(NETWORKS[name], x, tuning=tuning, budget=budget)


@pytest.mark.parametrize("strip_bytes", [1, 7, 224, 225, 500, 2_000, 10_000])
@pytest.mark.parametrize("name", NETWORKS)
def test_strips_of_any_size_are_as_in_eager(name: str, strip_bytes: int) -> None:
    x = torch.randn(1, 4, 13, 8, generator=torch.Generator().manual_seed(2))
    assert_as_eager(NETWORKS[name], x, tuning=Tuning(strip_bytes=strip_bytes, always=True))


@pytest.mark.parametrize("budget", [1, 100, 1_000, 5_000, 20_000, 1 << 40])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_budget_is_as_in_eager(name: str, budget: int) -> None:
    x = torch.randn(1, 4, 13, 8, generator=torch.Generator().manual_seed(2))
    assert_as_eager(NETWORKS[name], x, budget=budget, calls=2)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tuning_as_it_is_gives_what_eager_gives(name: str) -> None:
    assert_as_eager(NETWORKS[name], X, tuning=Tuning())
    assert_as_eager(NETWORKS[name], X, tuning=Tuning(), budget=1 << 30)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_other_types_are_as_in_eager(name: str, dtype: torch.dtype) -> None:
    """In half precision within what eager itself is off by."""
    skip_without_convolutions(dtype)
    if name == "attention" and dtype is not torch.float64:
        pytest.skip("Eager's own rounding of the scores is larger than the tolerance.")
    assert_as_eager(NETWORKS[name], X.to(dtype), tolerance=1e-12 if dtype is torch.float64 else None)


# Many and deep


@pytest.mark.parametrize("views", [50, 1500])
def test_many_chained_views_are_as_in_eager(views: int) -> None:
    def run(x: Tensor) -> Tensor:
        y = c(x)
        for step in range(views):
            y = (y.transpose(2, 3), y.flip(1), y.unsqueeze(1).squeeze(1), y.permute(0, 1, 3, 2))[step % 4]
        return c(y)

    assert_as_eager(run, X)


def test_many_chained_views_of_a_written_map_are_as_in_eager() -> None:
    def run(x: Tensor) -> Any:
        y = c(x)
        view = y
        for _ in range(1500):
            view = view.transpose(2, 3)
        view[:, 1].mul_(3)
        return y, view, c(y)

    assert_as_eager(run, X)


def test_a_deep_chain_of_operators_is_as_in_eager() -> None:
    def run(x: Tensor) -> Tensor:
        for step in range(400):
            x = x * 1.001 + (0.01 if step % 7 else x.mean() * 0)
        return c(x)

    assert_as_eager(run, X, tuning=ONE_ROW)


def test_many_residuals_are_computed_a_few_times_at_most() -> None:
    """Halos through residual branches: the work does not double with each block."""
    done: list[int] = []

    def run(x: Tensor) -> Tensor:
        for _ in range(24):
            x = x + c(F.silu(x)) * 0.2
        return x

    x = torch.randn(1, 4, 40, 6, generator=torch.Generator().manual_seed(2))
    assert_as_eager(run, x, tuning=ONE_ROW)
    with torch.no_grad():
        streamed(run, tuning=ONE_ROW, on_progress=lambda work, _: done.append(work))(x)
    assert done[-1] <= 4 * 24 * 4 * x.nbytes  # four maps a block


def test_many_maps_that_are_all_read_again_are_as_in_eager() -> None:
    def run(x: Tensor) -> Tensor:
        maps = [x]
        for _ in range(20):
            maps.append(c(torch.stack(maps[-4:]).mean(0)))
        return torch.cat(maps[::3], 1)

    assert_as_eager(run, X, tuning=ONE_ROW)


def test_a_thousand_small_operands_are_as_in_eager() -> None:
    def run(x: Tensor) -> Tensor:
        y = c(x)
        for step in range(300):
            y = y + torch.full((4, 1, 1), step / 1000) * torch.tensor(0.5)
        return y

    assert_as_eager(run, X)


# Deferred: what streams needs no map evaluated whole


def holds_back(function: Function) -> dict[str, int]:
    """The operators that were evaluated whole in a streamed call."""
    report: dict[str, int] = {}
    steps = Progress()
    x = torch.randn(1, 4, 64, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = function(x.clone())
        assert_alike(streamed(function, report=report, on_progress=steps, tuning=FEW_ROWS)(x.clone()), expected)
    assert steps.steps > 1
    return report


DEFERRED: list[str] = [
    "prelu", "prelu of one", "prelu of a module", "adaptive pool to one", "a gate from the left",
    "a gate from the right", "a gate of pixels", "pad by nothing", "upsampling that two read",
    "nested calls", "channels by a list", "columns by a list", "largest of windows", "adaptive maximum of few",
    "adaptive maximum of one", "adaptive pools of windows that overlap", "adaptive pools to more",
]  # fmt: skip


@pytest.mark.parametrize("name", DEFERRED)
def test_what_is_known_to_stream_is_deferred(name: str) -> None:
    assert holds_back(SMALL[name]) == {}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_transformer_block_on_a_map_is_as_in_eager(mode: Mode) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval().requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        tokens = c(x).flatten(2).transpose(1, 2)
        return c(block(tokens).transpose(1, 2).unflatten(2, x.shape[2:]))

    for tuning in TUNINGS.values():
        assert_as_eager(run, X, tuning=tuning, mode=mode)


def test_a_recurrent_network_on_rows_is_as_in_eager() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(4, 4, batch_first=True).requires_grad_(False)

    def run(x: Tensor) -> Any:
        rows, last = layer(c(x).mean(3).transpose(1, 2))
        return c(x) + rows.transpose(1, 2)[..., None], last

    assert_as_eager(run, X)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_windows_that_attend_are_as_in_eager(count: int) -> None:
    """As Swin's: rolled, cut into windows, attended, put together and rolled back, several times."""

    def run(x: Tensor) -> Tensor:
        for step in range(count):
            y = c(x).roll((-step, -step), (2, 3)).permute(0, 2, 3, 1)
            cut = y.view(2, 3, 3, 2, 3, 4) if y.is_contiguous() else y.reshape(2, 3, 3, 2, 3, 4)
            t = cut.permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, 4)
            t = attend(t, t, t).view(2, 3, 2, 3, 3, 4)
            x = x + t.permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 9, 6).roll((step, step), (2, 3))
        return x

    for tuning in TUNINGS.values():
        assert_as_eager(run, X[..., :6], tuning=tuning)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_a_small_unet_is_as_in_eager(memory_format: torch.memory_format) -> None:
    def block(x: Tensor, scale: Optional[Tensor] = None) -> Tensor:
        y = c(F.silu(F.group_norm(x, 2)))
        return x + (y if scale is None else y * (1 + scale))

    def run(x: Tensor, step: Tensor) -> Any:
        scale = torch.sin(step * torch.arange(4.0))[None, :, None, None]
        kept = []
        for _ in range(2):
            x = block(x, scale)
            kept.append(x)
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), WEIGHT, stride=2)
        t = F.group_norm(x, 2).flatten(2).transpose(1, 2)
        x = x + attend(t, t, t).transpose(1, 2).reshape(x.shape)
        for before in reversed(kept):
            x = c(F.interpolate(x, size=before.shape[2:]))
            x = block(torch.cat([x, before], 1)[:, ::2], scale)
        return F.silu(x), kept

    x = torch.randn(2, 4, 13, 10, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=memory_format)
    for tuning in TUNINGS.values():
        for budget in (None, 1):
            assert_as_eager(run, x, torch.tensor(0.3), tuning=tuning, budget=budget, tolerance=2e-5)
