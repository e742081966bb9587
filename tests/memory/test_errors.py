"""Where a strip does not fit, smaller ones go on from there; only a single row that does not fit is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_helpers import Counting, assert_same, make_seamless, run_python, tile, unchanged
from torch import Tensor, nn

from comfyui_patchconv.memory.allocator import release
from comfyui_patchconv.memory.errors import is_out_of_memory

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError(f"{CPU} 100663296 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to ..."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.94 GB, other allocations: 1.22 GB)."),
    RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904, 3, 16, 16]"),
    MemoryError("std::bad_alloc"),
]
NAMES = ["cuda", "cpu", "windows", "mps", "xpu", "cudnn", "cublas", "torch", "python"]


def no_strip_above(rows: int, error: BaseException) -> Any:
    """A limit on the output rows of a strip of a 3-row kernel with padding 1."""

    def check(piece: Tensor) -> None:
        if piece.shape[2] > rows + 2:
            raise error

    return check


def case(**settings: Any) -> tuple[Counting, Tensor, Tensor]:
    torch.manual_seed(0)
    module, input = Counting(4, 6, 3, padding=1, **settings), torch.randn(2, 4, 32, 9)
    expected = module(input).detach()
    module.seen.clear()
    return module, input, expected


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=NAMES)
def test_strips_are_halved_until_they_fit(error: BaseException, grad: bool) -> None:
    module, input, expected = case()
    module.before_call = no_strip_above(3, error)
    with torch.set_grad_enabled(grad), unchanged(tile(module, 2)):
        assert_same(module(input), expected, 1e-5)
    heights = [shape[2] - 2 for shape in module.seen]
    assert heights[:4] == [16, 8, 4, 2]
    assert heights[4:] == [2] * 15


@pytest.mark.parametrize("sequential", [True, False])
def test_the_backward_pass_runs_in_the_strips_that_fit(sequential: bool) -> None:
    module, input, _ = case()
    wanted = [input.requires_grad_(), module.weight]
    expected = torch.autograd.grad(module(input).square().sum(), wanted)
    module.before_call = no_strip_above(5, ERRORS[0])
    actual = torch.autograd.grad(tile(module, 2, sequential)(input).square().sum(), wanted)
    for ours, eager in zip(actual, expected, strict=True):
        assert_same(ours, eager, 1e-5)


def test_strips_that_were_done_are_not_done_again() -> None:
    module, input, expected = case()
    done: list[int] = []
    tile(module, 4, on_strip=lambda module, rows, total: done.append(rows))
    refused: list[int] = []

    def refuse_lower_half(piece: Tensor) -> None:
        if done and done[-1] >= 16 and piece.shape[2] > 4 + 2:
            refused.append(done[-1])
            raise ERRORS[0]

    module.before_call = refuse_lower_half
    with torch.no_grad():
        assert_same(module(input), expected, 1e-5)
    assert refused == [16]
    assert done == [8, 16, 20, 24, 28, 32]
    assert len(module.seen) == len(done) + len(refused)


def test_a_batch_of_strips_that_does_not_fit_is_run_one_by_one() -> None:
    module, input, expected = case()

    def refuse_batch(piece: Tensor) -> None:
        if piece.shape[0] > 2:
            raise ERRORS[1]

    module.before_call = refuse_batch
    assert_same(tile(module, 4, sequential=False)(input), expected, 1e-5)
    assert [shape[0] for shape in module.seen] == [8, 2, 2, 2, 2]


def test_a_chained_extension_is_halved_too() -> None:
    module: Any = make_seamless(nn.Conv2d(4, 6, 3, padding=1), "circular", "circular")
    input = torch.randn(1, 4, 64, 9)
    expected = module(input).detach()
    theirs = module._conv_forward

    def limited(input: Tensor, weight: Tensor, bias: Any) -> Tensor:
        if input.shape[2] > 20:
            raise ERRORS[0]
        return theirs(input, weight, bias)

    module._conv_forward = limited
    with torch.no_grad():
        assert_same(tile(module, 2)(input), expected, 1e-5)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("error", ERRORS, ids=NAMES)
def test_a_row_that_does_not_fit_is_named_in_one_sentence(error: BaseException, sequential: bool) -> None:
    module, input, expected = case()
    module.before_call = no_strip_above(-2, error)
    with unchanged(tile(module, 4, sequential)), pytest.raises(type(error)) as raised:
        module(input)
    message = str(raised.value)
    assert "Out of memory" in message
    assert "(2, 4, 32, 9)" in message
    assert message.endswith(".")
    module.before_call = None
    assert_same(module(input), expected, 1e-5)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("device-side assert triggered"), ValueError("no"), KeyboardInterrupt()])
def test_any_other_error_passes_through_at_once(error: BaseException, sequential: bool) -> None:
    module, input, expected = case()
    module.before_call = no_strip_above(-2, error)
    with pytest.raises(type(error)) as raised:
        tile(module, 4, sequential)(input)
    assert raised.value is error
    assert len(module.seen) == 1
    module.before_call = None
    assert_same(module(input), expected, 1e-5)


def test_errors_about_the_input_are_pytorchs_own() -> None:
    eager, ours = nn.Conv2d(4, 6, 3), tile(nn.Conv2d(4, 6, 3))
    for shape in [(1, 5, 9, 9), (9, 9), (1, 4, 2, 9), (1, 4, 9, 2), (1, 1, 4, 9, 9)]:
        with pytest.raises(Exception) as expected:
            eager(torch.zeros(shape))
        with pytest.raises(type(expected.value)):
            ours(torch.zeros(shape))


@pytest.mark.parametrize("error", ERRORS, ids=NAMES)
def test_every_devices_out_of_memory_error_is_known(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape '[2]' is invalid"), ValueError("out of memory"), KeyboardInterrupt("out of memory")]
)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_release_needs_no_cache(device: str) -> None:
    release(torch.device(device))


REAL = """
import json, os, re, resource
import torch
from pathlib import Path
from torch import nn
from comfyui_patchconv import patched


