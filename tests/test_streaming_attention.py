"""Attention over all pixels, as models write it: plain's result, and nowhere a matrix of scores."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from comfyui_patchconv import planner
from comfyui_patchconv.streaming import Plan, Run, attention, carry_out, choose, streamed

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


class Largest(TorchDispatchMode):
    """The most elements that a tensor with values had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_flatten(result)[0] if type(x) is Tensor]
        sizes = [x.numel() for x in tensors if x.device.type != "meta" and x.is_floating_point()]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("linear", [False, True], ids=["convolutions", "linear layers"])
@pytest.mark.parametrize("form", FORMS)
def test_attention(form: str, linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 4 * 8 * CHANNELS * WIDTH * 2)
    block, x = Block(FORMS[form], linear), torch.randn(2, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    expected = block(x)
    report: dict[str, int] = {}
    with Largest() as largest:
        result = streamed(block.forward, report=report)(x)
    assert_same(result, expected, 1e-9)
    assert 0 < largest.elements < 2 * PIXELS * PIXELS
    assert set(report) <= {"zeros_like", "slice"}


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_that_makes_scores_gets_few_queries(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queries: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: Any) -> Tensor:
        queries.append(q.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    block, x = Block(FORMS[form]), torch.randn(1, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    expected = block(x)
    monkeypatch.setattr(attention, "F", SimpleNamespace(scaled_dot_product_attention=kernel))
    monkeypatch.setattr(attention, "makes_scores", lambda *tensors: True)
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", 4 * 5 * PIXELS)
    assert_same(streamed(block.forward)(x), expected, 1e-9)
    heads_at_once = 4 if form == "four heads" else 1
    assert sum(queries) == PIXELS
    assert max(queries) == 5 // heads_at_once


@pytest.mark.parametrize("form", FORMS)
def test_attention_is_planned(form: str) -> None:
    x = torch.empty(1, CHANNELS, 32, 64, dtype=torch.float64, device="meta")
    peak = choose(Block(FORMS[form]), (x,), {}, device=torch.device("cpu")).peak
    scores = (32 * 64) ** 2 * 8
    assert peak < planner.ALLOCATOR_BYTES["cpu"] + scores / 8


@pytest.mark.parametrize(("device", "scores"), [("cuda", 0), ("mps", 3 * (128 << 20))])
def test_scores_count_where_a_device_makes_them(device: str, scores: int) -> None:
    """8192 tokens, whose scores are 256 MB in float32."""
    if device == "cuda" and torch.__version__.startswith("2.1.") and not torch.cuda.is_available():
        pytest.skip("torch 2.1 has no fake tensors of a GPU that is not there")
    block, x = Block(heads(1)).float(), torch.empty(1, CHANNELS, 128, 64, device="meta")
    peak = choose(block, (x,), {}, device=torch.device(device, 0)).peak
    assert scores < peak < scores + 30 * 4 * x.numel()


def test_many_queries_are_attended_to_at_once_on_a_gpu() -> None:
    assert attention.least_rows(512, torch.device("cuda", 0)) == 32
    assert attention.least_rows(512, torch.device("cpu")) == 1


def test_keys_and_values_lie_in_files_when_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 1)
    block, x = Block(heads(2)), torch.randn(1, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    run = Run(Plan(budget=1))
    assert_same(carry_out(block.forward, (x,), {}, run), block(x), 1e-9)
    assert run.moved >= 2 * x.nbytes


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
def test_scores_that_are_no_attention_are_computed(odd: Callable[[Tensor], Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = odd(torch.bmm(q.flatten(2).transpose(1, 2), k.flatten(2)))
        return torch.bmm(v.flatten(2), weights.transpose(1, 2)).reshape(q.shape)

    block, x = Block(attend), torch.randn(1, CHANNELS, 10, WIDTH, dtype=torch.float64)
    assert_same(streamed(block.forward)(x), block(x), 1e-9)


@pytest.mark.parametrize("option", [{"is_causal": True}, {"attn_mask": torch.eye(PIXELS).bool()}])
def test_attention_with_a_mask_is_evaluated(option: dict[str, Any]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_, k_, v_ = (x.flatten(2).transpose(1, 2)[:, None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q_, k_, v_, **option).transpose(2, 3).reshape(q.shape)

    block, x = Block(attend), torch.randn(1, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    assert_same(streamed(block.forward)(x), block(x), 1e-9)
