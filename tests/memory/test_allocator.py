"""What an allocator keeps is handed back on demand, and garbage looked for as often as before a graph was made."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from conv_helpers import run_python
from torch import Tensor, nn

from comfyui_patchconv.memory.allocator import _trim, rare_collections
from comfyui_patchconv.streaming import Streamed


@pytest.fixture(autouse=True)
def usual() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield 700, 10, 10
    gc.set_threshold(*before)


def test_thresholds_are_as_before_behind_blocks_that_overlap(usual: tuple[int, int, int]) -> None:
    first, second = rare_collections(), rare_collections()
    first.__enter__()
    raised = gc.get_threshold()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold() == raised > usual
    second.__exit__(None, None, None)
    assert gc.get_threshold() == usual


def test_an_error_ends_the_block(usual: tuple[int, int, int]) -> None:
    with pytest.raises(KeyError), rare_collections():
        raise KeyError
    assert gc.get_threshold() == usual


@pytest.mark.parametrize("chosen", [(0, 10, 10), (1_000_000, 10, 10), (900, 5, 5)], ids=["never", "more rarely", "own"])
def test_what_somebody_else_sets_stays(chosen: tuple[int, int, int], usual: tuple[int, int, int]) -> None:
    with rare_collections():
        gc.set_threshold(*chosen)
    assert gc.get_threshold() == chosen
    with rare_collections():
        assert gc.get_threshold()[0] in (0, max(chosen[0], 50_000))
    assert gc.get_threshold() == chosen


KEPT = """
import torch
from comfyui_patchconv.memory.allocator import keep_freed_blocks, release
from comfyui_patchconv.memory.usage import anonymous

keep_freed_blocks()
before = anonymous()
strips = [torch.ones(5 << 20) for _ in range(3)]  # of 21 MB each
del strips
kept = anonymous() - before
release(torch.device("cpu"))
print(kept, anonymous() - before)
"""


@pytest.mark.skipif(_trim() is None, reason="the C library hands nothing back")
def test_what_the_c_library_keeps_is_handed_back_where_memory_ran_out() -> None:
    kept, left = map(int, run_python(KEPT).split())
    assert kept > 40e6
    assert left < 20e6


class Looks(nn.Module):
    """Notes how often Python looks for garbage while it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(gc.get_threshold()[0])
        return torch.relu(x) + 1


def test_a_streamed_call_looks_rarely_and_leaves_no_trace(usual: tuple[int, int, int]) -> None:
    module, runner = Looks(), Streamed()
    with torch.no_grad():
        runner.call(module, (torch.ones(1, 2, 8, 8),), {})
    assert module.seen[0] > usual[0]
    assert gc.get_threshold() == usual
