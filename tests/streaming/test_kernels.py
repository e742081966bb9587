"""What lies between convolutions is one step: which steps, that results stay what they are, and Triton's kernels, which
are interpreted here."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from processes import LIMIT
from products import crossed
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Tuning, streamed
from comfyui_patchconv.streaming.execute.kernels import Kernels, by_kitchen, by_triton, choice
from comfyui_patchconv.streaming.execute.kernels.by_triton import Inputs, compute
from comfyui_patchconv.streaming.execute.kernels.chains import Chain
from comfyui_patchconv.streaming.execute.kernels.elements import Form
from comfyui_patchconv.streaming.graph.statistics import Statistics
from comfyui_patchconv.streaming.record.operators import convolution

SMALL = Tuning(strip_bytes=8_000, allocator_bytes=0, always=True)
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Triton interprets its kernels, on the CPU."""
    found = pytest.importorskip("triton", reason="triton is not installed here, whose kernels these are")
    if not choice.has_triton():
        pytest.skip(f"Triton {found.__version__} is older than what the kernels run by")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which tests/on_cuda runs the kernels: once compiled they are not interpreted")
    monkeypatch.setenv("PATCHCONV_KERNELS", "triton")
    by_triton._FAILURES.seen.clear()
    yield found
    by_triton._FAILURES.seen.clear()
    choice.has_triton.cache_clear()


