"""Convolution in strips: the same result as the whole, written strip by strip into one output (depth 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import onednn, planner
from .geometry import Axis, Window, equal_strips
from .memory import is_out_of_memory, keep_freed_blocks, release

Convolution = nn.modules.conv._ConvNd
OnStrip = Callable[[nn.Module, int, int], None]
_CHANNELS_LAST = (torch.channels_last, torch.channels_last_3d)


@dataclass(frozen=True)
class Tiling:
    """How a convolution is cut.

    splits: strips to cut the output into; 0 for as many as `planner.strip_rows` finds best. Strips are equal, so a
        height that `splits` does not divide may need fewer; on a CPU, large strips are cut further (planner.py).
    sequential: one strip after the other (least memory), or False for all strips in one batched call.
    threshold: input elements (C·H·W, times depth for 3-D) from which strips are used. Below it nothing changes, unless
        input or output pass `planner.MAX_ELEMENTS`.
    on_strip: called as `on_strip(module, rows_done, rows)` after each strip, and once after an untouched call, for
        progress. What it raises ends the forward.
    """

    splits: int = 4
    sequential: bool = True
    threshold: int = planner.DEFAULT_THRESHOLD
    on_strip: Optional[OnStrip] = None

    def __post_init__(self) -> None:
        if isinstance(self.splits, bool) or not isinstance(self.splits, int) or self.splits < 0:
            raise ValueError(f"splits is {self.splits!r}: use a whole number from 1, or 0 for automatic.")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int) or self.threshold < 0:
            raise ValueError(f"threshold is {self.threshold!r}: use a whole number of elements, 0 for always.")
        if not isinstance(self.sequential, bool):
            raise ValueError(f"sequential is {self.sequential!r}: use True or False.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tiling:
        return self  # a copied model reports to the same listener, not to a copy of it


class TiledForward:
    """What stands in for `_conv_forward` on one convolution.

    Every torch and host forward casts or fetches the weights first and then calls `self._conv_forward(input, weight,
    bias)`, so weights are fetched once for all strips, and parameters, class and state-dict keys stay as they are.
    Nothing of the module changes during a call: threads may share it.

    module: the convolution. inner: another extension's `_conv_forward` to run in strips, or None for the module's own.
    """

    def __init__(self, module: Convolution, tiling: Tiling, inner: Optional[Callable[..., Tensor]] = None) -> None:
        self.module = module
        self.tiling = tiling
        self.inner = inner

    def __call__(self, input: Tensor, weight: Tensor, bias: Optional[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The convolution of `input` `[N, C, L | H, W | D, H, W]`, the batch optional, with any further arguments that
        the host passes on to the module's own `_conv_forward`."""
        if self._is_none_of_ours(input):
            own = self.inner or partial(type(self.module)._conv_forward, self.module)  # type: ignore[attr-defined]
            output = own(input, weight, bias, *args, **kwargs)
            if self.tiling.on_strip is not None:
                self.tiling.on_strip(self.module, 1, 1)
            return output
        return self.call(input, args, kwargs).run(input, weight, bias)

    def _is_none_of_ours(self, input: Tensor) -> bool:
        """Whether a call runs whole, without more ado: a small input, one that is streamed, or one that is traced."""
        if type(self).call is not TiledForward.call:
            return False  # it computes something else than the module's own forward
        if getattr(input, "is_deferred", False) or torch._C._get_tracing_state() is not None or _is_exporting():
            return True
        shape, sides = input.shape, len(self.module.kernel_size)
        elements = 1
        for side in shape[-sides - 1 :]:
            elements *= side
        few = elements < self.tiling.threshold and len(shape) > sides
        # Of so few elements the output is legal too, whatever its padding.
        all_in = elements * (shape[0] if len(shape) > sides + 1 else 1)
        return few and 16 * all_in * _most_outputs(self.module) < planner.MAX_ELEMENTS

    def call(self, input: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """One forward for `input`, with the host's further arguments."""
        return Call(self, args, kwargs)


def _most_outputs(module: Convolution) -> int:
    """How many times as many channels a convolution has behind it as before it, at most."""
    return -(-module.out_channels // module.in_channels)


def _is_exporting() -> bool:
    compiler: Any = getattr(torch, "compiler", None)
    return any(getattr(compiler, name)() for name in ("is_exporting", "is_compiling") if hasattr(compiler, name))


def tiled_forward(
    module: Convolution, current: Callable[..., Any], tiling: Tiling, kind: type[TiledForward] = TiledForward
) -> TiledForward:
    """What to put in place of `current`, the `_conv_forward` that `module` has now: ours again, its own, or another's.

    For `convert_model`, and for hosts that set and take back attributes themselves.
    """
    if isinstance(current, TiledForward):
        return kind(module, tiling, current.inner)
    own = getattr(current, "__func__", None) is type(module)._conv_forward  # type: ignore[attr-defined]
    return kind(module, tiling, None if own else current)


class PatchConv2d(nn.Conv2d):
    """A `torch.nn.Conv2d` that runs in strips; call-compatible with `patch_conv.PatchConv2d`.

    splits, sequential: see `Tiling`.
    conv2d: an existing convolution whose parameters and settings are shared; without it, `args` and `kwargs` are those
        of `torch.nn.Conv2d`. Raises TypeError for a subclass with a forward of its own: `convert_model` keeps those.
    Loads state dicts written with `patch_conv` (`conv2d.weight`) as well as its own (`weight`).
    """

    def __init__(
        self,
        splits: int = 4,
        sequential: bool = True,
        conv2d: Optional[nn.Conv2d] = None,
        *args: Any,
        threshold: int = planner.DEFAULT_THRESHOLD,
        **kwargs: Any,
    ) -> None:
        tiling = Tiling(splits, sequential, threshold)
        if conv2d is None:
            super().__init__(*args, **kwargs)
        else:
            kind = type(conv2d)
            plain = isinstance(conv2d, nn.Conv2d) and kind.forward is nn.Conv2d.forward
            if not plain or (kind._conv_forward is not nn.Conv2d._conv_forward):
                raise TypeError(f"conv2d is a {kind.__name__}: give a torch.nn.Conv2d, or use convert_model on it.")
            nn.Module.__init__(self)
            self.__dict__.update(conv2d.__dict__)
            self._parameters = dict(conv2d._parameters)
        self.__dict__["_conv_forward"] = tiled_forward(self, self._conv_forward, tiling)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._parameters:
            if (old := f"{prefix}conv2d.{name}") in state_dict:
                state_dict[prefix + name] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Call:
    """One forward of one convolution: how to read and compute any strip of it.

    whole: the same forward in one piece. dim: the axis that is cut, counted from the last.
    input_copies: of a strip's input, that the strip makes and holds.
    """

    input_copies = 0

    def __init__(self, hook: TiledForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module = hook.module
        self.module, self.tiling, self.opaque = module, hook.tiling, hook.inner is not None
        own = hook.inner or partial(type(module)._conv_forward, module)  # type: ignore[attr-defined]
        self.whole: Callable[..., Tensor] = lambda x, w, b: own(x, w, b, *args, **kwargs)
        sides = len(module.kernel_size)
        self.mode = module.padding_mode
        self.dim = -min(sides, 2)  # of a tensor: length, else height
        pads = padding_of(module)
        self.axis = Axis(
            module.kernel_size[self.dim],
            module.stride[self.dim],
            module.dilation[self.dim],
            *pads[self.dim],
        )
        self._args, self._kwargs = args, kwargs
        self._strip_module, self._uneven = _without_row_padding(module, pads, self.dim)

    def run(self, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        """The convolution, in strips where that is possible and worth it, differentiable."""
        rows = self.strip_rows(input, weight)
        grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
        if rows is None or _transformed():
            output = self.whole(input, weight, bias)
            self.report(1, 1)
            return output
        try:
            if grad:
                return _Differentiable.apply(self, rows, input, weight, bias)
            return self.tiled(input, weight, bias, rows)
        except _OwnWaysError:
            return self.whole(input, weight, bias)

    def strip_rows(self, input: Tensor, weight: Tensor) -> Optional[int]:
        """Output rows of a strip, or None where the convolution is to run whole."""
        sides = len(self.module.kernel_size)
        if input.dim() not in (sides + 1, sides + 2):
            return None  # the operator's own error says it best
        size = input.shape[self.dim]
        rows = self.axis.output_size(size)
        reflected = self.mode in ("reflect", "circular") and max(self.axis.before, self.axis.after) >= size
        if rows < 1 or reflected:
            return None
        in_row, out_row = self._row_elements(input, weight)
        legal = max(in_row * size, out_row * rows) <= planner.MAX_ELEMENTS
        if legal and (rows < 2 or input.shape[-sides - 1 :].numel() < self.tiling.threshold):
            return None
        row_bytes = (in_row * (1 + self.input_copies) * self.axis.stride + out_row) * input.element_size()
        strip = planner.strip_rows(rows, self.tiling.splits, row_bytes, input.device.type)
        if not legal:
            return max(min(strip, self._legal_rows(in_row, out_row)), 1)
        return strip if strip < rows else None

    def tiled(self, input: Tensor, weight: Tensor, bias: Optional[Tensor], strip_rows: int) -> Tensor:
        """The whole output, strip by strip. Raises `_OwnWaysError` where strips would not be the convolution."""
        rows, size = self.axis.output_size(input.shape[self.dim]), input.shape[self.dim]
        if not self.tiling.sequential and (batched := self._batched(input, weight, bias, strip_rows)) is not None:
            return batched
        if input.device.type == "cpu":
            keep_freed_blocks()
        output: Optional[Tensor] = None
        groups = self._legal_batches(input, weight)
        for index, (start, count) in enumerate(groups):
            call = self if len(groups) == 1 else self.of_samples(start, count)
            samples = input if len(groups) == 1 else input.narrow(0, start, count)

            def work(
                first: int,
                last: int,
                call: Call = call,
                samples: Tensor = samples,
                start: int = start,
                count: int = count,
            ) -> None:
                nonlocal output
                window = call.window(first, last, size)
                result = call.strip(call.read(samples, window), window, first, last, weight, bias)
                if result.requires_grad:  # by parameters of the forward's own, whose gradients strips would lose
                    raise _OwnWaysError
                if output is None:
                    output = self._allocate(result, rows, input, weight)
                target = output if len(groups) == 1 else output.narrow(0, start, count)
                target.narrow(self.dim, first, last - first).copy_(result)

            for done in self.each_strip(work, input, rows, strip_rows):
                self.report(index * rows + done, len(groups) * rows)
        assert output is not None
        return output

    def of_samples(self, start: int, count: int) -> Call:
        """The same for `count` samples of the batch from `start` on."""
        return self

    def each_strip(self, work: Callable[[int, int], None], input: Tensor, rows: int, strip_rows: int) -> Iterator[int]:
        """Call `work(first, last)` for strips that cover `rows` rows, yielding the rows done after each.

        Where memory runs out, what the strip held is freed, strips are halved, and the work goes on from there; where
        it does for a single row, the error is raised with a sentence. `work` must change nothing before it has all
        the memory that it needs.
        """
        first = 0
        while first < rows:
            last = min(first + strip_rows, rows)
            if self._fits(work, first, last, input):
                first = last
                yield first
            else:
                release(input.device)
                strip_rows = (last - first + 1) // 2

    def _fits(self, work: Callable[[int, int], None], first: int, last: int, input: Tensor) -> bool:
        try:
            work(first, last)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if last - first > 1:
                return False
            raise type(error)(
                f"Out of memory in {self.module}, input {tuple(input.shape)} of {input.dtype}: its output and a strip "
                f"of one row do not fit on {input.device}; free memory or make the image smaller."
            ) from None
        return True

    def read(self, input: Tensor, window: Window) -> Tensor:
        """The strip's input rows: a view, but for the few strips whose rows have to be gathered."""
        if isinstance(window.rows, range):
            return input.narrow(self.dim, window.rows.start, len(window.rows))
        return input.index_select(self.dim, torch.tensor(window.rows, device=input.device))

    def window(self, first: int, last: int, size: int) -> Window:
        if self.opaque:
            return self.axis.opaque_window(first, last, size)
        return self.axis.window(first, last, size, self.mode)

    def strip(
        self, piece: Tensor, window: Window, first: int, last: int, weight: Tensor, bias: Optional[Tensor]
    ) -> Tensor:
        """Output rows `[first, last)` from the input rows of their window."""
        count = last - first
        if self.opaque:
            with onednn.in_strips(piece):
                result = self.whole(piece, weight, bias)
            self._check(result, self.axis.output_size(piece.shape[self.dim]))
            return result.narrow(self.dim, window.skip, count)
        pads = list(self._uneven)
        pads[-2 * self.dim - 2] += window.before
        pads[-2 * self.dim - 1] += window.after
        if any(pads):
            piece = F.pad(piece, pads)
        forward = type(self.module)._conv_forward  # type: ignore[attr-defined]
        with onednn.in_strips(piece):
            result = forward(self._strip_module, piece, weight, bias, *self._args, **self._kwargs)
        self._check(result, count)
        return result

    def _check(self, result: Tensor, rows: int) -> None:
        """Raises `_OwnWaysError` for a forward that gives other rows than its module's settings say."""
        if result.shape[self.dim] != rows:
            raise _OwnWaysError

    def _batched(self, input: Tensor, weight: Tensor, bias: Optional[Tensor], strip_rows: int) -> Optional[Tensor]:
        """All strips as one batch, in one call; None where that is impossible or does not fit."""
        size = input.shape[self.dim]
        rows = self.axis.output_size(size)
        if self.opaque or input.dim() != len(self.module.kernel_size) + 2:
            return None
        ranges = equal_strips(rows, strip_rows)
        in_row, out_row = self._row_elements(input, weight)
        in_rows, out_rows = len(ranges) * (strip_rows * self.axis.stride + self.axis.span), len(ranges) * strip_rows
        if max(in_row * in_rows, out_row * out_rows) > planner.MAX_ELEMENTS:
            return None
        try:
            pieces = []
            for first, last in ranges:
                window = self.window(first, last, size)
                piece = self.read(input, window)
                pad = [0] * (-2 * self.dim - 2) + [window.before, window.after]
                pieces.append(F.pad(piece, pad) if any(pad) else piece)
            batch = torch.cat(pieces)
            del pieces, piece
            result = self.strip(batch, Window(range(batch.shape[self.dim])), 0, strip_rows, weight, bias)
            output = self._allocate(result, rows, input, weight)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        for (first, last), part in zip(ranges, result.split(input.shape[0])):
            output.narrow(self.dim, first, last - first).copy_(part)
        self.report(rows, rows)
        return output

    def _allocate(self, result: Tensor, rows: int, input: Tensor, weight: Tensor) -> Tensor:
        """Room for the whole output, in the shape, type and memory format of one strip's `result`."""
        format = _memory_format(result)
        if result.shape[1:].numel() == 1:  # one pixel has the strides of either format
            format = max(_memory_format(input), _memory_format(weight), key=_CHANNELS_LAST.__contains__)
        shape = list(result.shape)
        shape[self.dim] = rows
        if len(shape) == len(self.module.kernel_size) + 2:
            shape[0] = input.shape[0]
        return torch.empty(shape, dtype=result.dtype, device=result.device, memory_format=format)

    def report(self, done: int, total: int) -> None:
        if self.tiling.on_strip is not None:
            self.tiling.on_strip(self.module, done, total)

    def _row_elements(self, input: Tensor, weight: Tensor) -> tuple[int, int]:
        """Elements of one padded row of the input and of one row of the output, over all samples and channels."""
        module, sides = self.module, len(self.module.kernel_size)
        batch = input.shape[0] if input.dim() == sides + 2 else 1
        in_row, out_row = batch * input.shape[-sides - 1], batch * weight.shape[0]
        for dim, pad in enumerate(padding_of(module), -sides):
            if dim != self.dim:
                axis = Axis(module.kernel_size[dim], module.stride[dim], module.dilation[dim], *pad)
                in_row *= input.shape[dim] + sum(pad)
                out_row *= max(axis.output_size(input.shape[dim]), 1)  # a host may cut the kernel to fit
        return in_row, out_row

    def _legal_rows(self, in_row: int, out_row: int) -> int:
        """Output rows whose input and output both stay within `planner.MAX_ELEMENTS`; 0 if not even one does."""
        extra = self.axis.opaque_rows if self.opaque else self.axis.span - self.axis.stride
        extra_out = out_row * (extra // self.axis.stride + 1) if self.opaque else 0
        in_rows = planner.legal_rows(in_row * self.axis.stride, in_row * extra)
        return min(in_rows, planner.legal_rows(out_row, extra_out))

    def _legal_batches(self, input: Tensor, weight: Tensor) -> list[tuple[int, int]]:
        """`(start, count)` of the groups of samples that run one after the other: one, unless a row is too large."""
        in_row, out_row = self._row_elements(input, weight)
        if input.dim() != len(self.module.kernel_size) + 2 or self._legal_rows(in_row, out_row) > 0:
            return [(0, input.shape[0])]
        batch = input.shape[0]
        row = max(in_row * self.axis.span, out_row) // batch
        count = max(planner.legal_rows(row), 1)
        return [(start, min(count, batch - start)) for start in range(0, batch, count)]


class _OwnWaysError(Exception):
    """The forward that was to run in strips does more than its module's settings say: it is to run whole."""


class _Differentiable(torch.autograd.Function):
    """Strips forward and strips backward. Keeps for backward what a plain convolution keeps: input, weight and bias."""

    @staticmethod
    def forward(ctx: Any, call: Call, strip_rows: int, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.call, ctx.strip_rows, ctx.autocast = call, strip_rows, _same_autocast(input.device.type)
        ctx.save_for_backward(input, weight, bias)
        with torch.enable_grad():  # of nothing here: shows whether the forward has parameters of its own
            return call.tiled(input.detach(), weight.detach(), None if bias is None else bias.detach(), strip_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Optional[Tensor], ...]:
        (grad,) = grads
        call, tensors = ctx.call, ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # a second derivative is wanted: differentiate the whole convolution
            wanted = [tensor for tensor, need in zip(tensors, needed) if need]
            with ctx.autocast():
                output = call.whole(*tensors)
            found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
            return (None, None, *(next(found) if need else None for need in needed))
        input, weight, bias = tensors
        # Sums over strips: in float32 at least, so that halves do not lose what a whole convolution keeps.
        sums = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) if need else None
            for tensor, need in zip(tensors, needed)
        ]
        size, rows = input.shape[call.dim], grad.shape[call.dim]

        def work(first: int, last: int) -> None:
            window = call.window(first, last, size)
            leaves = [None if t is None else t.detach() for t in (call.read(input, window), weight, bias)]
            wanted = [leaf.requires_grad_() for leaf, need in zip(leaves, needed) if leaf is not None and need]
            with torch.enable_grad(), ctx.autocast():
                result = call.strip(leaves[0], window, first, last, leaves[1], leaves[2])
            found = torch.autograd.grad(result, wanted, grad.narrow(call.dim, first, last - first))
            totals = [total for total in sums if total is not None]
            parts = [part.to(total.dtype) for part, total in zip(found, totals)]
            for total, part in zip(totals, parts):
                if total is not sums[0]:
                    total += part
                elif isinstance(window.rows, range):
                    total.narrow(call.dim, window.rows.start, len(window.rows)).add_(part)
                else:
                    total.index_add_(call.dim, torch.tensor(window.rows, device=total.device), part)

        for _ in call.each_strip(work, input, rows, ctx.strip_rows):
            pass
        return (None, None, *(None if s is None else s.to(t.dtype) for s, t in zip(sums, tensors)))


def _transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, which `_Differentiable` has no rules for."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _same_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """What makes a context with the present state of autocast; torch before 2.4 asks for it per device."""
    if device_type == "meta":
        return nullcontext
    try:
        enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    except (TypeError, AttributeError):
        cpu = device_type == "cpu"
        enabled = torch.is_autocast_cpu_enabled() if cpu else torch.is_autocast_enabled()
        dtype = torch.get_autocast_cpu_dtype() if cpu else torch.get_autocast_gpu_dtype()
    return partial(torch.autocast, device_type, dtype, enabled)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last where PyTorch itself takes the strides for that (`is_channels_last_strides_2d`, `_3d`)."""
    if tensor.dim() not in (4, 5):
        return torch.contiguous_format
    least = 0
    for dim in (1, *range(tensor.dim() - 1, 1, -1), 0):
        stride, size = tensor.stride(dim), tensor.shape[dim]
        if size == 0 or stride < least or (dim == 0 and least == tensor.stride(1)):
            return torch.contiguous_format
        least = stride * size
    return _CHANNELS_LAST[tensor.dim() - 4]


def padding_of(module: Convolution) -> list[tuple[int, int]]:
    """Rows or columns that the convolution adds before and behind each spatial axis, first axis first."""
    if module.padding_mode != "zeros":  # the module pads by this list, last axis first
        flat = module._reversed_padding_repeated_twice
        return [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)][::-1]
    sides = zip(module.kernel_size, module.stride, module.dilation)
    axes = [
        Axis.of(*side, module.padding if isinstance(module.padding, str) else module.padding[i])
        for i, side in enumerate(sides)
    ]
    return [(axis.before, axis.after) for axis in axes]


def _without_row_padding(
    module: Convolution, pads: list[tuple[int, int]], dim: int
) -> tuple[Convolution, tuple[int, ...]]:
    """A stand-in for `module` whose own forward pads every axis but `dim`, and the zeros it cannot pad itself.

    It shares the parameters and lives for one call. The zeros are in the order of `torch.nn.functional.pad`: the odd
    column of an even kernel with padding "same".
    """
    pads = list(pads)
    pads[dim] = (0, 0)
    stand_in = object.__new__(type(module))
    stand_in.__dict__.update(module.__dict__)
    stand_in.__dict__.pop("_conv_forward", None)
    stand_in.__dict__["padding"] = tuple(min(pad) for pad in pads)
    stand_in.__dict__["_reversed_padding_repeated_twice"] = [edge for pad in reversed(pads) for edge in pad]
    if module.padding_mode != "zeros":
        return stand_in, (0,) * (2 * len(pads))
    return stand_in, tuple(edge - min(pad) for pad in reversed(pads) for edge in pad)
