"""Random programs for streaming: Python text drawn from a seed, for maps of a few rows.

`random_program(seed)` gives one and its inputs. As a command, run from anywhere, it compares streamed with eager:

    python tests/streaming/programs.py FIRST LAST      # a line for each seed that fails, and a count at the end
    python tests/streaming/programs.py --show SEED     # the program, how it is streamed, and what went wrong
    python tests/streaming/programs.py --reduce SEED   # fewer and simpler lines that fail in the same way
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    __package__ = "streaming"

from comfyui_patchconv.streaming import Tuning, streamed

from .comparing import MODES, DiffersError, assert_alike, copied, random_states, seed_all, sharing

LARGEST, HIGHEST = 6_000, 1e4  # elements of a map, and values in it
PRECISION = {torch.float64: (1e-15, 1e-9), torch.float32: (6e-8, 1e-4), torch.bfloat16: (4e-3, 0.1)}


@dataclass
class Program:
    """A function in Python text, and the constants it reads. Each call gives the same for the same torch seed."""

    seed: int
    lines: list[str]
    names: list[str]
    constants: dict[str, Tensor]
    returned: list[str]
    tolerance: float = 1e-9
    _function: Optional[Callable[..., Any]] = field(default=None, repr=False, compare=False)

    @property
    def text(self) -> str:
        body = [part for line in self.lines for part in line.splitlines()]
        result = "return " + ", ".join(self.returned) + ","
        return "\n    ".join([f"def program({', '.join(self.names)}):", "kept, said = [], []", *body, result])

    def __call__(self, *inputs: Tensor) -> Any:
        if self._function is None:
            namespace = _namespace(self.constants)
            exec(compile(self.text, f"<program {self.seed}>", "exec"), namespace)
            self._function = namespace["program"]
        assert self._function is not None
        return self._function(*inputs)

    def __str__(self) -> str:
        constants = [f"# {name}: {_described(value)}" for name, value in self.constants.items() if name in self.text]
        return "\n".join([*constants, self.text])


def _namespace(constants: dict[str, Tensor]) -> dict[str, Any]:
    return {"torch": torch, "F": F, "np": np, "math": math, **constants}


def _described(value: Tensor) -> str:
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype} {tuple(value.shape)} with strides {value.stride()}"


def random_program(seed: int) -> tuple[Program, tuple[Tensor, ...]]:
    """A program that eager runs in both modes without an error, and whose results do not hang on the last digit."""
    for attempt in range(100):
        maker = _Maker(seed, random.Random(f"{seed} {attempt}"))
        program = maker.program()
        if program is not None:
            return program, maker.inputs
    raise RuntimeError(f"Found no program for the seed {seed}.")


class _Rounding(TorchDispatchMode):
    """Changes the last digits of what sums, so that a program that magnifies these is seen."""

    NAMES = (
        "convolution", "mm", "bmm", "addmm", "baddbmm", "mean", "sum", "var", "var_mean", "std", "std_mean", "exp",
        "native_group_norm", "native_layer_norm", "native_batch_norm", "_native_batch_norm_legit_no_training",
        "native_batch_norm_backward", "_softmax", "_log_softmax", "logsumexp", "grid_sampler_2d", "cumsum", "tanh",
        "sigmoid", "silu", "gelu", "elu", "softplus", "mish", "linalg_vector_norm", "norm", "sin", "rsqrt", "sqrt",
        "div", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_bilinear2d",
        "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math", "_fused_rms_norm", "mv",
        "dot", "einsum", "index_add", "prod", "pow",
    )  # fmt: skip

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        known = name in self.NAMES or ("norm" in name and not name.endswith("_"))
        if known and isinstance(args[0], Tensor) and args[0].dtype in PRECISION:
            args = (self.rounded(args[0]), *args[1:])
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if known and isinstance(first, Tensor) and first.dtype in PRECISION:
            first.copy_(self.rounded(first))
        return out

    def rounded(self, value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=self.generator, dtype=torch.float64)
        return value * (1 + PRECISION[value.dtype][0] * noise).to(value.dtype)


Lines = Optional[str]
Step = Callable[["_Maker"], Lines]


class _Maker:
    """Draws one line after the other, each tried on the values that the lines before gave."""

    def __init__(self, seed: int, draw: random.Random) -> None:
        self.seed, self.draw = seed, draw
        self.generator = torch.Generator().manual_seed(draw.randrange(1 << 40))
        self.dtype = draw.choice([torch.float64] * 6 + [torch.float32])
        self.lines: list[str] = []
        self.constants: dict[str, Tensor] = {}
        self.count = 0
        self.inputs = self._inputs()
        self.namespace: dict[str, Any] = {}
        self.start()

    # What a step asks for

    def new(self) -> str:
        self.count += 1
        return f"y{self.count}"

    def value(self, name: str) -> Tensor:
        return self.namespace[name]

    def maps(self, dims: Optional[int] = None) -> list[str]:
        """Names of the tensors of floating point numbers, oldest first."""
        return [
            name
            for name, value in self.namespace.items()
            if name[0] in "xzy" and isinstance(value, Tensor) and value.is_floating_point() and value.dim()
            if dims is None or value.dim() == dims
        ]

    def any(self, dims: Optional[int] = None) -> str:
        """A map, as a rule one of the last. Raises LookupError where there is none of so many dimensions."""
        found = self.maps(dims)
        if not found:
            raise LookupError
        return found[-1] if self.draw.random() < 0.6 else self.draw.choice(found[-6:])

    def constant(self, *shape: int, like: Optional[str] = None, scale: float = 1.0) -> str:
        name = f"W{len(self.constants)}"
        dtype = self.dtype if like is None else self.value(like).dtype
        self.constants[name] = (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(dtype)
        self.namespace[name] = self.constants[name].clone()
        return name

    def weight(self, *shape: int, like: str) -> str:
        return self.constant(*shape, like=like, scale=math.prod(shape[1:]) ** -0.5)

    def other(self, name: str) -> str:
        """Something that can be added to the map: another map, a part of one, or a constant."""
        value = self.value(name)
        alike = [n for n in self.maps() if self.value(n).shape == value.shape and self.value(n).dtype == value.dtype]
        if len(alike) > 1 and self.draw.random() < 0.6:
            return self.draw.choice([n for n in alike if n != name])
        shape = [self.draw.choice([1, size]) for size in value.shape]
        return self.constant(*shape[self.draw.randrange(len(shape)) :], like=name)

    def axis(self, name: str, least: int = 1) -> int:
        found = [i for i, size in enumerate(self.value(name).shape) if size >= least]
        if not found:
            raise LookupError
        return self.draw.choice(found)

    def axes(self, name: str) -> tuple[int, ...]:
        dims = self.value(name).dim()
        return tuple(sorted(self.draw.sample(range(dims), self.draw.randint(1, dims))))

    def index(self, name: str) -> str:
        """An index by integers and slices that leaves at least one dimension."""
        shape = self.value(name).shape
        parts: list[str] = []
        for size in shape[: self.draw.randint(1, len(shape))]:
            first = self.draw.randrange(size)
            last, step = self.draw.randint(first + 1, size), self.draw.choice([1, 1, 2, 3])
            texts = [":", ":", f"{first}:", f":{last}", f"{first}:{last}", f"{first}::{step}", f"{-last}:"]
            parts.append(self.draw.choice([*texts, str(first)]))
        if len(parts) == len(shape) and all(":" not in part for part in parts):
            parts[-1] = ":"
        return self.draw.choice(["", "", "..., "]) + ", ".join(parts) if len(parts) < 3 else ", ".join(parts)

    def view(self, name: str) -> str:
        """An expression for a view of the map (or what eager makes a copy of)."""
        value, draw = self.value(name), self.draw
        dims, shape = value.dim(), tuple(value.shape)
        order = draw.sample(range(dims), dims)
        one, two = draw.randrange(dims), draw.randrange(dims)
        low, high = min(one, two), max(one, two)
        axis = self.axis(name, 2)
        size = shape[axis]
        first = draw.randrange(size)
        choices = [
            f"{name}.permute({', '.join(map(str, order))})",
            f"{name}.transpose({one}, {two})",
            f"{name}.movedim({one}, {two})",
            f"{name}.flatten({low}, {high})",
            f"{name}.unsqueeze({draw.randint(0, dims)})",
            f"{name}[{self.index(name)}]",
            f"{name}[{self.index(name)}]",
            f"{name}.select({axis}, {first})",
            f"{name}.narrow({axis}, {first}, {draw.randint(1, size - first)})",
            f"{name}.split({draw.randint(1, size)}, {axis})[0]",
            f"{name}.chunk(2, {axis})[-1]",
            f"{name}.unbind({axis})[{first}]",
            f"{name}.unfold({axis}, {draw.randint(1, min(size, 3))}, {draw.randint(1, 3)})",
            f"{name}.reshape({_reshaped(draw, shape)})",
            f"{name}.view({_reshaped(draw, shape)})",
            f"{name}.reshape(-1)",
            f"{name}.squeeze()",
            f"{name}.detach()",
            f"{name}.data",
            f"{name}.tensor_split([{first}], {axis})[1]",
            f"{name}.contiguous()",
            f"{name}.to({name}.dtype)",
            f"{name}.expand({draw.randint(1, 2)}, {', '.join(map(str, shape))})",
            f"{name}.view_as({name})",
        ]
        if dims > 1:
            choices.append(f"{name}.diagonal({draw.randint(-1, 1)}, {axis}, {(axis + 1) % dims})")
        for factor in (2, 3):
            if size % factor == 0:
                choices.append(f"{name}.unflatten({axis}, ({size // factor}, {factor}))")
        if dims == 4:
            choices.append(f"{name}.contiguous(memory_format=torch.channels_last)")
            choices += [f"{name}.flatten(2).transpose(1, 2)", f"{name}.permute(0, 2, 3, 1)"] * 2
        return draw.choice(choices)

    # Trying

    def start(self) -> None:
        """The values after the lines so far."""
        seed_all(self.seed)
        self.namespace = _namespace({name: value.clone() for name, value in self.constants.items()})
        self.namespace.update(zip("xz", copied(self.inputs)), kept=[], said=[])
        with torch.no_grad():
            for line in self.lines:
                exec(line, self.namespace)

    def accept(self, line: str) -> bool:
        try:
            with torch.no_grad():
                exec(line, self.namespace)
            if all(self._sound(value) for name, value in self.namespace.items() if name[0] in "xzy"):
                self.lines.append(line)
                return True
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, AttributeError, KeyError):
            pass
        self.start()
        return False

    def _sound(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return True
        if not 0 < value.numel() <= LARGEST or value.dim() > 7:
            return False
        return not value.is_floating_point() or bool((value.abs() < HIGHEST).all())

    def program(self) -> Optional[Program]:
        more: dict[Step, int] = {rare: 30} if self.seed >= RARE_FROM else {}
        for _ in range(self.draw.randint(3, 20)):
            with suppress(LookupError):
                line = self.draw.choices([*STEPS, *more], [*WEIGHTS, *more.values()])[0](self)
                if line is not None:
                    self.accept(line)
        found = self._finished()
        return found if len(self.lines) > 1 and self._holds(found) else None

    def _finished(self) -> Program:
        names = [name for name in self.namespace if name[0] in "y" and isinstance(self.namespace[name], Tensor)]
        last = names[-1:]
        chosen = self.draw.sample(names, min(len(names), self.draw.choice([0, 0, 1, 2, 4])))
        returned = [*dict.fromkeys(chosen + last)] or ["x"]
        used = {v.dtype for v in self.namespace.values() if isinstance(v, Tensor) and v.is_floating_point()}
        text = "\n".join(self.lines)
        used |= {dtype for dtype in PRECISION if str(dtype) in text}
        tolerance = max(PRECISION[dtype][1] for dtype in used)
        return Program(self.seed, self.lines, ["x", "z"], self.constants, [*returned, "kept", "said"], tolerance)

    def _holds(self, program: Program) -> bool:
        """It runs in both modes, and its results with other last digits are the same."""
        runs: list[Callable[[], AbstractContextManager[Any]]] = [nullcontext, torch.inference_mode]
        runs += [partial(_Rounding, seed) for seed in range(3)]
        results: list[Any] = []
        try:
            for run in runs:
                inputs = copied(self.inputs)
                seed_all(self.seed)
                with torch.no_grad(), run():
                    results.append((program(*inputs), inputs))
                assert_alike(results[-1], results[0], program.tolerance / 50)
        except (RuntimeError, AssertionError):
            return False
        return True

    def _inputs(self) -> tuple[Tensor, ...]:
        """A map and something beside it, in any layout; sometimes they share memory."""
        draw = self.draw
        shape = [draw.randint(1, 2), draw.choice([2, 3, 4, 4]), draw.randint(5, 15), draw.randint(4, 9)]
        if draw.random() < 0.12:
            shape.insert(2, draw.randint(1, 3))
        elif draw.random() < 0.1:
            shape.pop(3)
        x = self._laid_out(shape)
        if draw.random() < 0.1:
            return x, draw.choice([x, x[:, :1], x.transpose(-1, -2), x.flatten(), x[..., 1:]])
        kinds = [shape, [1, shape[1], *[1] * (len(shape) - 2)], shape[-1:], [shape[0], 1, *shape[2:]], [3, 5]]
        return x, self._laid_out(draw.choice([shape, *kinds]))

    def _laid_out(self, shape: list[int]) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=self.dtype)
        kind = self.draw.randrange(8)
        if kind == 0:
            order = self.draw.sample(range(len(shape)), len(shape))
            back = [order.index(i) for i in range(len(shape))]
            return values.permute(order).contiguous().permute(back)
        if kind in (1, 2) and len(shape) in (4, 5):
            return values.contiguous(memory_format=[torch.channels_last, torch.channels_last_3d][len(shape) - 4])
        if kind == 3:
            room = torch.randn([size + 1 for size in shape], generator=self.generator, dtype=self.dtype)
            return room[tuple(slice(1, None) for _ in shape)]
        return values


def _reshaped(draw: random.Random, shape: tuple[int, ...]) -> str:
    """Other sizes for the same number of elements."""
    sizes = list(shape)
    for _ in range(draw.randint(1, 2)):
        if len(sizes) > 1 and draw.random() < 0.5:
            at = draw.randrange(len(sizes) - 1)
            sizes[at : at + 2] = [sizes[at] * sizes[at + 1]]
        else:
            at = draw.randrange(len(sizes))
            factor = draw.choice([f for f in range(1, sizes[at] + 1) if sizes[at] % f == 0])
            sizes[at : at + 1] = [factor, sizes[at] // factor]
    if draw.random() < 0.3:
        sizes[draw.randrange(len(sizes))] = -1
    return ", ".join(map(str, sizes))


# Steps: each gives the lines to add, or None. `m` is the maker.


def pointwise(m: _Maker) -> Lines:
    y = m.any()
    texts = (
        "F.silu({y})", "F.gelu({y})", "torch.tanh({y})", "{y}.sigmoid()", "F.relu({y})", "F.leaky_relu({y}, 0.2)",
        "{y}.abs()", "-{y}", "{y} * 0.5 + 1", "{y}.clamp(-1, 1)", "{y}.square() * 0.1", "F.elu({y})", "1 - {y}",
        "F.softplus({y})", "F.hardswish({y})", "torch.where({y} > 0, {y}, {y} * 0.1)", "{y}.clone()",
        "{y}.detach() * 2", "{y} / ({y}.abs() + 1)", "F.mish({y})", "torch.exp(-{y}.abs())", "torch.sin({y})",
        "{y}.masked_fill({y} > 1, 0.5)", "F.hardtanh({y})", "torch.nan_to_num({y})", "{y} ** 2 * 0.3",
        "torch.rsqrt({y}.square() + 1)", "{y}.mul(torch.tensor(0.7))", "F.softshrink({y})", "{y}.to({y}.dtype) + 0",
        "2 / (1 + {y}.abs())", "F.threshold({y}, 0.1, -1.0)", "torch.addcmul({y}, {y}, {y}, value=0.1)",
    )  # fmt: skip
    return f"{m.new()} = {m.draw.choice(texts).format(y=y)}"


def combined(m: _Maker) -> Lines:
    y = m.any()
    z = m.other(y)
    y, z = m.draw.choice([(y, z), (z, y)])
    texts = (
        "{y} + {z}", "{y} - {z}", "{y} * {z}", "torch.maximum({y}, {z})", "torch.where({z} > 0, {y}, {z})",
        "torch.lerp({y}, {z}, 0.3)", "{z}.sigmoid() * {y}", "torch.add({y}, {z}, alpha=0.5)", "torch.minimum({y}, {z})",
        "torch.addcmul({y}, {z}, {z}, value=0.2)", "{y} / ({z}.abs() + 1)", "torch.atan2({y}, {z}.abs() + 0.5)",
    )  # fmt: skip
    return f"{m.new()} = {m.draw.choice(texts).format(y=y, z=z)}"


def viewed(m: _Maker) -> Lines:
    return f"{m.new()} = {m.view(m.any())}"


def viewed_and_computed(m: _Maker) -> Lines:
    y, n = m.any(), m.new()
    return f"{n} = {m.view(y)}\n{n} = {n} * 1.5"


def split(m: _Maker) -> Lines:
    y = m.any()
    axis = m.axis(y, 2)
    size = m.value(y).shape[axis]
    first = m.draw.randint(1, size - 1)
    a, b = m.new(), m.new()
    texts = (f"{y}.split([{first}, {size - first}], {axis})", f"{y}.tensor_split(2, {axis})", f"{y}.chunk(2, {axis})")
    return f"{a}, {b} = {m.draw.choice(texts)}"


def moved(m: _Maker) -> Lines:
    y = m.any()
    axis = m.axis(y)
    size = m.value(y).shape[axis]
    order = m.draw.choices(range(size), k=m.draw.randint(1, size))
    counts = [m.draw.randint(0, 2) for _ in range(size)]
    colons = ":, " * axis
    texts = (
        f"{y}.flip({axis})", f"{y}.roll({m.draw.randint(-3, 3)}, {axis})", f"{y}.repeat_interleave(2, {axis})",
        f"{y}.index_select({axis}, torch.tensor({order}))", f"{y}[{colons}{order}]",
        f"{y}[{colons}torch.tensor({order})]", f"torch.repeat_interleave({y}, torch.tensor({counts}), dim={axis})",
        f"{y}.tile(2)", f"torch.rot90({y}, 1, (-2, -1))", f"torch.take_along_dim({y}, {y}.argsort({axis}), {axis})",
        f"{y}.sort({axis})[0]", f"{y}.topk(1, {axis})[0]", f"{y}.cumsum({axis}) * 0.2", f"torch.tril({y})",
        f"{y}.diff(dim={axis})", f"{y}.repeat({'1, ' * axis}2)",
    )  # fmt: skip
    return f"{m.new()} = {m.draw.choice(texts)}"


def reduced(m: _Maker) -> Lines:
    y = m.any()
    axes, keep = m.axes(y), m.draw.choice([True, True, False])
    axis = m.axis(y)
    rest = f"{axes}, keepdim={keep}"
    texts = (
        f"{y}.mean({rest})", f"{y}.sum({rest}) * 0.1", f"{y}.amax({rest})", f"{y}.amin({rest})", f"{y}.std({rest})",
        f"{y}.var({rest})", f"{y}.var({axes}, unbiased=False, keepdim={keep})", f"torch.var_mean({y}, {rest})[1]",
        f"{y}.logsumexp({rest})", f"{y}.max({axis}, keepdim={keep})[0]", f"{y}.norm(dim={rest})",
        f"{y}.mean().reshape(1)", f"{y}.mean({rest}).sqrt().nan_to_num()", f"torch.linalg.vector_norm({y}, dim={rest})",
        f"{y}.sum().view(1) * 0.01", f"{y}.amax().unsqueeze(0)", f"{y}.argmax({axis}, keepdim={keep}).to({y}.dtype)",
        f"{y}.abs().mean({rest})",
    )  # fmt: skip
    return f"{m.new()} = {m.draw.choice(texts)}"


def centred(m: _Maker) -> Lines:
    """A reduction, and the map with it."""
    y, n = m.any(), m.new()
    axes = m.axes(y)
    texts = (
        f"{y} - {y}.mean({axes}, keepdim=True)",
        f"{y} * torch.rsqrt({y}.square().mean({axes}, keepdim=True) + 1e-3)",
        f"({y} - {y}.mean({axes}, keepdim=True)) / ({y}.var({axes}, keepdim=True, unbiased=False) + 0.1).sqrt()",
        f"{y}.mean({axes}, keepdim=True).sigmoid() * {y}",
        f"{y} * {y}.mean({axes}, keepdim=True).sigmoid()",
        f"{y} - {y}.amax({axes}, keepdim=True)",
        f"{y}.softmax({axes[0]})",
        f"{y}.log_softmax({axes[0]})",
        f"F.normalize({y}, dim={axes[0]}, eps=0.1)",
        f"{y} + {y}.amin({axes}, keepdim=True)",
        f"{y} / ({y}.abs().sum({axes}, keepdim=True) + 1)",
    )
    return f"{n} = {m.draw.choice(texts)}"


def normed(m: _Maker) -> Lines:
    y = m.any()
    value = m.value(y)
    if value.dim() < 3:
        return None
    channels, last = value.shape[1], value.shape[-1]
    groups = m.draw.choice([g for g in range(1, channels + 1) if channels % g == 0])
    weight, bias = m.constant(channels, like=y), m.constant(channels, like=y)
    wide, offset = m.constant(last, like=y), m.constant(last, like=y)
    variance = f"{m.constant(channels, like=y)}.abs() + 0.5"
    texts = [
        f"F.group_norm({y}, {groups}, {weight}, {bias}, 1e-3)", f"F.group_norm({y}, {groups}, eps=1e-3)",
        f"F.group_norm({y}, {groups}, {weight}, {bias}, 1e-3)", f"F.instance_norm({y}, eps=1e-3)",
        f"F.layer_norm({y}, ({last},), {wide}, {offset}, 1e-3)", f"F.batch_norm({y}, {bias}, {variance}, {weight})",
        f"F.layer_norm({y}, {tuple(value.shape[-2:])}, eps=1e-3)", f"F.local_response_norm({y}, 2)",
        f"F.layer_norm({y}, {tuple(value.shape[1:])}, eps=1e-3)",
        f"F.batch_norm({y}, None, None, training=True, eps=1e-3)",
    ]  # fmt: skip
    if hasattr(F, "rms_norm"):
        texts.append(f"F.rms_norm({y}, ({last},), {wide}, 1e-3)")
    if value.dim() == 4:
        texts.append(f"F.layer_norm({y}.permute(0, 2, 3, 1), ({channels},), eps=1e-3).permute(0, 3, 1, 2)")
    return f"{m.new()} = {m.draw.choice(texts)}"


def convolved(m: _Maker) -> Lines:
    """1-D, 2-D or 3-D by the dimensions of the map; transposed or not."""
    y = m.any(m.draw.choice([3, 4, 4, 4, 4, 5]))
    value, draw = m.value(y), m.draw
    sides, channels = value.dim() - 2, value.shape[1]
    groups = draw.choice([g for g in range(1, channels + 1) if channels % g == 0] + [1, 1])
    out = groups * draw.randint(1, max(1, 4 // groups))
    kernel = [draw.choice([1, 2, 3, 3]) for _ in range(sides)]
    dilation = [draw.choice([1, 1, 2]) for _ in range(sides)]
    stride = [draw.choice([1, 1, 1, 2, 3]) for _ in range(sides)]
    padding: Union[str, list[int]] = [draw.randint(0, d * (k - 1)) for k, d in zip(kernel, dilation)]
    if draw.random() < 0.25:
        if draw.random() < 0.6:
            kernel, stride, padding = [min(k, 2) for k in kernel], [min(s, 2) for s in stride], [0] * sides
            dilation = [1] * sides
        weight = m.weight(channels, out // groups, *kernel, like=y)
        bias = draw.choice(["None", m.constant(out, like=y)])
        rest = f"{stride}, {padding}, {[0] * sides}, {groups}, {dilation}"
        return f"{m.new()} = F.conv_transpose{sides}d({y}, {weight}, {bias}, {rest})"
    if draw.random() < 0.15:
        padding = draw.choice(["same", "valid"])
        stride = [1] * sides
    weight, bias = m.weight(out, channels // groups, *kernel, like=y), draw.choice(["None", m.constant(out, like=y)])
    return f"{m.new()} = F.conv{sides}d({y}, {weight}, {bias}, {stride}, {padding!r}, {dilation}, {groups})"


def convolved_as_usual(m: _Maker) -> Lines:
    y = m.any(4)
    channels = m.value(y).shape[1]
    out = m.draw.choice([channels, channels, 4])
    weight, bias = m.weight(out, channels, 3, 3, like=y), m.constant(out, like=y)
    return f"{m.new()} = F.conv2d({y}, {weight}, {bias}, padding=1)"


def residual_block(m: _Maker) -> Lines:
    y, n = m.any(4), m.new()
    channels = m.value(y).shape[1]
    one, two = m.weight(channels, channels, 3, 3, like=y), m.weight(channels, channels, 3, 3, like=y)
    groups = 2 if channels % 2 == 0 else 1
    inplace = m.draw.choice([True, False])
    return (
        f"{n} = F.silu(F.group_norm({y}, {groups}, eps=1e-3), inplace={inplace})\n"
        f"{n} = F.conv2d({n}, {one}, padding=1)\n"
        f"{n} = {y} + F.conv2d(F.relu({n}), {two}, padding=1)"
    )


def unbatched(m: _Maker) -> Lines:
    y = m.any(3)
    channels = m.value(y).shape[0]
    weight = m.weight(2, channels, 3, 3, like=y)
    texts = (
        f"F.conv2d({y}, {weight}, padding=1)", f"F.avg_pool2d({y}, 2)", f"F.max_pool2d({y}, 2)",
        f"F.adaptive_avg_pool2d({y}, 2)", f"F.pad({y}, (1, 1, 1, 1), 'reflect')",
    )  # fmt: skip
    return f"{m.new()} = {m.draw.choice(texts)}"


def resampled(m: _Maker) -> Lines:
    y = m.any(m.draw.choice([3, 4, 4, 4, 5]))
    value, draw = m.value(y), m.draw
    sides = value.dim() - 2
    smooth = [["linear"], ["bilinear", "bicubic"], ["trilinear"]][sides - 1]
    mode = draw.choice(["nearest", "nearest", "nearest-exact", "area", *smooth])
    aligned = f", align_corners={draw.choice([True, False])}" if mode in smooth else ""
    size = draw.choice(
        [f"scale_factor={draw.choice([2.0, 2.0, 1.5, 0.5])}", f"size={[s + 3 for s in value.shape[2:]]}"]
    )
    return f"{m.new()} = F.interpolate({y}, {size}, mode={mode!r}{aligned})"


def shuffled(m: _Maker) -> Lines:
    y, n = m.any(4), m.new()
    weight = m.weight(4, m.value(y).shape[1], 1, 1, like=y)
    texts = (
        f"F.pixel_shuffle(F.conv2d({y}, {weight}), 2)", f"F.pixel_unshuffle({y}, 2)", f"F.channel_shuffle({y}, 2)",
        f"F.pixel_shuffle({y}.repeat(1, 4, 1, 1), 2)",
    )  # fmt: skip
    return f"{n} = {m.draw.choice(texts)}"


def padded(m: _Maker) -> Lines:
    y = m.any(m.draw.choice([3, 4, 4, 5]))
    draw, sides = m.draw, m.value(y).dim() - 2
    mode = draw.choice(["constant", "constant", "reflect", "replicate", "circular"])
    least = -1 if mode == "constant" else 0
    pads = tuple(draw.randint(least, 2) for _ in range(2 * (draw.randint(1, sides) if mode == "constant" else sides)))
    filled = f", {draw.choice([0.0, 0.5])}" if mode == "constant" else ""
    return f"{m.new()} = F.pad({y}, {pads}, {mode!r}{filled})"


def pooled(m: _Maker) -> Lines:
    y = m.any(m.draw.choice([3, 4, 4, 4, 5]))
    draw, sides = m.draw, m.value(y).dim() - 2
    kernel, stride = draw.randint(2, 3), draw.choice(["None", "1", "2"])
    padding, ceil = draw.randint(0, 1), draw.choice([True, False])
    texts = [
        f"F.avg_pool{sides}d({y}, {kernel}, {stride}, {padding}, {ceil}, {draw.choice([True, False])})",
        f"F.max_pool{sides}d({y}, {kernel}, {stride}, {padding}, 1, {ceil})",
        f"F.adaptive_avg_pool{sides}d({y}, {draw.randint(1, 4)})",
        f"F.adaptive_max_pool{sides}d({y}, {draw.randint(1, 3)})",
    ]
    if sides < 3:
        texts.append(f"F.lp_pool{sides}d({y}.abs() + 0.1, 2.0, {kernel})")
    if sides == 2:
        texts.append(f"F.max_unpool2d(*F.max_pool2d({y}, 2, return_indices=True), 2)")
    return f"{m.new()} = {draw.choice(texts)}"


def joined(m: _Maker) -> Lines:
    y = m.any()
    axis = m.axis(y)
    shape = m.value(y).shape
    alike = [n for n in m.maps() if m.value(n).shape == shape]
    z = m.draw.choice([*alike, f"{y}.flip(-1)", f"{y} * 2"])
    texts = (
        f"torch.cat([{y}, {z}], {axis})", f"torch.stack([{y}, {z}], {axis})", f"torch.cat([{z}, {y}, {y}], {axis})",
        f"torch.cat([{y}.narrow({axis}, 0, 1), {z}], {axis})", f"torch.cat([{y}])",
        f"torch.cat([{y}, {z}], {axis}).narrow({axis}, 1, {shape[axis]})",
    )  # fmt: skip
    return f"{m.new()} = {m.draw.choice(texts)}"


def attended(m: _Maker) -> Lines:
    """Attention over the pixels of a map, in heads or not, by the operator or by hand, and back."""
    y, t, n = m.any(4), m.new(), m.new()
    value, draw = m.value(y), m.draw
    channels = value.shape[1]
    size = f"{value.shape[2]}, {value.shape[3]}"
    queries, keys, values = (f"F.linear({t}, {m.weight(channels, channels, like=y)})" for _ in range(3))
    tokens = f"{t} = {y}.flatten(2).transpose(1, 2)\n"
    heads = draw.choice([h for h in range(1, channels + 1) if channels % h == 0])
    back = f".transpose(1, 2).unflatten(2, ({size}))"
    kind = draw.randrange(6)
    if kind < 2:
        inner = [
            f"{part}.unflatten(2, ({heads}, {channels // heads})).transpose(1, 2)" for part in (queries, keys, values)
        ]
        rest = draw.choice(["", "", ", is_causal=True", ", scale=0.3"])
        line = f"{n} = F.scaled_dot_product_attention({', '.join(inner)}{rest}).transpose(1, 2).flatten(2){back}"
    elif kind == 2:
        line = f"{n} = F.scaled_dot_product_attention({queries}, {keys}, {values}){back}"
    elif kind == 3:
        line = (
            f"{n} = torch.bmm({queries}, {keys}.transpose(1, 2)) * {channels**-0.5:.3f}\n"
            f"{n} = torch.bmm({n}.softmax(-1), {values}){back}"
        )
    elif kind == 4:
        line = (
            f"{n} = torch.einsum('bic,bjc->bij', {queries}, {keys})\n"
            f"{n} -= {n}.amax(-1, keepdim=True)\n"
            f"{n} = torch.einsum('bij,bjc->bci', {n}.softmax(dim=-1), {values}).unflatten(2, ({size}))"
        )
    else:
        rows = f"{y}.permute(0, 2, 3, 1)"
        line = f"{t} = {rows}\n{n} = F.scaled_dot_product_attention({queries}, {keys}, {values}).permute(0, 3, 1, 2)"
        tokens = ""
    return tokens + line + draw.choice(["", f"\n{n} = {n} + {y}"])


def multiplied(m: _Maker) -> Lines:
    y = m.any()
    value = m.value(y)
    last, axis = value.shape[-1], m.axis(y)
    square = m.weight(last, last, like=y)
    wide = m.weight(3, last, like=y)
    texts = [
        f"F.linear({y}, {wide})", f"F.linear({y}, {wide}, {m.constant(3, like=y)})", f"{y} @ {square}",
        f"torch.matmul({y}, {square}.t())", f"torch.tensordot({y}, {square}, ([{value.dim() - 1}], [0]))",
        f"F.linear({y}, {m.constant(last, like=y)} * 0.3)",
    ]  # fmt: skip
    if value.dim() == 4:
        mixed = m.weight(value.shape[1], value.shape[1], like=y)
        texts += [f"torch.einsum('bchw,cd->bdhw', {y}, {mixed})", f"torch.matmul({y}, {y}.transpose(-1, -2)) * 0.2"]
    if value.dim() == 3:
        texts.append(f"torch.bmm({y}, {y}.transpose(1, 2)) * 0.2")
    del axis
    return f"{m.new()} = {m.draw.choice(texts)}"


def sampled(m: _Maker) -> Lines:
    y, n = m.any(4), m.new()
    value = m.value(y)
    grid = m.constant(value.shape[0], 5, 4, 2, like=y, scale=0.5)
    texts = (
        f"F.grid_sample({y}, {grid}, align_corners=False)",
        f"F.unfold({y}, 3, padding=1)",
        f"F.fold(F.unfold({y}, 2, stride=2), ({value.shape[2]}, {value.shape[3]}), 2, stride=2)",
        f"F.grid_sample({y}, {grid}, mode='nearest', padding_mode='border', align_corners=True)",
    )
    return f"{n} = {m.draw.choice(texts)}"


def written(m: _Maker) -> Lines:
    """A write in place into a map or through a view of it; the view stays there, or is gone."""
    y, draw = m.any(), m.draw
    n = y if draw.random() < 0.25 else m.new()
    first = "" if n == y else f"{n} = {m.view(y)}\n"
    z = draw.choice([m.constant(1, like=y), "0.25", f"{n}.flip(-1)", f"{n} * 0.5", f"{n}.mean()", "1.5"])
    axis, number = draw.randint(-1, 0), draw.choice(["0", "1", "-1"])
    texts = (
        "{n}.mul_({z})", "{n}.add_({z})", "{n}.sub_({z})", "{n} += {z}", "{n} *= 0.7",
        "{n}.copy_(torch.as_tensor({z}))", "{n}.fill_(0.3)", "{n}.zero_()", "{n}.neg_()", "{n}.clamp_(-1, 1)",
        "{n}.sigmoid_()", "{n}.div_(2)", "{n}.masked_fill_({n} > 0, 0.5)", "{n}[{n} > 0.5] = 0.25",
        "{n}[{number}] = {z0}", "{n}[..., {number}] *= 2", "{n}[..., ::2] += 1", "{n}[..., 1:].mul_(3)",
        "F.relu({n}, inplace=True)", "F.silu({n}, inplace=True)", "{n}.index_fill_({axis}, torch.tensor([0]), 0.75)",
        "{n}.lerp_(torch.ones_like({n}), 0.25)", "{n}.square_()", "torch.add({n}, 1, out={n})",
        "torch.mul({n}, {n} * 0.5, out={n})", "{n}.addcmul_({n}.clone(), {n}.clone())", "{n}.data.mul_(0.5)",
        "{n}.detach().add_(1)", "torch._foreach_mul_([{n}], 0.5)", "{n}.relu_()", "{n}[..., [0, -1]] = 0.125",
        "{n}.scatter_({axis}, {n}.argmax({axis}, keepdim=True), 2.0)", "{n}.abs_()",
        "{n}.index_copy_({axis}, torch.tensor([0]), {n}.narrow({axis}, 0, 1) * 2)", "{n}.cumsum_({axis})",
        "{n}.index_add_({axis}, torch.tensor([0, 0]), torch.ones_like({n}).narrow({axis}, 0, 2))",
        "{n}.exp_().clamp_(0, 3)", "F.dropout({n}, 0.3, inplace=True)", "{n}.normal_()", "{n}.uniform_(-1, 1)",
        "{n}.transpose_(0, -1)", "{n}.unsqueeze_(0)", "{n}.swapaxes_(0, {axis})", "{n}.squeeze_()", "{n}.T.mul_(2)",
        "{n}.mT.add_({n}.mT * 0.5)", "{n}.flatten().add_(1)", "{n}.reshape(-1)[1::3] = 0.5", "{n}.view(-1)[:5].mul_(2)",
        "{n}.diagonal().zero_()", "{n}.contiguous().add_(3)", "{n}.data = {n} * 2",
        "{n}.where({n} > 0, {n} * 2).mul_(5)", "{n}.tanh_()", "{n}.masked_scatter_({n} > 0, {n}.flatten() * 0.5)",
        "{n}.put_(torch.tensor([0, 2]), {n}.flatten()[:2] + 1)",
    )  # fmt: skip
    text = draw.choice(texts).format(n=n, z=z, z0=draw.choice(["0.5", f"{n}[0] * 2", "0"]), axis=axis, number=number)
    return first + text


def written_from_another(m: _Maker) -> Lines:
    """One map's part into another's."""
    y, draw = m.any(), m.draw
    z = m.other(y)
    index = m.index(y)
    shape = list(m.value(y).shape)
    if list(m.value(z).shape) != shape:
        z = f"{z}.expand({shape})"
    n = m.new()
    texts = (
        f"{y}[{index}] = {z}[{index}] * 2", f"{y}[{index}] += {z}[{index}]", f"{y}[{index}].copy_({z}[{index}].neg())",
        f"{y}.copy_({z})", f"{y}.add_({z}, alpha=0.5)", f"torch.add({y}, {z}, out={y})", f"{y} *= {z}",
        f"{n} = torch.empty_like({y})\ntorch.mul({y}, {z}, out={n})",
        f"{n} = torch.zeros_like({y})\n{n}[{index}] = {z}[{index}]", f"{n} = {y} + {z}\n{y}.mul_(0.5)",
        f"{n} = torch.zeros({shape}, dtype={y}.dtype)\n{n}.add_({z})\n{n}[{index}] += {y}[{index}]",
        f"{y}.lerp_({z}, 0.5)", f"torch.where({y} > {z}, {y}, {z}, out={y})", f"{y}.masked_fill_({z} > 0, 0.5)",
        f"{n} = {y}.clone()\n{n}[{index}] = {y}[{index}].clone() * {z}[{index}]\n{y}.zero_()",
    )  # fmt: skip
    return draw.choice(texts)


def filled(m: _Maker) -> Lines:
    """A map made empty and written part by part."""
    y, n = m.any(), m.new()
    axis = m.axis(y, 2)
    size = m.value(y).shape[axis]
    part, colons = m.draw.randint(1, size - 1), ":, " * axis
    made = m.draw.choice([f"torch.empty_like({y})", f"{y}.new_empty({y}.shape)", f"torch.zeros_like({y})"])
    texts = (
        f"{n}[{colons}:{part}] = {y}[{colons}:{part}] * 2\n{n}[{colons}{part}:] = {y}[{colons}{part}:]",
        f"for i in range({size}):\n    {n}[{colons}i] = {y}[{colons}{size} - 1 - i] + i",
        f"{n}[{colons}::2], {n}[{colons}1::2] = {y}[{colons}::2] * 3, {y}[{colons}1::2].neg()",
        f"for one, other in zip({n}.split({part}, {axis}), {y}.split({part}, {axis})):\n    one.copy_(other).mul_(2)",
    )
    return f"{n} = {made}\n{m.draw.choice(texts)}"


def changed_operand(m: _Maker) -> Lines:
    """A weight or another operand that is written after it was used."""
    y, n = m.any(4), m.new()
    channels = m.value(y).shape[1]
    weight, bias = m.weight(channels, channels, 3, 3, like=y), m.constant(channels, like=y)
    change = m.draw.choice(["{w}.zero_()", "{w}.mul_(2)", "{w}.data = {w} * 3", "{w}[0].fill_(1)", "{w}.add_(1)"])
    kind = m.draw.randrange(4)
    if kind == 0:
        made, used = f"w = {weight}.clone()", f"F.conv2d({y}, w, padding=1)"
    elif kind == 1:
        made, used = f"w = torch.nn.Parameter({weight}.clone(), requires_grad=False)", f"F.conv2d({y}, w, padding=1)"
    elif kind == 2:
        made, used = f"w = {bias}.clone()", f"F.group_norm({y}, 1, w, eps=1e-3)"
    else:
        made, used = f"w = {bias}.view(-1, 1, 1).clone()", f"{y} * w"
    again = m.draw.choice(["", f"\n{n} = {n} + {used}"])
    return f"{made}\n{n} = {used}\n{change.format(w='w')}{again}\ndel w"


def cast(m: _Maker) -> Lines:
    y, n = m.any(), m.new()
    texts = (
        "{n} = {y}.float()", "{n} = {y}.to(torch.float32) * 2", "{n} = {y}.double()", "{n} = {y}.to(torch.float64) + 1",
        "{n} = ({y} * 3).floor().to(torch.int64)", "{n} = {y} > 0.1",
        "{n} = ({y}.sigmoid() * 255).round().to(torch.uint8)", "{n} = ({y} > 0).to({y}.dtype) * {y}",
        "{n} = {y}.to(torch.bfloat16)", "{n} = {y}.type_as(x)", "{n} = {y}.double() / 3",
        "{n} = {y}.to(torch.float32, copy=True)", "{n} = torch.complex({y}, {y} * 2).abs()",
        "{n} = ({y} > 0).int().sum(-1)",
    )  # fmt: skip
    return m.draw.choice(texts).format(n=n, y=y)


def kept(m: _Maker) -> Lines:
    y, n = m.any(), m.new()
    texts = [f"kept.append({y})", f"kept.append({y} * 2)", f"kept.append({y}.flatten())"]
    if m.namespace["kept"]:
        texts += ["kept[-1].mul_(0.5)", f"{n} = kept[0] + 1", f"{n} = kept.pop()", "kept[0] = kept[0] * 2"]
    return m.draw.choice(texts)


def demanded(m: _Maker) -> Lines:
    """A value that the program needs at once."""
    y, n = m.any(), m.new()
    limit = m.draw.choice([0.013, 0.3, 1.1])
    texts = (
        f"said.append(float({y}.mean()))",
        f"if {y}.mean().item() > {limit}:\n    {n} = {y} * 2\nelse:\n    {n} = {y} - 1",
        f"if bool(({y} > {limit}).any()):\n    {n} = {y} + 1\nelse:\n    {n} = -{y}",
        f"{n} = {y} + float({y}.numpy().std())",
        f"{n} = torch.from_numpy({y}.numpy() * 2)",
        f"{n} = torch.from_numpy(np.ascontiguousarray(np.asarray({y})[::-1]))",
        f"said.append({y}.flatten()[:3].tolist())",
        f"said.append(int({y}.argmax()))",
        f"said.append(bool(torch.equal({y}, {y} + 1)))",
        f"{n} = {y}[{y} > {limit}]",
        f"said.append([[s for s, size in zip({y}.stride(), {y}.shape) if size > 1], {y}.is_contiguous()])",
        f"while float({y}.abs().amax()) > 3:\n    {y} = {y} * 0.5",
        f"{n} = {y} * 2 if {y}.is_contiguous() else {y} * 3",
    )
    return m.draw.choice(texts)


def noised(m: _Maker) -> Lines:
    y, n = m.any(), m.new()
    texts = (
        "{n} = {y} + torch.randn_like({y}) * 0.1", "{n} = {y} + torch.rand_like({y})", "{n} = F.dropout({y}, 0.3)",
        "{n} = {y} + torch.randn({y}.shape, dtype={y}.dtype)", "{n} = torch.empty_like({y}).normal_() + {y}",
        "{n} = {y} * torch.bernoulli({y}.sigmoid())", "{n} = {y}[torch.randperm({y}.shape[0])]",
        "{n} = {y} * torch.rand(1).item()", "{n} = torch.randn_like({y}.contiguous())", "{n} = {y}.clone().uniform_()",
        "{n} = torch.randn_like({y} * 2)", "{n} = torch.feature_dropout({y}, 0.4, True)",
    )  # fmt: skip
    return m.draw.choice(texts).format(n=n, y=y)


def repeated(m: _Maker) -> Lines:
    y, n = m.any(4), m.new()
    channels = m.value(y).shape[1]
    weight = m.weight(channels, channels, 3, 3, like=y)
    body = m.draw.choice(
        [f"{n} = F.conv2d({n}, {weight}, padding=1)", f"{n} = {n} + F.conv2d(F.silu({n}), {weight}, padding=1) * 0.5"]
    )
    return f"{n} = {y}\nfor _ in range({m.draw.randint(2, 3)}):\n    {body}"


def tried(m: _Maker) -> Lines:
    y, n = m.any(), m.new()
    return f"try:\n    {n} = {y} + torch.zeros(97)\nexcept RuntimeError:\n    {n} = {y} + 1"


def dropped(m: _Maker) -> Lines:
    names = [name for name in m.maps() if name[0] == "y"][:-1]
    return f"del {m.draw.choice(names)}" if names else None


def back_to_a_map(m: _Maker) -> Lines:
    """Something in the shape of an earlier map, which has as many elements."""
    y, n = m.any(), m.new()
    value = m.value(y)
    alike = [name for name in m.maps(4) if m.value(name).numel() == value.numel()]
    if value.dim() == 4 or not alike:
        return None
    return f"{n} = {y}.reshape({tuple(m.value(m.draw.choice(alike)).shape)})"


KINDS: dict[Step, int] = {
    pointwise: 5, combined: 6, viewed: 7, viewed_and_computed: 3, split: 3, moved: 3, reduced: 4, centred: 5,
    normed: 5, convolved: 6, convolved_as_usual: 8, residual_block: 3, unbatched: 1, resampled: 4, shuffled: 2,
    padded: 4, pooled: 4, joined: 4, attended: 3, multiplied: 3, sampled: 1, written: 10, written_from_another: 5,
    filled: 3, changed_operand: 2, cast: 3, kept: 3, demanded: 2, noised: 3, repeated: 1, tried: 1, dropped: 2,
    back_to_a_map: 4,
}  # fmt: skip
STEPS, WEIGHTS = list(KINDS), list(KINDS.values())

RARE_FROM = 1_000_000
"""The first of the seeds whose programs call what the others never do: those that failed once stay what they are."""

_OF_ONE = """
acos asin atan ceil cosh sinh cos tan erf expm1 exp2 log1p log2 log10 frac trunc selu celu relu6 isfinite isinf isnan
logical_not log_sigmoid hardsigmoid positive
""".split()  # noqa: SIM905
_OF_TWO = """
fmax fmin fmod remainder hypot floor_divide divide subtract multiply eq ne lt le gt ge logical_and logical_or
logical_xor float_power
""".split()  # noqa: SIM905


def rare(m: _Maker) -> Lines:
    y, draw = m.any(), m.draw
    z, axis, last = m.other(y), m.axis(y), m.value(y).shape[-1]
    functions = {"log_sigmoid": "F.logsigmoid", "hardsigmoid": "F.hardsigmoid"}
    one, two = draw.choice(_OF_ONE), draw.choice(_OF_TWO)
    called = functions.get(one, f"F.{one}" if one in ("selu", "celu", "relu6") else f"torch.{one}")
    part = f"({y}.sigmoid() * 0.9)"
    texts = [
        f"{called}({part}).to({y}.dtype)", f"{called}({part}).to({y}.dtype)",
        f"torch.{two}({part}, {z}.sigmoid() + 0.3).to({y}.dtype)", f"torch.{two}({part}, 0.4).to({y}.dtype)",
        f"torch.addcdiv({y}, {part}, {z}.abs() + 1, value=0.2)", f"F.glu({y}, {axis})", f"{part}.cumprod({axis})",
        f"{y}.logcumsumexp({axis})", f"{part}.prod({axis})", f"({y} > 0).all({axis}).to({y}.dtype)",
        f"({y} > 0).any({axis}, keepdim=True) * {y}", f"{y}.argmin({axis}).to({y}.dtype)", f"{y}.clip(-0.5, 0.5)",
        f"{y}.clamp_max(0.5)", f"{y}.clamp_min(-0.5)", f"F.prelu({y}, {m.constant(1, like=y)})", f"{y}.ravel() * 1.0",
        f"({y} * 4).to(torch.int32).bitwise_and(({y} * 3).to(torch.int32)).to({y}.dtype)",
        f"(({y} > 0) ^ ({y} > 0.5)).to({y}.dtype)", f"torch.concat([{y}, {y}], {axis})",
        f"{y}.half().to({y}.dtype)", f"{y}.bfloat16().to({y}.dtype)", f"{y}.norm(2, {axis})",
        f"({y} * 5).sum({axis}, dtype=torch.int64).to({y}.dtype)", f"{y}.expand_as({y}) * 1.0",
        f"torch.addmm({m.constant(3, like=y)}, {y}.reshape(-1, {last}), {m.weight(3, last, like=y)}.t())",
    ]  # fmt: skip
    if m.value(y).dim() == 3:
        texts.append(f"torch.baddbmm({m.constant(1, like=y)}, {y}, {y}.mT) * 0.1")
    return f"{m.new()} = {draw.choice(texts)}"


# Comparing


@dataclass(frozen=True)
class Settings:
    """How a program is streamed."""

    strip_bytes: int
    budget: Optional[int]
    mode: str
    calls: int


def settings_of(seed: int) -> Settings:
    draw = random.Random(f"settings {seed}")
    return Settings(
        draw.choice([1, 1, 300, 1_000, 4_000, 1 << 40]),
        draw.choice([None, None, 1, 3_000, 1 << 40]),
        draw.choice(["no_grad", "no_grad", "inference_mode"]),
        draw.choice([1, 1, 2]),
    )


def check(
    program: Program, inputs: tuple[Tensor, ...], settings: Settings, strides: bool = True, memory: bool = False
) -> None:
    """Raises DiffersError where the streamed program gives or leaves something else, or what it raises."""
    tuning = Tuning(strip_bytes=settings.strip_bytes, always=True)
    run = streamed(program, budget=settings.budget, tuning=tuning)
    with MODES[settings.mode]():
        given = copied(inputs)
        seed_all(program.seed)
        expected, states = program(*given), random_states()
        for _ in range(settings.calls):
            same = copied(inputs)
            seed_all(program.seed)
            actual = run(*same)
            assert_alike(actual, expected, program.tolerance, strides=strides)
            assert_alike(same, given, program.tolerance, strides=strides, path="arguments")
            assert_alike(random_states(), states, path="random state")
            if memory and sharing((same, actual)) != sharing((given, expected)):
                raise DiffersError("memory", "result", "shared by others than in eager")


def failure(seed: int, strides: bool = True, memory: bool = False) -> Optional[tuple[str, str]]:
    """The kind of failure of a seed's program and one line about it; None where it is right."""
    try:
        program, inputs = random_program(seed)
    except RuntimeError as error:
        return "no program", str(error)
    return _failure_of(program, inputs, settings_of(seed), strides, memory)