@pytest.fixture
def launched(triton: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each kernel that was launched was told to do."""
    seen: list[dict[str, Any]] = []
    launch = by_triton._launch

    def watched(*arguments: Any, **constants: Any) -> bool:
        done = launch(*arguments, **constants)
        if done:
            seen.append(constants)
        return done

    monkeypatch.setattr(by_triton, "_launch", watched)
    return seen


# Kernels


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def line_of(samples: int, channels: int) -> Tensor:
    line = drawn(4, samples * channels, seed=3)
    line[0], line[1] = 0, 1
    return line


def activated(value: Tensor, kind: Any) -> Tensor:
    return value if kind is None else F.silu(value) if kind == "silu" else F.leaky_relu(value, kind)


def in_float64(form: Form, inputs: Inputs) -> Tensor:
    value = inputs.map.double()
    if form.scaled:
        assert inputs.line is not None
        shape = (*value.shape[:2], *(1,) * (value.dim() - 2))
        value = value * inputs.line[2].double().view(shape) + inputs.line[3].double().view(shape)
    value = activated(value, form.first) * form.inner
    if inputs.other is not None and form.added is not None:
        value = value + form.added * inputs.other.double()
    value = activated(value * form.factor, form.second)
    for dim, times in enumerate(form.repeats):
        value = value.repeat_interleave(times, dim)
    return value


FORMS = {
    "norm": Form(scaled=True),
    "norm, silu": Form(scaled=True, first="silu"),
    "residual": Form(added=1.0),
    "all": Form(True, "silu", 0.5, -2.0, 1.25, 0.2),
    "leaky relu": Form(first=0.2),
    "relu": Form(first=0.0),
    "scaled residual": Form(inner=0.2, added=1.0, second=0.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_what_float64_has(triton: Any, name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]
    inputs = Inputs(drawn(2, 6, 5, 7, dtype=dtype), drawn(2, 6, 5, 7, dtype=dtype, seed=1), line_of(2, 6))
    inputs = inputs if form.added is not None else inputs._replace(other=None)
    out = torch.full_like(inputs.map, 9.0)
    done, _ = compute(form, inputs, out, 2)
    exact = in_float64(form, inputs)
    assert done
    if dtype == torch.float32:
        assert float((out - exact).abs().max()) <= 1e-6 * float(exact.abs().max())
    else:  # rounded once; the interpreter cuts bfloat16 off, where a GPU rounds to the nearest
        apart = (out.double() - exact).abs() - (exact.to(dtype).double() - exact).abs()
        most = 1e-5 if dtype == torch.float16 else torch.finfo(dtype).eps
        assert float((apart / exact.abs().clamp_min(1e-3)).max()) <= most


LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows of a larger map": lambda x: torch.cat((x, x + 1, x), 2)[:, :, x.shape[2] : 2 * x.shape[2]],
    "a part of the samples": lambda x: torch.cat((x, x))[: x.shape[0]],
    "a part of the channels": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "in order": lambda x: x,
}


def ordered(map: Tensor, last: bool) -> Tensor:
    order = {4: LAST, 5: LAST_3D}[map.dim()] if last else torch.contiguous_format
    return torch.empty_like(map, memory_format=order).copy_(map)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 5), (2, 5, 9, 3), (1, 70, 3, 4), (1, 4, 3, 700)])
@pytest.mark.parametrize("reads_last", [False, True])
@pytest.mark.parametrize("writes_last", [False, True])
@pytest.mark.parametrize("edges", [(0, 0), (1, 0), (0, 2), (3, 1)])
def test_sizes_orders_and_edges(
    triton: Any, shape: tuple[int, ...], reads_last: bool, writes_last: bool, edges: tuple[int, int]
) -> None:
    above, below = edges
    inputs = Inputs(ordered(drawn(*shape), reads_last), drawn(*shape, seed=1), line_of(*shape[:2]))
    form = Form(scaled=True, first="silu", added=1.0)
    rows = shape[2] + above + below
    room = ordered(torch.full((*shape[:2], rows, shape[3]), 9.0), writes_last)
    done, moments = compute(form, inputs, room, 2, above, gathers=not any(edges))
    exact = F.pad(in_float64(form, inputs), (0, 0, above, below))
    assert done
    assert float((room - exact).abs().max()) <= 1e-6 * float(exact.abs().max())
    assert (moments is not None) == (not any(edges))
    if moments is not None:
        assert_moments(moments, room.double(), 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_of_maps(triton: Any, name: str) -> None:
    part = LAYOUTS[name]
    inputs = Inputs(part(drawn(2, 4, 6, 5)), part(drawn(2, 4, 6, 5, seed=1)))
    room = torch.full((2, 4, 10, 5), 9.0)
    done, _ = compute(Form(added=1.0), inputs, room[:, :, 2:8], 2)
    assert done
    assert torch.equal(room[:, :, 2:8], inputs.map + part(drawn(2, 4, 6, 5, seed=1)))
    assert bool((room[:, :, :2] == 9).all())
    assert bool((room[:, :, 8:] == 9).all())


TIMES = ((1, 1, 2, 2), (1, 1, 3, 1), (1, 1, 1, 2), (1, 1, 5, 3))


@crossed(
    2,
    shape=[(1, 1, 1, 1), (2, 5, 9, 3), (1, 35, 2, 7)],
    repeats=TIMES,
    last=[False, True],
    dtype=[torch.float32, *HALVES],
)
def test_upsampled_rows_are_what_float64_has(
    triton: Any, shape: tuple[int, ...], repeats: tuple[int, ...], last: bool, dtype: torch.dtype
) -> None:
    inputs = Inputs(drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1), line_of(*shape[:2]))
    inputs = inputs._replace(map=ordered(inputs.map, last))
    form = Form(scaled=True, first="silu", added=1.0, repeats=repeats)
    exact, rows = in_float64(form, inputs), shape[2] * repeats[2]
    for (above, below), first, end in (((0, 0), 0, rows), ((2, 1), 0, rows), ((1, 0), min(1, rows - 1), rows),
                                       ((0, 3), 0, max(rows - 1, 1))):  # fmt: skip
        room = torch.full((*shape[:2], above + end - first + below, shape[3] * repeats[3]), 9.0, dtype=dtype)
        room = ordered(room, not last)
        done, moments = compute(form, inputs, room, 2, above, not above + below, (first, end))
        wanted = F.pad(exact[:, :, first:end], (0, 0, above, below))
        assert done
        most = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps  # the interpreter cuts bfloat16 off
        assert float((room - wanted).abs().max()) <= most * float(exact.abs().max())
        assert (moments is None) == bool(above + below)
        if moments is not None:
            assert_moments(moments, room.double(), 1)


UPSAMPLED = [
    ((2, 4, 33), 2, (1, 1, 3)),
    ((2, 4, 3, 6, 5), 3, (1, 1, 2, 2, 2)),
    ((2, 4, 3, 6, 5), 3, (1, 1, 1, 3, 2)),
    ((2, 4, 3, 6, 5), 3, (1, 1, 4, 1, 1)),
    ((2, 4, 3, 6, 5), 2, (1, 1, 2, 1, 1)),
    ((2, 4, 3, 6, 5), 4, (1, 1, 1, 1, 2)),
    ((2, 4, 6, 5), 3, (1, 1, 2, 3)),
]


@pytest.mark.parametrize(("shape", "dim", "repeats"), UPSAMPLED)
def test_upsampled_along_any_dimension(triton: Any, shape: Any, dim: int, repeats: tuple[int, ...]) -> None:
    larger = drawn(*(size + 2 * (place == dim) for place, size in enumerate(shape)))
    inputs, form = Inputs(larger.narrow(dim, 1, shape[dim]), None, line_of(*shape[:2])), Form(True, repeats=repeats)
    padded = [size * times + 3 * (place == dim) for place, (size, times) in enumerate(zip(shape, repeats))]
    room = torch.full(padded, 9.0)
    done, _ = compute(form, inputs, room, dim, 1)
    exact = F.pad(in_float64(form, inputs), (*(0, 0) * (len(shape) - 1 - dim), 1, 2))
    assert done
    assert float((room - exact).abs().max()) <= 1e-6 * float(exact.abs().max())


def test_upsampled_halves_are_no_farther_from_float64_than_torchs(triton: Any) -> None:
    half, form = torch.float16, Form(scaled=True, first="silu", added=1.0, repeats=(1, 1, 2, 2))
    inputs = Inputs(drawn(1, 8, 20, 15, dtype=half), drawn(1, 8, 20, 15, dtype=half, seed=1), line_of(1, 8))
    assert inputs.line is not None
    assert inputs.other is not None
    out, exact = torch.empty(1, 8, 40, 30, dtype=half), in_float64(form, inputs)
    assert compute(form, inputs, out, 2)[0]
    mean, variance, scale, shift = inputs.line
    normed = F.batch_norm(inputs.map, mean, variance, scale, shift, eps=0.0)
    torchs = F.interpolate(F.silu(normed) + inputs.other, scale_factor=2.0, mode="nearest")
    ours, theirs = ((one - exact).square().mean().sqrt() for one in (out, torchs))
    assert 0 < float(ours) <= float(theirs)


def test_what_no_kernel_upsamples(triton: Any) -> None:
    map = drawn(1, 2, 3, 4, 6)
    for dim, repeats in ((4, (1, 1, 1, 2, 2)), (2, (1, 1, 2, 1, 2))):
        room = torch.empty([size * times for size, times in zip(map.shape, repeats)])
        assert compute(Form(repeats=repeats), Inputs(map), room, dim) == (False, None)


VIDEO = (2, 4, 3, 6, 5)


@pytest.mark.parametrize(("shape", "dim"), [((2, 4, 33), 2), (VIDEO, 3), (VIDEO, 2), (VIDEO, 4), ((2, 4, 6, 5), 3)])
def test_rows_along_any_dimension(triton: Any, shape: tuple[int, ...], dim: int) -> None:
    inputs, form = Inputs(drawn(*shape), None, line_of(*shape[:2])), Form(scaled=True, first="silu")
    padded = list(shape)
    padded[dim] += 3
    room = torch.full(padded, 9.0)
    done, _ = compute(form, inputs, room, dim, 1)
    exact = F.pad(in_float64(form, inputs), (*(0, 0) * (len(shape) - 1 - dim), 1, 2))
    assert done
    assert float((room - exact).abs().max()) <= 1e-6 * float(exact.abs().max())
    _, moments = compute(Form(), Inputs(inputs.map), None, dim, gathers=True)
    assert moments is not None
    assert_moments(moments, inputs.map.double(), 2)


def test_what_no_kernel_sees(triton: Any) -> None:
    apart = drawn(1, 4, 6, 10)[..., ::2][:, :, :, :4]
    assert compute(Form(), Inputs(apart), torch.empty(1, 4, 6, 4), 2) == (False, None)
    assert compute(Form(), Inputs(drawn(1, 4, 6, 4).double()), torch.empty(1, 4, 6, 4), 2) == (False, None)


def assert_moments(moments: Tensor, exact: Tensor, groups: int) -> None:
    """Mean and variance of groups of channels are those of a map in float64."""
    statistics = Statistics(groups, exact.shape[0])
    half = moments.shape[1] // 2
    for part in (moments[:, :half], moments[:, half:]):  # those of two strips
        statistics.add_moments(part, int(part[0].sum()))
    wide = exact.reshape(exact.shape[0], groups, -1)
    span = float(wide.std(-1, correction=0).max()) + 1e-30
    assert float((statistics.mean - wide.mean(-1)).abs().max()) <= 1e-6 * max(span, float(wide.abs().max()))
    torch.testing.assert_close(statistics.variance, wide.var(-1, correction=0), rtol=1e-5, atol=1e-12)
    assert int(statistics.state()[0]) == wide.shape[-1]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_moments_of_what_lies_far_from_zero(triton: Any, dtype: torch.dtype) -> None:
    map = (drawn(2, 6, 64, 40) / 10 + 30).to(dtype)
    _, moments = compute(Form(), Inputs(map), None, 2, gathers=True)
    assert moments is not None
    assert moments.shape[1] > 0
    assert_moments(moments, map.double(), 3)


def test_moments_are_of_what_is_written(triton: Any) -> None:
    map, other = drawn(1, 4, 40, 30, dtype=torch.bfloat16), drawn(1, 4, 40, 30, dtype=torch.bfloat16, seed=1)
    out = torch.empty_like(map)
    _, moments = compute(Form(added=1.0), Inputs(map, other), out, 2, gathers=True)
    assert moments is not None
    assert_moments(moments, out.double(), 2)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy's, of the interpreter
def test_infinities_and_nans_are_those_of_torch(triton: Any) -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 90.0, -90.0, -110.0, 1e38])
    map = values.view(1, 1, 2, 4)
    for kind, apply in {None: lambda x: x, "silu": F.silu, 0.0: F.relu, 0.2: lambda x: F.leaky_relu(x, 0.2)}.items():
        out = torch.empty_like(map)
        assert compute(Form(first=kind), Inputs(map), out, 2)[0]
        torch.testing.assert_close(out, apply(map), equal_nan=True)


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from comfyui_patchconv.streaming.execute.kernels.source import chain

FLOATS = ("inner", "added", "factor", "slope_first", "slope_second")
TARGETS = {"cubin": GPUTarget("cuda", 80, 32), "hsaco": GPUTarget("hip", "gfx942", 64)}
for kind, dtype, flags in (("cubin", "fp16", (1, 1, 1, 2, 1, 1)), ("hsaco", "bf16", (1, 1, 1, 3, 1, 1)),
                           ("cubin", "fp32", (0, 0, 0, 0, 0, 1))):
    constants = dict(zip(("SCALED", "FIRST", "ADDS", "SECOND", "WRITES", "GATHERS"), flags))
    constants |= dict.fromkeys(("FRAME_TIMES", "ROW_TIMES", "PIXEL_TIMES"), 1 + (dtype != "fp32"))
    constants |= {"PIXELS": 64, "CHANNELS": 32, "TURNS": 8}
    types = {"line": "*fp32", "moments": "*fp32"} | dict.fromkeys(("x", "other", "out"), "*" + dtype)
    types |= dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in chain.arg_names}
    compiled = triton.compile(ASTSource(chain, signature, constants), target=TARGETS[kind])
    print(len(compiled.asm[kind]))
"""


@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here(triton: Any, tmp_path: Path) -> None:
    if triton.__version__.startswith("3.2."):
        pytest.skip("Triton 3.2 names constants in another way, and links for AMD's GPUs only beside ROCm")
    environment = os.environ | {
        "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    (tmp_path / "compile.py").write_text(COMPILE, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "compile.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(int(line) > 1000 for line in done.stdout.split())
    assert len(done.stdout.split()) == 3


def test_moments_of_all_kinds_are_merged() -> None:
    map, statistics = drawn(2, 6, 30, 5).double() + 3, Statistics(3, 2)
    first, second, rest = map.split((10, 8, 12), 2)
    for part, channels in ((first, 6), (second, 3)):  # of channels as kernels have them, of groups as torch has them
        wide = part.reshape(2, channels, -1)
        squares = (wide - wide.mean(-1, keepdim=True)).square().sum(-1)
        moments = torch.stack((torch.full_like(squares, wide.shape[-1]), wide.mean(-1), squares))
        statistics.add_moments(moments[:, None], part.numel())
    statistics.add(rest)
    wide = map.reshape(2, 3, -1)
    torch.testing.assert_close(statistics.mean, wide.mean(-1))
    torch.testing.assert_close(statistics.variance, wide.var(-1, correction=0))
    other = Statistics(3, 2)
    other.merge([statistics.state(), statistics.state()], torch.device("cpu"))
    torch.testing.assert_close(other.variance, statistics.variance)
    assert int(other.state()[0]) == 2 * wide.shape[-1]


# Chains


class Block(nn.Module):
    """Stable Diffusion's residual block."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(2, out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.shortcut(x) + y) / 1.5


def decoder() -> nn.Module:
    torch.manual_seed(0)
    up = nn.Upsample(scale_factor=2.0, mode="nearest")
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), Block(8, 8), up, nn.Conv2d(8, 8, 3, padding=1), Block(8, 12),
        nn.GroupNorm(3, 12), nn.SiLU(), nn.Conv2d(12, 3, 3, padding=1),
    )  # fmt: skip
    return net.eval().requires_grad_(False)


@pytest.fixture
def chains(triton: Any, monkeypatch: pytest.MonkeyPatch) -> list[Chain]:
    """All chains that passes have."""
    seen: list[Chain] = []
    find = Kernels.chains_of

    def watched(kernels: Kernels, *given: Any) -> dict[Any, Chain]:
        found = find(kernels, *given)
        seen.extend(found.values())
        return found

    monkeypatch.setattr(Kernels, "chains_of", watched)
    return seen


def kinds(chain: Chain) -> list[str]:
    return [link.element.kind for link in chain.links]


@pytest.fixture
def upsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where an upsampled map is convolved as it is."""
    monkeypatch.setattr(convolution, "_is_doubled", lambda *_: False)


def test_which_steps_are_one(chains: list[Chain], upsampled: None) -> None:
    x = drawn(1, 4, 12, 9)
    model = decoder()
    with torch.inference_mode():
        streamed(model, tuning=SMALL)(x)
    found = [kinds(chain) for chain in chains]
    assert found.count(["scale", "silu"]) == 5
    assert found.count(["add", "multiply"]) == 2
    assert found.count(["repeat"]) == 1
    convolved = [["scale", "silu"], ["repeat"]]
    assert all(chain.convolution is not None for chain in chains if kinds(chain) in convolved)


TIMES_OF = {"nearest": (2, 2), "exact": (2, 4), "rows": (3, 1), "pixels": (1, 2)}


def upsampling(name: str, weight: Tensor) -> Any:
    def run(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight, padding=1)
        y = {
            "nearest": lambda: F.interpolate(y, scale_factor=2.0, mode="nearest"),
            "exact": lambda: F.interpolate(y, scale_factor=(2.0, 4.0), mode="nearest-exact"),
            "rows": lambda: y.repeat_interleave(3, 2),
            "pixels": lambda: y.repeat_interleave(2, 3),
        }[name]()
        return F.conv2d(F.silu(y) * 1.5, weight, padding=1)

    return run


@pytest.mark.parametrize("name", TIMES_OF)
def test_upsampling_is_a_part_of_what_a_convolution_reads(
    launched: list[dict[str, Any]], chains: list[Chain], name: str
) -> None:
    x, times, run = drawn(1, 4, 25, 9), TIMES_OF[name], upsampling(name, drawn(4, 4, 3, 3) / 5)
    with torch.inference_mode():
        torch.testing.assert_close(streamed(run, tuning=SMALL)(x), run(x), rtol=1e-5, atol=1e-5)
    assert [kinds(chain) for chain in chains] == [["repeat", "silu", "multiply"]]
    assert chains[0].convolution is not None
    assert len(launched) > 3
    assert {(one["ROW_TIMES"], one["PIXEL_TIMES"]) for one in launched} == {times}


def test_what_is_upsampled_is_computed_once(
    launched: list[dict[str, Any]], chains: list[Chain], upsampled: None
) -> None:
    """Rows that a convolution gives are kept as they are, and what is upsampled is made of them for each strip."""
    weight = drawn(4, 4, 3, 3) / 5

    def run(x: Tensor) -> Tensor:
        y = F.leaky_relu(F.conv2d(x, weight, padding=1), 0.2) * 0.5 + x
        return F.conv2d(F.interpolate(y, scale_factor=2.0, mode="nearest"), weight, padding=1)

    with torch.inference_mode():
        x = drawn(1, 4, 25, 9)
        torch.testing.assert_close(streamed(run, tuning=SMALL)(x), run(x), rtol=1e-5, atol=1e-5)
    assert [kinds(chain) for chain in chains] == [["leaky_relu", "multiply", "add"], ["repeat"]]
    assert chains[1].convolution is not None
    assert launched


def test_what_is_read_twice_is_no_part_of_a_chain(chains: list[Chain]) -> None:
    weight = drawn(4, 4, 3, 3)

    def run(x: Tensor) -> Tensor:
        y = F.silu(F.conv2d(x, weight, padding=1))
        return F.relu(y) + F.relu(y * 2.0)

    with torch.inference_mode():
        x = drawn(1, 4, 20, 9)
        assert torch.allclose(streamed(run, tuning=SMALL)(x), run(x), atol=1e-6)
    assert [kinds(chain) for chain in chains] == [["silu"], ["multiply", "relu"], ["relu", "add"]] or [
        kinds(chain) for chain in chains
    ] == [["silu"], ["relu"], ["multiply", "relu", "add"]]


def test_what_the_program_keeps_stays(chains: list[Chain]) -> None:
    weight, kept = drawn(4, 4, 3, 3), []

    def run(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight, padding=1)
        kept.append(y)
        return F.conv2d(F.silu(y) * 2.0 + x, weight, padding=1)

    with torch.inference_mode():
        x = drawn(1, 4, 20, 9)
        result, expected = streamed(run, tuning=SMALL)(x), run(x)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(kept[0] + 0.0, kept[1])
    assert ["silu", "multiply", "add"] in [kinds(chain) for chain in chains]


def test_steps_are_one_where_a_kernel_does_them(chains: list[Chain], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCONV_KERNELS", "torch")
    with torch.inference_mode():
        streamed(decoder(), tuning=SMALL)(drawn(1, 4, 12, 9))
    assert not chains


# Whole networks


def exactness(result: Tensor, eager: Tensor, exact: Tensor) -> None:
    ours, theirs = ((one.double() - exact).square().mean().sqrt() for one in (result, eager))
    if result.dtype == torch.float32:
        assert float((result - eager).abs().max()) <= 1e-5 * float(exact.max() - exact.min())
    else:
        assert 0 < float(ours) <= 1.05 * float(theirs)


@crossed(1, dtype=[torch.float32, *HALVES], budget=[None, 1])
def test_a_decode_by_kernels(
    launched: list[dict[str, Any]], upsampled: None, dtype: torch.dtype, budget: Optional[int]
) -> None:
    model, x = decoder(), drawn(1, 4, 10, 7)
    model, x = model.to(dtype), x.to(dtype)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        eager = model(x)
        result = streamed(model, budget=budget, tuning=SMALL)(x)
        exact = model.double()(x.double())
    exactness(result, eager, exact)
    fused = [one for one in launched if one["SCALED"] and one["FIRST"] and one["WRITES"]]
    assert len(fused) > 5
    assert any(one["ADDS"] and one["GATHERS"] for one in launched), "a residual's statistics were not gathered with it"
    assert any(one["GATHERS"] and not one["WRITES"] for one in launched)
    assert any(one["ROW_TIMES"] == one["PIXEL_TIMES"] == 2 for one in launched)


def test_a_batch_of_two_videos_by_kernels(launched: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv3d(6, 4, 3, padding=1), nn.GroupNorm(2, 4)
    ).requires_grad_(False)
    x = drawn(2, 4, 3, 12, 5)
    with torch.inference_mode():
        exactness(streamed(model, tuning=SMALL)(x), model(x), model.double()(x.double()))
    assert launched


def test_an_upscaler_by_kernels(launched: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)).requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        for conv in convs:
            x = F.leaky_relu(conv(x), 0.2) * 0.2 + x
        return x

    with torch.inference_mode():
        x = drawn(1, 4, 24, 7)
        exactness(streamed(run, tuning=SMALL)(x), run(x), x.double())
    assert any(one["FIRST"] == 2 and one["ADDS"] for one in launched)


# comfy-kitchen's kernel: its eager backend, which gives on a CPU what its others give elsewhere


@pytest.fixture
def kitchen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What its operator is given."""
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed: pip install comfy-kitchen")
    if by_kitchen.operator() is None:
        pytest.skip("this comfy-kitchen takes no statistics: 0.2.40 does")
    monkeypatch.setenv("PATCHCONV_KERNELS", "kitchen")
    seen: list[Any] = []
    found: Any = by_kitchen.operator()
    monkeypatch.setattr(by_kitchen, "operator", lambda: lambda *given: seen.append(given) or found(*given))
    yield seen
    by_kitchen._failures.seen.clear()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "dim"), [((2, 16, 5, 7), 2), ((1, 8, 5, 7), 3), ((2, 8, 3, 5, 7), 3)])
@pytest.mark.parametrize("silu", [True, False])
def test_a_norm_by_the_kitchen_is_what_float64_has(
    kitchen: list[Any], shape: tuple[int, ...], dim: int, silu: bool, dtype: torch.dtype
) -> None:
    form, line = Form(scaled=True, first="silu" if silu else None), line_of(*shape[:2])
    line[2, 3] = 0.0  # a channel that its norm makes one value of
    inputs = Inputs(drawn(*shape, dtype=dtype), None, line)
    found = by_kitchen.compute(form, inputs.map, by_kitchen.statistics(line, shape), dim, 2, 1)
    pad = (*(0, 0) * (len(shape) - 1 - dim), 2, 1)
    exact = F.pad(in_float64(form, inputs), pad)
    normed = in_float64(Form(scaled=True), inputs).to(dtype)
    torchs = F.pad(F.silu(normed) if silu else normed, pad)
    assert found is not None
    ours, theirs = ((one - exact).square().mean().sqrt() for one in (found, torchs))
    assert float(ours) <= 1.01 * float(theirs)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_decode_by_the_kitchen(kitchen: list[Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 3, padding=1),
        nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3, padding=1),
    )  # fmt: skip
    model.requires_grad_(False).to(dtype=dtype, memory_format=LAST)
    x = drawn(1, 4, 40, 17).to(dtype, memory_format=LAST)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        eager, result = model(x), streamed(model, tuning=SMALL)(x)
        exact = model.double()(x.double())
    exactness(result, eager, exact)
    assert len(kitchen) > 4
    assert {given[5][2] + given[5][3] for given in kitchen} >= {0, 1}, "no edge was padded, or nothing else"


def test_a_kitchen_that_fails_leaves_the_work_to_torch(kitchen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(by_kitchen, "operator", lambda: fails)
    half = torch.bfloat16
    model = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 3, padding=1)).requires_grad_(False).to(half)
    x = drawn(1, 16, 40, 17).to(half, memory_format=LAST)
    with torch.inference_mode(), pytest.warns(RuntimeWarning, match="comfy-kitchen could not run a kernel .*no kernel"):
        result = streamed(model, tuning=SMALL)(x)
    torch.testing.assert_close(result, model(x), rtol=2e-2, atol=2e-2)
    assert not by_kitchen.works()


# Where kernels are not


@pytest.fixture
def failing(triton: Any, monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """What launches raise, the first one first; behind these they work."""
    from comfyui_patchconv.streaming.execute.kernels import source

    errors: list[BaseException] = []
    kernel: Any = source.chain

    class Failing:
        def __getitem__(self, grid: Any) -> Any:
            if errors:
                raise errors.pop(0)
            return kernel[grid]

    monkeypatch.setattr(source, "chain", Failing())
    return errors


def test_a_kernel_that_fails_leaves_the_work_to_torch(failing: list[BaseException], launched: Any) -> None:
    model, x = decoder(), drawn(1, 4, 10, 7)
    failing.append(RuntimeError("ptxas fatal: no such architecture\nand more"))
    with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = streamed(model, tuning=SMALL)(x)
        assert torch.allclose(result, model(x), atol=1e-5)
    told = [str(one.message) for one in caught if "Triton" in str(one.message)]
    assert len(told) == 1
    assert "RuntimeError: ptxas fatal: no such architecture)" in told[0]
    assert "PATCHCONV_KERNELS=torch" in told[0]
    assert not launched, "kernels were launched behind one that failed"


def test_memory_that_runs_out_in_a_kernel_halves_the_strip(failing: list[BaseException], launched: Any) -> None:
    model, x = decoder(), drawn(1, 4, 10, 7)
    failing.append(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        result = streamed(model, tuning=Tuning(strip_bytes=60_000, always=True))(x)
        assert torch.allclose(result, model(x), atol=1e-5)
    assert launched


def test_an_interrupt_in_a_kernel_ends_the_call(failing: list[BaseException]) -> None:
    failing.append(KeyboardInterrupt())
    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        streamed(decoder(), tuning=SMALL)(drawn(1, 4, 10, 7))
    assert by_triton.works()


@pytest.mark.parametrize(
    ("version", "expected"), [("2.1.0", False), ("3.1.0", False), ("3.2.0", True), ("3.10.0", True)]
)
def test_a_triton_that_no_kernel_ran_by_is_as_none(
    triton: Any, version: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    choice.has_triton.cache_clear()
    assert choice.has_triton() is expected
    assert choice.uses_triton(torch.device("cpu")) is expected


def test_torch_is_chosen(launched: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCONV_KERNELS", "torch")
    model, x = decoder(), drawn(1, 4, 10, 7)
    with torch.inference_mode():
        assert torch.allclose(streamed(model, tuning=SMALL)(x), model(x), atol=1e-5)
    assert not launched


def test_a_choice_that_is_none_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCONV_KERNELS", "cuda")
    done: list[int] = []
    with torch.inference_mode(), pytest.raises(ValueError, match="PATCHCONV_KERNELS=cuda is none of auto, torch"):
        streamed(decoder(), tuning=SMALL, on_progress=lambda work, all: done.append(work))(drawn(1, 4, 10, 7))
    assert not done
