"""What the tests of the tiled convolution share: comparing results, watching what is computed, and other extensions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Optional

import torch
from hypothesis import strategies as st
from processes import ended
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_patchconv import TiledForward, convert_model
from comfyui_patchconv.conv.tiling import Convolution

Kind = Callable[..., Convolution]  # a class, or anything else that makes one
KINDS: tuple[Kind, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MODES = ("zeros", "reflect", "replicate", "circular")
SPLITS = st.integers(1, 9)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def tile(module: Convolution, splits: int = 3, sequential: bool = True, **kwargs: Any) -> Convolution:
    """The module, in strips whatever its kernel and the input's size."""
    return convert_model(module, splits, sequential, 0, predicate=lambda *_: True, **kwargs)


def square(kind: Kind, *args: Any, **kwargs: Any) -> tuple[Convolution, Tensor]:
    """A convolution of 4 to 6 channels and a batch of 2 for it."""
    torch.manual_seed(0)
    sides = KINDS.index(kind) + 1
    module = kind(4, 6, *(args or (3,)), **{"padding": 1, **kwargs})
    return module, torch.randn(2, 4, *(10, 11, 12)[:sides], dtype=module.weight.dtype)


def assert_same(actual: Tensor, expected: Tensor, tolerance: Optional[float] = None) -> None:
    """Same shape, type and device, and the same values within `tolerance` of the range of `expected`."""
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    if tolerance is None:
        tolerance = TOLERANCE[expected.dtype]
    if expected.numel():
        scale = max(float(expected.detach().abs().max()), 1e-30)
        assert float((actual - expected).detach().abs().max()) <= tolerance * scale


def gradients(module: nn.Module, input: Tensor) -> list[Tensor]:
    """Gradients of the input and of all parameters, for one fixed random weighting of the output."""
    leaf = input.detach().clone().requires_grad_()
    output = module(leaf)
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    return list(torch.autograd.grad(output, [leaf, *module.parameters()], weighting))


@st.composite
def convolutions_and_inputs(draw: st.DrawFn, kind: Kind, mode: str, padding: str) -> tuple[Convolution, Tensor]:
    """A small convolution with seeded weights, and an input for it, batched or not.

    padding: `same`, `valid` or `number`. PyTorch may refuse the input as too small.
    """
    sides = KINDS.index(kind) + 1
    shape = st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4)
    kernel, stride, dilation, numbers = (draw(st.tuples(*[size] * sides)) for size in shape)
    torch.manual_seed(draw(st.integers(0, 1000)))
    module = kind(
        4,
        8,
        kernel,
        1 if padding == "same" else stride,
        numbers if padding == "number" else padding,
        dilation,
        draw(st.sampled_from([1, 2, 4])),
        draw(st.booleans()),
        mode,
        dtype=torch.float64,
    )
    size = draw(st.tuples(*[st.integers(4, 13)] * sides))
    return module, torch.randn(*draw(st.sampled_from([(), (1,), (3,)])), 4, *size, dtype=torch.float64)


def attempt(module: nn.Module, input: Tensor) -> Tensor | type[Exception]:
    """The output, or the type of what PyTorch raises."""
    try:
        with torch.no_grad():
            return module(input)
    except Exception as error:
        return type(error)


def hook(module: nn.Module) -> TiledForward:
    """The hook that runs this module in strips."""
    found = module.__dict__["_conv_forward"]
    assert isinstance(found, TiledForward)
    return found


class Calls(TorchDispatchMode):
    """Notes each convolution that runs (its input, output and weight shapes) and each tensor that is made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.outputs: list[torch.Size] = []
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(out, Tensor):
            if name in ("convolution", "conv1d", "conv2d", "conv3d", "mkldnn_convolution"):
                self.inputs.append(args[0])
                self.outputs.append(out.shape)
            elif not any(isinstance(a, Tensor) and a.untyped_storage() is out.untyped_storage() for a in args):
                known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
                if out.untyped_storage().data_ptr() not in known:
                    self.made.append((name, out.numel()))
        return out


class Counting(nn.Conv2d):
    """A host's own convolution: overrides `_conv_forward`, and notes the shape of each input it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, ...]] = []
        self.before_call: Optional[Callable[[Tensor], None]] = None

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        self.seen.append(tuple(input.shape))
        if self.before_call is not None:
            self.before_call(input)
        return super()._conv_forward(input, weight, bias)


class HostConv3d(nn.Conv3d):
    """As a host writes it: further arguments to `_conv_forward`, and the operator called with the module's settings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, ...]] = []

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Optional[Tensor], autopad: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        self.seen.append(tuple(input.shape))
        if autopad == "causal_zero":
            weight = weight[:, :, -input.shape[2] :]
        return torch.conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore

    def forward(self, input: Tensor, autopad: Any = None) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias, autopad=autopad)


def seamless_forward(self: nn.Conv2d, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """As seamless-tiling extensions write it: each axis is padded with a mode of its own."""
    extension: Any = self
    extension.strip_shapes.append(tuple(input.shape))
    padded = F.pad(input, extension.padding_x, mode=extension.mode_x)
    padded = F.pad(padded, extension.padding_y, mode=extension.mode_y)
    return F.conv2d(padded, weight, bias, self.stride, (0, 0), self.dilation, self.groups)


def make_seamless(conv: nn.Conv2d, mode_x: str, mode_y: str) -> nn.Conv2d:
    """`conv` as a seamless-tiling extension leaves it: `_conv_forward` set on the instance."""
    extension: Any = conv
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    extension.padding_x, extension.padding_y = (left, right, 0, 0), (0, 0, top, bottom)
    extension.mode_x, extension.mode_y = mode_x, mode_y
    extension.strip_shapes = []
    extension._conv_forward = seamless_forward.__get__(conv, nn.Conv2d)
    return conv


@contextmanager
def unchanged(module: nn.Module) -> Any:
    """Fails if an attribute of the module was set, replaced or removed meanwhile. Yields a check to call in between."""
    before = {key: id(value) for key, value in module.__dict__.items()}

    def check(*_: Any) -> None:
        assert {key: id(value) for key, value in module.__dict__.items()} == before

    yield check
    check()


def run_python(code: str, fails: bool = False, **variables: Any) -> str:
    """Output of `code` in a fresh process that can import this package; what it says of its failure if it `fails`."""
    done = ended(["-c", code], **variables)
    assert (done.returncode == 1) == fails, done.stderr
    return done.stderr if fails else done.stdout