def _failure_of(
    program: Program, inputs: tuple[Tensor, ...], settings: Settings, strides: bool, memory: bool
) -> Optional[tuple[str, str]]:
    try:
        check(program, inputs, settings, strides, memory)
    except DiffersError as error:
        return error.kind, str(error)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:200]
        return type(error).__name__, f"{text} ({Path(frame.filename).name}:{frame.lineno})"
    return None


def reduced_program(
    program: Program, inputs: tuple[Tensor, ...], settings: Settings, kind: str, strides: bool, memory: bool
) -> tuple[Program, Settings]:
    """The program with every line left out, and every setting made simple, that the failure does not need."""

    def fails(one: Program, how: Settings) -> bool:
        with suppress(Exception), MODES[how.mode]():
            seed_all(one.seed)
            one(*copied(inputs))
            found = _failure_of(one, inputs, how, strides, memory)
            return found is not None and found[0] == kind
        return False

    for simple in ({"budget": None}, {"calls": 1}, {"mode": "no_grad"}, {"strip_bytes": 1 << 40}):
        if fails(replace(program, _function=None), replace(settings, **simple)):
            settings = replace(settings, **simple)
    for _ in range(3):
        before = program.text
        index = 0
        while index < len(program.lines):
            for line in _simpler(program.lines[index]):
                lines = [*program.lines[:index], *line, *program.lines[index + 1 :]]
                one = replace(program, lines=lines, _function=None)
                if fails(one, settings):
                    program = one
                    break
            else:
                index += 1
        for name in list(program.returned):
            one = replace(program, returned=[n for n in program.returned if n != name], _function=None)
            if len(program.returned) > 1 and fails(one, settings):
                program = one
        while (one := _without_copies(program)) is not program and fails(one, settings):
            program = one
        if program.text == before:
            break
    return program, settings


