"""Attention over all pixels, as models write it: eager's result, and nowhere a matrix of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from allocations import allocated
from conv_helpers import assert_same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from comfyui_patchconv.streaming import Expected, Streamed, Tuning, expect, streamed
from comfyui_patchconv.streaming.graph import attention

SMALL = Tuning(strip_bytes=4_000, allocator_bytes=0, always=True)
CHANNELS, HEIGHT, WIDTH = 8, 11, 6
PIXELS = HEIGHT * WIDTH

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(count: int) -> Attention:
    """As `diffusers`: tokens, heads, one operator, and back."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, channels, height, width = q.shape
        tokens = [x.view(batch, channels, height * width).transpose(1, 2) for x in (q, k, v)]
        split = [x.view(batch, -1, count, channels // count).transpose(1, 2) for x in tokens]
        out = F.scaled_dot_product_attention(*split, dropout_p=0.0, is_causal=False)
        out = out.transpose(1, 2).reshape(batch, -1, channels).to(q.dtype)
        return out.transpose(-1, -2).reshape(batch, channels, height, width)

    return attend


def one_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As ComfyUI with PyTorch's attention."""
    batch, channels, *_ = q.shape
    tokens = [x.view(batch, 1, channels, -1).transpose(2, 3).contiguous() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*tokens, attn_mask=None, dropout_p=0.0, is_causal=False)
    return out.transpose(2, 3).reshape(q.shape)


def parts(steps: int) -> Attention:
    """As ComfyUI without it: the queries in parts, each written to its place."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, channels = q.shape[:2]
        queries = q.reshape(batch, channels, -1).permute(0, 2, 1)
        keys, values = k.reshape(batch, channels, -1), v.reshape(batch, channels, -1)
        result = torch.zeros_like(keys, device=queries.device)
        size = queries.shape[1] // steps if queries.shape[1] % steps == 0 else queries.shape[1]
        for first in range(0, queries.shape[1], size):
            scores = torch.bmm(queries[:, first : first + size], keys) * channels**-0.5
            weights = F.softmax(scores, dim=2).permute(0, 2, 1)
            result[:, :, first : first + size] = torch.bmm(values, weights)
        return result.reshape(q.shape)

    return attend


def values_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The other way round: scores first, values behind them."""
    scores = torch.bmm(q.flatten(2).transpose(1, 2), k.flatten(2)) / q.shape[1] ** 0.5
    return torch.bmm(scores.softmax(-1), v.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(q.shape)


def one_projection(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Wan in `diffusers`: queries, keys and values in one map, parted as tokens."""
    batch, channels = q.shape[:2]
    tokens = torch.cat([q, k, v], 1).reshape(batch, 1, 3 * channels, -1).permute(0, 1, 3, 2).contiguous()
    queries, keys, values = tokens.chunk(3, dim=-1)
    out = F.scaled_dot_product_attention(queries, keys, values)
    return out.squeeze(1).permute(0, 2, 1).reshape(q.shape)


FORMS = {
    "one head": heads(1), "four heads": heads(4), "one operator": one_operator, "whole": parts(1), "parts": parts(3),
    "values behind": values_behind, "one projection": one_projection,
}  # fmt: skip


BY_HAND = ("whole", "parts", "values behind")


class Block(nn.Module):
    """Norm, attention, a projection and a residual add."""

    def __init__(self, attend: Attention, linear: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.linear = attend, linear
        self.norm = nn.GroupNorm(2, CHANNELS)
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(4))
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._project(conv, self.norm(x)) for conv in self.convs[:3])
        return x + self._project(self.convs[3], self.attend(q, k, v))

    def _project(self, conv: Any, x: Tensor) -> Tensor:
        if not self.linear:
            return conv(x)
        tokens = x.flatten(2).transpose(1, 2)
        return F.linear(tokens, conv.weight.flatten(1), conv.bias).transpose(1, 2).unflatten(2, x.shape[2:])


def largest_allocation(run: Callable[[], object]) -> int:
    """The most bytes that one operator allocated on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events: Any = profiled.events()
    return max(event.self_cpu_memory_usage for event in events)


def image(height: int = HEIGHT, batch: int = 1) -> Tensor:
    return torch.randn(batch, CHANNELS, height, WIDTH, dtype=torch.float64)


def expected_of(block: Block, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Expected:
    return expect(block, lambda copy, make: copy(make(shape)), device=device, dtype=dtype, tuning=SMALL)


@pytest.mark.parametrize("linear", [False, True], ids=["convolutions", "linear layers"])
@pytest.mark.parametrize("form", FORMS)
def test_attention_of_every_form_is_deferred_and_gives_eagers_result(form: str, linear: bool) -> None:
    block, x = Block(FORMS[form], linear), image(batch=2)
    expected = block(x)
    report: dict[str, int] = {}
    assert_same(streamed(block.forward, report=report, tuning=SMALL)(x), expected, 1e-9)
    assert not report


@pytest.mark.parametrize("form", BY_HAND)
def test_no_tensor_is_as_large_as_the_scores(form: str) -> None:
    """With more elements than those up to which the shape of a result is found by computing it."""
    block, x = Block(FORMS[form]), image(350)
    run = streamed(block.forward, tuning=Tuning(strip_bytes=400_000, allocator_bytes=0, always=True))
    run(image())  # what is allocated once in a process
    scores = (350 * WIDTH) ** 2 * x.itemsize
    assert largest_allocation(lambda: block(x)) >= scores // 3
    assert largest_allocation(lambda: run(x)) < scores / 8


@pytest.mark.parametrize("form", FORMS)
def test_the_program_runs_once(form: str) -> None:
    calls: list[torch.Size] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape)
        return FORMS[form](q, k, v)

    x = image()
    streamed(Block(attend).forward, tuning=SMALL)(x)
    assert calls == [x.shape]


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_that_makes_scores_gets_few_queries(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queries: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: Any) -> Tensor:
        queries.append(q.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    block, x = Block(FORMS[form]), image()
    expected = block(x)
    monkeypatch.setattr(attention, "F", SimpleNamespace(scaled_dot_product_attention=kernel))
    monkeypatch.setattr(attention, "makes_scores", lambda *tensors: True)
    for name in ("_SCORES_AT_ONCE", "_SCORES_AT_ONCE_OF_A_CPU"):
        monkeypatch.setattr(attention, name, x.itemsize * 5 * PIXELS)
    assert_same(streamed(block.forward, tuning=SMALL)(x), expected, 1e-9)
    heads_at_once = 4 if form == "four heads" else 1
    if form in BY_HAND:
        assert not queries
    else:
        assert sum(queries) == PIXELS
        assert max(queries) <= 5 // heads_at_once


@pytest.mark.parametrize("form", FORMS)
def test_attention_is_planned(form: str) -> None:
    """Scores that the program computes itself count with a few copies of those of one row of the picture."""
    height, width = 32, 64
    found = expected_of(Block(FORMS[form]), (1, CHANNELS, height, width), torch.device("cpu"), torch.float64)
    of_a_row = width * height * width * 8
    maps = 8 * CHANNELS * height * width * 8
    assert found.peak < maps + (6 * of_a_row if form in BY_HAND else 0)


@pytest.mark.parametrize(("device", "scores"), [("cuda", 0), ("mps", 3 * (128 << 20))])
def test_scores_count_where_a_device_makes_them(device: str, scores: int) -> None:
    """8192 tokens, whose scores are 256 MB in float32."""
    if device == "cuda" and torch.__version__.startswith("2.1.") and not torch.cuda.is_available():
        pytest.skip("torch 2.1 has no fake tensors of a GPU that is not there")
    shape = 1, CHANNELS, 128, 64
    found = expected_of(Block(heads(1)), shape, torch.device(device, 0), torch.float32)
    assert scores < found.peak < scores + 30 * 4 * CHANNELS * 128 * 64


def test_keys_and_values_lie_in_files_when_there_is_no_room() -> None:
    block, x = Block(heads(2)), image()
    expected = block(x)
    runner = Streamed(budget=1, tuning=Tuning(strip_bytes=1, allocator_bytes=0, always=True))
    assert_same(runner.call(block.forward, (x,), {}), expected, 1e-9)
    assert runner.last is not None
    assert runner.last.offloaded >= 2 * x.nbytes


@pytest.mark.parametrize(
    "odd",
    [
        lambda scores: (scores + 1).softmax(2),
        lambda scores: scores.softmax(1),
        lambda scores: scores.clone().mul_(2).softmax(2),
        lambda scores: scores.softmax(2) * 0.5,
        lambda scores: scores[:, ::2].softmax(2).repeat_interleave(2, 1),
    ],
    ids=["added", "over queries", "in place", "scaled behind", "sliced"],
)
def test_scores_that_are_no_attention(odd: Callable[[Tensor], Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = odd(torch.bmm(q.flatten(2).transpose(1, 2), k.flatten(2)))
        return torch.bmm(v.flatten(2), weights.transpose(1, 2)).reshape(q.shape)

    block, x = Block(attend), image(10)
    assert_same(streamed(block.forward, tuning=SMALL)(x), block(x), 1e-9)


@pytest.mark.parametrize(
    "option", [{"is_causal": True}, {"attn_mask": torch.eye(PIXELS).bool()}], ids=["causal", "mask"]
)
def test_attention_with_a_mask(option: dict[str, Any]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_, k_, v_ = (x.flatten(2).transpose(1, 2)[:, None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q_, k_, v_, **option).transpose(2, 3).reshape(q.shape)

    block, x = Block(attend), image()
    assert_same(streamed(block.forward, tuning=SMALL)(x), block(x), 1e-9)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhid,bhjd->bhij", ((2, 64, 5, 4), (2, 64, 5, 4))),
        ("b h i j, b h j d -> b h i d", ((64, 4, 5, 5), (64, 4, 5, 3))),
        ("bchw,bchw->bhw", ((1, 3, 40, 6), (1, 3, 40, 6))),
        ("bchw,dc->bdhw", ((1, 3, 40, 6), (5, 3))),
        ("dc,bchw,h->bdhw", ((5, 3), (1, 3, 40, 6), (40,))),
        ("bchw,bchw->bchw", ((1, 3, 40, 6), (1, 1, 40, 1))),
        ("bchw,h->bwhc", ((1, 3, 40, 6), (40,))),
        ("bic,bjc->bij", ((1, 40, 3), (1, 40, 3))),
    ],
)
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "deferred"])
def test_sums_of_products_come_in_rows(equation: str, shapes: Sequence[tuple[int, ...]], stored: bool) -> None:
    """Windows that attend, each by itself, channels that are mixed: along whatever letter the factors come in rows."""
    first, *others = (torch.randn(shape, dtype=torch.float64) for shape in shapes)

    def run(x: Tensor) -> Tensor:
        return torch.einsum(equation, x if stored else x.sin(), *others) + 1

    report: dict[str, int] = {}
    result = streamed(run, report=report, tuning=Tuning(1, allocator_bytes=0, always=True))(first)
    assert_same(result, run(first), 1e-12)
    assert report == {}


@pytest.mark.parametrize("equation", ["bchw,bchw->", "...hw,...hw->...h", "bchw,bdhw", "bic,bjc->bij", "bii,bii->bi"])
def test_sums_of_other_products_are_evaluated_whole(equation: str) -> None:
    """Of all rows, of letters that are not named, of one factor twice: once by rows, once whole."""
    x = torch.randn(1, 40, 40, *((6,) if "w" in equation else ()), dtype=torch.float64)
    run = streamed(lambda x: torch.einsum(equation, x, x) + 1, tuning=Tuning(1, allocator_bytes=0, always=True))
    assert_same(run(x), torch.einsum(equation, x, x) + 1, 1e-12)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keys_in_pieces_in_any_order_give_what_all_give(causal: bool, dtype: torch.dtype) -> None:
    """Queries in pieces, too, of a band of them; some pieces of keys are seen by none of these."""
    torch.manual_seed(0)
    first, last, channels = 5, 31, 6
    queries, keys = (torch.randn(2, 3, 41, 4, dtype=dtype) * 4 for _ in "qk")
    values = torch.randn(2, 3, 41, channels, dtype=dtype)
    step = attention.Attend(lambda pieces, first, last: pieces[0], 1, 0.3, causal, in_turn=True)
    like = values[..., :0, :]
    merging = attention.Merging(step, lambda low, high: queries[..., low:high, :], (first, last), 7, like)
    for low in (36, 9, 0, 18, 27):
        merging.add(keys[..., low : low + 9, :], values[..., low : low + 9, :], low)
    whole = F.scaled_dot_product_attention(
        queries.double(), keys.double(), values.double(), is_causal=causal, scale=0.3
    )[..., first:last, :]
    found = merging.result()
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[dtype]
    assert (found.double() - whole).abs().max() <= tolerance * whole.abs().max()


@pytest.mark.parametrize("tuning", [SMALL, Tuning(allocator_bytes=0, always=True)], ids=["small strips", "large ones"])
def test_masks_of_causal_attention_are_small_and_planned(tuning: Tuning) -> None:
    pixels = 3000
    x = torch.randn(1, 1, pixels, 8, generator=torch.Generator().manual_seed(0))

    def attend(x: Tensor) -> Tensor:
        y = x.sin()
        return F.scaled_dot_product_attention(y, y, y, is_causal=True) + 1

    runner = Streamed(tuning=tuning)
    with torch.no_grad():
        expected = attend(x)
        runner.call(attend, (x,), {})  # what is allocated once
        actual, took = allocated(lambda: runner.call(attend, (x,), {}))
    assert_same(actual, expected, 1e-5)
    assert runner.last is not None
    assert took.peak <= runner.last.peak
    if hasattr(torch._C, "_set_throw_on_mutable_data_ptr"):  # torch 2.1 makes the scores, and so the plan has them
        assert runner.last.peak < 3 * pixels**2


SIDE = 64

eagerly: Any = F.scaled_dot_product_attention


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT.contiguous()


def windows(x: Tensor) -> Tensor:
    return x[0].permute(1, 2, 0)


def seen() -> Tensor:
    return torch.ones(SIDE**2, SIDE**2, dtype=torch.bool)


WITH_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "three dimensions": lambda x: eagerly(tokens(x), tokens(x), tokens(x)).mT * 1,
    "channels far apart": lambda x: eagerly(*(x.flatten(2).mT[:, None],) * 3) * 1,
    "narrow values": lambda x: eagerly(*(tokens(x)[:, None],) * 2, tokens(x)[:, None, :, :3]) * 1,
    "few keys' heads": lambda x: (
        eagerly(torch.stack((tokens(x), tokens(x) + 1), 1), *(tokens(x)[:, None],) * 2, scale=0.5) * 1
    ),
    "causal": lambda x: eagerly(*(tokens(x),) * 3, is_causal=True) * 1,
    "a mask": lambda x: eagerly(*(tokens(x),) * 3, attn_mask=seen()),
    "windows": lambda x: eagerly(*(windows(x.reshape(1, CHANNELS, 8, -1)),) * 3) * 1,
    "narrow values of windows": lambda x: (
        eagerly(*(windows(x.reshape(1, CHANNELS, 8, -1)),) * 2, windows(x.reshape(1, CHANNELS, 8, -1))[..., :3]) * 1
    ),
}
"""Attention of which a CPU's own operator makes all scores."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", WITH_SCORES)
def test_scores_that_a_cpu_makes_are_within_the_plan(form: str, dtype: torch.dtype) -> None:
    """Counted: eager's are 64 MB or more in float32, of windows 8 MB."""
    attend, x = WITH_SCORES[form], torch.randn(1, CHANNELS, SIDE, SIDE).to(dtype)
    expected, eager = allocated(lambda: attend(x))
    runner = Streamed(budget=1, tuning=Tuning(allocator_bytes=0))
    runner.call(attend, (x,), {})
    result, ours = allocated(lambda: runner.call(attend, (x,), {}))
    assert_same(result.double(), expected.double(), 1e-5 if dtype != torch.bfloat16 else 2e-2)
    assert runner.last is not None
    extra = SIDE**4 if form == "a mask" else 0  # which the program makes
    assert ours.peak <= runner.last.peak + extra + (2 << 20)  # a kernel's own
    plain = Streamed(budget=None, tuning=Tuning(allocator_bytes=0))
    plain.call(attend, (x,), {})
    assert plain.last is not None
    if not plain.last.in_strips:
        assert plain.last.peak >= 0.98 * (eager.peak - extra)


@pytest.mark.parametrize("form", WITH_SCORES)
def test_blocks_of_queries_give_eagers_result(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, x = WITH_SCORES[form], torch.randn(1, CHANNELS, SIDE, SIDE, dtype=torch.float64)
    for name in ("_SCORES_AT_ONCE_OF_A_CPU", "_MASKS_AT_ONCE"):
        monkeypatch.setattr(attention, name, 300_000)
    monkeypatch.setattr(attention, "makes_scores", lambda *asked: True)
    assert_same(streamed(attend, tuning=Tuning(strip_bytes=20_000, always=True))(x), attend(x), 1e-9)
