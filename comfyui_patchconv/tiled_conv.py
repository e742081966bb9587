"""Convolution in strips: the same result as the whole, written strip by strip into one output (depth 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import planner
from .geometry import Axis, Window, equal_strips, strips
from .memory import is_out_of_memory, release

Convolution = nn.modules.conv._ConvNd
OnStrip = Callable[[nn.Module, int, int], None]


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
        call = _Call(self, args, kwargs)
        rows = call.strip_rows(input, weight)
        if rows is None:
            output = call.whole(input, weight, bias)
        elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
            output = _Differentiable.apply(call, rows, input, weight, bias)
        else:
            output = call.tiled(input, weight, bias, rows)
        if rows is None and self.tiling.on_strip is not None:
            self.tiling.on_strip(self.module, 1, 1)
        return output


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
            state = {key: value for key, value in conv2d.__dict__.items() if key != "_conv_forward"}
            self.__dict__.update(state)
            self._parameters = dict(conv2d._parameters)
        self.__dict__["_conv_forward"] = TiledForward(self, tiling)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._parameters:
            if (old := f"{prefix}conv2d.{name}") in state_dict:
                state_dict[prefix + name] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Call:
    """One forward of one convolution: how to read and compute any strip of it."""

    def __init__(self, hook: TiledForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module = hook.module
        self.module, self.tiling, self.opaque = module, hook.tiling, hook.inner is not None
        own = hook.inner or partial(type(module)._conv_forward, module)  # type: ignore[attr-defined]
        self.whole: Callable[..., Tensor] = lambda x, w, b: own(x, w, b, *args, **kwargs)
        sides = len(module.kernel_size)
        self.mode = module.padding_mode
        self.dim = -min(sides, 2)  # of a tensor: length, else height
        pads = _pads(module)
        self.axis = Axis(
            module.kernel_size[self.dim],
            module.stride[self.dim],
            module.dilation[self.dim],
            *pads[self.dim],
        )
        self._args, self._kwargs = args, kwargs
        self._strip_module, self._uneven = _without_row_padding(module, pads, self.dim)

    def strip_rows(self, input: Tensor, weight: Tensor) -> Optional[int]:
        """Output rows of a strip, or None where the convolution is to run whole."""
        sides = len(self.module.kernel_size)
        if input.dim() not in (sides + 1, sides + 2):
            return None  # the operator's own error says it best
        size = input.shape[self.dim]
        rows = self.axis.output_size(size)
        reflected = self.mode in ("reflect", "circular") and max(self.axis.before, self.axis.after) >= size
        if rows < 2 or reflected:
            return None
        in_row, out_row = self._row_elements(input, weight)
        legal = max(in_row * size, out_row * rows) <= planner.MAX_ELEMENTS
        if legal and input.shape[-sides - 1 :].numel() < self.tiling.threshold:
            return None
        row_bytes = (in_row * self.axis.stride + out_row) * input.element_size()
        strip = planner.strip_rows(rows, self.tiling.splits, row_bytes, input.device.type)
        if not legal:
            strip = max(min(strip, self._legal_rows(in_row, out_row)), 1)
        return strip if strip < rows else None

    def tiled(self, input: Tensor, weight: Tensor, bias: Optional[Tensor], strip_rows: int) -> Tensor:
        """The whole output, strip by strip. An allocation that fails halves the strips and goes on where it failed."""
        rows = self.axis.output_size(input.shape[self.dim])
        if not self.tiling.sequential and (batched := self._batched(input, weight, bias, strip_rows)) is not None:
            return batched
        output: Optional[Tensor] = None
        groups = self._legal_batches(input, weight)
        for index, (start, count) in enumerate(groups):
            samples = input if len(groups) == 1 else input.narrow(0, start, count)
            first = 0
            while first < rows:
                last = min(first + strip_rows, rows)
                result = self._attempt(samples, weight, bias, first, last)
                if result is None:
                    release(input.device)
                    strip_rows = (last - first + 1) // 2
                    continue
                if output is None:
                    if result.shape[self.dim] != last - first:
                        return self.whole(input, weight, bias)  # a forward with a geometry of its own
                    output = self._allocate(result, rows, input)
                target = output if len(groups) == 1 else output.narrow(0, start, count)
                target.narrow(self.dim, first, last - first).copy_(result)
                del result  # before the next strip needs its room
                first = last
                self._report(index * rows + first, len(groups) * rows)
        assert output is not None
        return output

    def read(self, input: Tensor, window: Window) -> Tensor:
        """The strip's input rows: a view, but for the few strips whose rows have to be gathered."""
        if isinstance(window.rows, range):
            return input.narrow(self.dim, window.rows.start, len(window.rows))
        return input.index_select(self.dim, torch.tensor(window.rows, device=input.device))

    def window(self, first: int, last: int, size: int) -> Window:
        if self.opaque:
            return self.axis.opaque_window(first, last, size)
        return self.axis.window(first, last, size, self.mode)

    def strip(self, piece: Tensor, window: Window, count: int, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        """`count` output rows from the input rows of their window."""
        if self.opaque:
            return self.whole(piece, weight, bias).narrow(self.dim, window.skip, count)
        pads = list(self._uneven)
        pads[-2 * self.dim - 2] += window.before
        pads[-2 * self.dim - 1] += window.after
        if any(pads):
            piece = F.pad(piece, pads)
        forward = type(self.module)._conv_forward  # type: ignore[attr-defined]
        return forward(self._strip_module, piece, weight, bias, *self._args, **self._kwargs)

    def _attempt(
        self, input: Tensor, weight: Tensor, bias: Optional[Tensor], first: int, last: int
    ) -> Optional[Tensor]:
        """Output rows `[first, last)`, or None where memory runs out. Raises where it does for a single row."""
        window = self.window(first, last, input.shape[self.dim])
        try:
            return self.strip(self.read(input, window), window, last - first, weight, bias)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if last - first == 1:
                raise self._too_large(error, input, "a strip of one row") from None
        return None

    def _batched(self, input: Tensor, weight: Tensor, bias: Optional[Tensor], strip_rows: int) -> Optional[Tensor]:
        """All strips as one batch, in one call; None where that is impossible or does not fit."""
        size = input.shape[self.dim]
        rows = self.axis.output_size(size)
        if self.opaque or input.dim() != len(self.module.kernel_size) + 2:
            return None
        in_row, out_row = self._row_elements(input, weight)
        if max(in_row * (size + self.axis.span * (rows // strip_rows + 1)), out_row * rows) > planner.MAX_ELEMENTS:
            return None
        ranges = equal_strips(rows, strip_rows)
        try:
            pieces = []
            for first, last in ranges:
                window = self.window(first, last, size)
                piece = self.read(input, window)
                pad = [0] * (-2 * self.dim - 2) + [window.before, window.after]
                pieces.append(F.pad(piece, pad) if any(pad) else piece)
            batch = torch.cat(pieces)
            del pieces, piece
            whole_window = Window(range(batch.shape[self.dim]))
            result = self.strip(batch, whole_window, strip_rows, weight, bias)
            output = self._allocate(result, rows, input, batch=input.shape[0])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        for (first, last), part in zip(ranges, result.split(input.shape[0])):
            output.narrow(self.dim, first, last - first).copy_(part)
        self._report(rows, rows)
        return output

    def _allocate(self, result: Tensor, rows: int, input: Tensor, batch: Optional[int] = None) -> Tensor:
        """Room for the whole output, in the shape, type and memory format of one strip's `result`."""
        shape = list(result.shape)
        shape[self.dim] = rows
        if len(shape) == len(self.module.kernel_size) + 2:
            shape[0] = input.shape[0] if batch is None else batch
        try:
            return torch.empty(shape, dtype=result.dtype, device=result.device, memory_format=_memory_format(result))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_large(error, input, f"its output {tuple(shape)}") from None

    def _too_large(self, error: BaseException, input: Tensor, what: str) -> BaseException:
        return type(error)(
            f"Out of memory in {self.module}, input {tuple(input.shape)} of {input.dtype}: {what} does not fit on "
            f"{input.device}; free memory or make the image smaller."
        )

    def _report(self, done: int, total: int) -> None:
        if self.tiling.on_strip is not None:
            self.tiling.on_strip(self.module, done, total)

    def _row_elements(self, input: Tensor, weight: Tensor) -> tuple[int, int]:
        """Elements of one padded row of the input and of one row of the output, over all samples and channels."""
        module, sides = self.module, len(self.module.kernel_size)
        batch = input.shape[0] if input.dim() == sides + 2 else 1
        in_row, out_row = batch * input.shape[-sides - 1], batch * weight.shape[0]
        for dim, pad in enumerate(_pads(module), -sides):
            if dim != self.dim:
                axis = Axis(module.kernel_size[dim], module.stride[dim], module.dilation[dim], *pad)
                in_row *= input.shape[dim] + sum(pad)
                out_row *= axis.output_size(input.shape[dim])
        return in_row, out_row

    def _legal_rows(self, in_row: int, out_row: int) -> int:
        """Output rows whose input and output both stay within `planner.MAX_ELEMENTS`; 0 if not even one does."""
        halo = in_row * (self.axis.span - self.axis.stride)
        return min(planner.legal_rows(in_row * self.axis.stride, halo), planner.legal_rows(out_row))

    def _legal_batches(self, input: Tensor, weight: Tensor) -> list[tuple[int, int]]:
        """`(start, count)` of the groups of samples that run one after the other: one, unless a row is too large."""
        in_row, out_row = self._row_elements(input, weight)
        if input.dim() != len(self.module.kernel_size) + 2 or self._legal_rows(in_row, out_row) > 0:
            return [(0, input.shape[0])]
        batch = input.shape[0]
        row = max(in_row * self.axis.span, out_row) // batch
        count = max(planner.legal_rows(row), 1)
        return [(start, min(count, batch - start)) for start in range(0, batch, count)]


class _Differentiable(torch.autograd.Function):
    """Strips forward and strips backward. Keeps for backward what a plain convolution keeps: input, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, strip_rows: int, input: Tensor, weight: Tensor, bias: Optional[Tensor]
    ) -> Tensor:
        ctx.call, ctx.strip_rows, ctx.autocast = call, strip_rows, _autocast_state(input.device.type)
        ctx.save_for_backward(input, weight, bias)
        return call.tiled(input, weight, bias, strip_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Optional[Tensor], ...]:
        (grad,) = grads
        call, tensors = ctx.call, ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # a second derivative is wanted: differentiate the whole convolution
            wanted = [tensor for tensor, need in zip(tensors, needed) if need]
            with torch.autocast(**ctx.autocast):
                output = call.whole(*tensors)
            found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
            return (None, None, *(next(found) if need else None for need in needed))
        input, weight, bias = tensors
        # Sums over strips: in float32 at least, so that halves do not lose what a whole convolution keeps.
        sums = [
            None if not need else torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            for tensor, need in zip(tensors, needed)
        ]
        size, rows = input.shape[call.dim], grad.shape[call.dim]
        for first, last in strips(rows, ctx.strip_rows):
            window = call.window(first, last, size)
            piece = call.read(input, window)
            leaves = [None if t is None else t.detach() for t in (piece, weight, bias)]
            wanted = [leaf.requires_grad_() for leaf, need in zip(leaves, needed) if leaf is not None and need]
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                result = call.strip(leaves[0], window, last - first, leaves[1], leaves[2])
            found = iter(torch.autograd.grad(result, wanted, grad.narrow(call.dim, first, last - first)))
            for total, position in zip(sums, ("input", "weight", "bias")):
                if total is None:
                    continue
                part = next(found).to(total.dtype)
                if position != "input":
                    total += part
                elif isinstance(window.rows, range):
                    total.narrow(call.dim, window.rows.start, len(window.rows)).add_(part)
                else:
                    total.index_add_(call.dim, torch.tensor(window.rows, device=total.device), part)
            del result, part, piece, leaves, wanted
        return (None, None, *(None if s is None else s.to(t.dtype) for s, t in zip(sums, tensors)))


def _autocast_state(device_type: str) -> dict[str, Any]:
    """Arguments of `torch.autocast` that bring the current state back; torch before 2.4 asks per device."""
    try:
        enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    except (TypeError, AttributeError):
        cpu = device_type == "cpu"
        enabled = torch.is_autocast_cpu_enabled() if cpu else torch.is_autocast_enabled()
        dtype = torch.get_autocast_cpu_dtype() if cpu else torch.get_autocast_gpu_dtype()
    return {"device_type": device_type, "enabled": enabled, "dtype": dtype}


def _memory_format(tensor: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _pads(module: Convolution) -> list[tuple[int, int]]:
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