def _simpler(line: str) -> Iterator[list[str]]:
    """What may stand for these lines: nothing, some of them, or a copy of the map that they read."""
    yield []
    parts = line.splitlines()
    if len(parts) > 1 and not any(part.startswith((" ", "else", "except")) for part in parts):
        for index in range(len(parts)):
            yield ["\n".join(parts[:index] + parts[index + 1 :])]
    name, _, rest = line.partition(" = ")
    if "\n" not in line and name.isidentifier() and not rest.isidentifier():
        for word in dict.fromkeys("".join(c if c.isalnum() else " " for c in rest).split()):
            if word in ("x", "z") or (word[0] == "y" and word[1:].isdigit()):
                yield [f"{name} = {word}"]


def _without_copies(program: Program) -> Program:
    """The program with `y2 = y1` left out, and y1 in the place of y2."""
    lines, returned = list(program.lines), list(program.returned)
    for index, line in enumerate(lines):
        name, _, rest = line.partition(" = ")
        if name.isidentifier() and rest.isidentifier():
            word = re.compile(rf"\b{name}\b")
            lines = lines[:index] + [word.sub(rest, later) for later in lines[index + 1 :]]
            returned = [*dict.fromkeys(word.sub(rest, one) for one in returned)]
            return replace(program, lines=lines, returned=returned, _function=None)
    return program