def attempt(conv, input):
    try:
        return conv(input)
    except (RuntimeError, MemoryError) as error:
        return str(error)


@torch.inference_mode()
def child(megabytes):
    torch.manual_seed(0)
    conv, input = nn.Conv2d(8, 8, 3, padding=1), torch.randn(1, 8, 1024, 1536)
    expected, done = conv(input), []
    used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
    whole_fails = isinstance(attempt(conv, input), str)
    options = dict(strip_bytes=1 << 40, on_strip=lambda module, rows, total: done.append(rows))
    with patched(conv, 2, threshold=0, **options):
        ours = attempt(conv, input)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if not isinstance(ours, str):
        ours = float((ours - expected).abs().max() / expected.abs().max())
    print(json.dumps((whole_fails, ours, done)), flush=True)


for megabytes in (30, 64, 80):
    if os.fork() == 0:
        child(megabytes)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def real() -> dict[int, Any]:
    """By megabytes of memory that are left: whether the whole convolution fails, our difference or error, our strips.

    The output takes 48 megabytes, and a copy of it or of the input in the order of a backend as many.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("this system has no /proc/self/status to tell a process's size")
    # Each block is mapped by itself: what is freed leaves no gaps that would count as used.
    lines = run_python(REAL, MALLOC_MMAP_THRESHOLD_=1 << 16).splitlines()
    found: dict[int, Any] = dict(zip((30, 64, 80), map(json.loads, lines), strict=True))
    if "could not create a primitive" in str(found[30][1]):
        pytest.skip("oneDNN finds no room for its own code within the limits of this test on this machine")
    return found


@pytest.mark.parametrize("megabytes", [64, 80])
def test_real_memory_that_ends_in_the_middle_of_a_convolution(real: dict[int, Any], megabytes: int) -> None:
    whole_fails, difference, done = real[megabytes]
    assert whole_fails
    assert not isinstance(difference, str), difference
    assert difference <= 1e-5
    assert len(done) > 2


def test_real_memory_that_does_not_hold_the_output(real: dict[int, Any]) -> None:
    whole_fails, message, _ = real[30]
    assert whole_fails
    assert "Out of memory" in message
    assert "(1, 8, 1024, 1536)" in message
    assert message.endswith(".")