def _children(first: int, last: int, strides: bool, memory: bool) -> Iterator[tuple[int, Optional[tuple[str, str]]]]:
    """Runs the seeds in a process of their own, so that one that dies is a failure like any other."""
    while first <= last:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            with os.fdopen(writing, "w") as out:
                for seed in range(first, min(last, first + 499) + 1):
                    signal.alarm(60)
                    out.write(f"{seed}\n")
                    out.flush()
                    out.write(json.dumps(failure(seed, strides, memory)) + "\n")
                    out.flush()
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as found:
            while (line := found.readline()) and (answer := found.readline()):
                yield int(line), json.loads(answer)
                first = int(line) + 1
        status = os.waitpid(child, 0)[1]
        if status:
            yield first, ("died", f"the process ended with {os.waitstatus_to_exitcode(status)}")
            first += 1


def main(arguments: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Random programs, streamed and eager.")
    parser.add_argument("seeds", type=int, nargs="*", help="the first and the last")
    parser.add_argument("--show", type=int, metavar="SEED", help="print one program and what is wrong with it")
    parser.add_argument("--reduce", type=int, metavar="SEED", help="print a smaller one that fails in the same way")
    parser.add_argument("--no-strides", action="store_true", help="do not compare strides")
    parser.add_argument("--memory", action="store_true", help="compare which results share memory")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    how = not options.no_strides, options.memory
    one = options.reduce if options.show is None else options.show
    if one is not None:
        return _shown(one, options.reduce is not None, *how)
    first, last = options.seeds
    kinds: Counter[str] = Counter()
    for seed, found in _children(first, last, *how):
        if found is not None:
            kinds[found[0]] += 1
            print(seed, *found, flush=True)
    failed = sum(kinds.values())
    print(f"{failed} of {last - first + 1} programs failed:", dict(kinds.most_common()))
    return int(failed > 0)


def _shown(seed: int, reduce: bool, strides: bool, memory: bool) -> int:
    program, inputs = random_program(seed)
    settings = settings_of(seed)
    found = _failure_of(program, inputs, settings, strides, memory)
    if reduce and found is not None:
        program, settings = reduced_program(program, inputs, settings, found[0], strides, memory)
        found = _failure_of(program, inputs, settings, strides, memory)
    for name, value in zip(program.names, inputs):
        print(f"# {name}: {_described(value)}")
    print(program)
    print(settings, f"tolerance {program.tolerance:.0e}", found or "right", sep="\n")
    return int(found is not None)


if __name__ == "__main__":
    sys.exit(main())
