"""Convolution in strips: the same result as the whole, written strip by strip into one output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from ..memory.allocator import keep_freed_blocks, release
from ..memory.errors import is_out_of_memory
from . import onednn, videos
from .autocast import without_autocast
from .backward import Differentiable, OwnWaysError
from .halo import Axis, Window, equal_strips
from .strip_sizes import legal_rows, strip_rows
from .tiling import Convolution, Tiling, padding_of
from .transforms import is_compiled, is_traced, transformed

_DISPATCH = "__torch_dispatch__"
_CHANNELS_LAST = (torch.channels_last, torch.channels_last_3d)


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
            self.tiling.report(self.module, 1, 1)
            return output
        return self.call(input, args, kwargs).run(input, weight, bias)

    def _is_none_of_ours(self, input: Tensor) -> bool:
        """Whether a call runs whole, without more ado: a small input, one that is streamed, or one that is traced; and
        where a mode is at work that does what we do, and has to see whole maps for it."""
        another = type(self).call is not TiledForward.call  # than the module's own forward
        if is_compiled():
            return not another  # before what dynamo cannot read
        if torch._C._len_torch_function_stack() and any(
            getattr(mode, "takes_whole_maps", False) for mode in _get_current_function_mode_stack()
        ):
            return True
        if another:
            return False
        if is_traced(input) or getattr(input, "is_deferred", False):
            return True
        shape, sides = input.shape, len(self.module.kernel_size)
        elements = 1
        for side in shape[-sides - 1 :]:
            elements *= side
        few = elements < self.tiling.threshold and len(shape) > sides
        # Of so few elements the output is legal too, whatever its padding.
        all_in = elements * (shape[0] if len(shape) > sides + 1 else 1)
        return few and 16 * all_in * _most_outputs(self.module) < self.tiling.max_elements

    def call(self, input: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvCall:
        """One forward for `input`, with the host's further arguments."""
        return ConvCall(self, args, kwargs)


def _most_outputs(module: Convolution) -> int:
    """How many times as many channels a convolution has behind it as before it, at most."""
    return -(-module.out_channels // max(module.in_channels, 1))


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


class ConvCall:
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
        self._pads = any(edge for pad in pads for edge in pad)
        self._format, self._by_onednn = torch.contiguous_format, True

    def run(self, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        """The convolution, in strips where that is possible and worth it, differentiable."""
        rows = None if transformed() or is_traced(input) else self.strip_rows(input, weight)
        self._format, self._by_onednn = self._padded_format(input), not onednn.is_small(input)
        grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
        if rows is not None:
            with suppress(OwnWaysError):
                if grad:
                    return Differentiable.apply(self, rows, input, weight, bias)
                return self.tiled(input, weight, bias, rows)
        output = self.whole(input, weight, bias)
        self.report(1, 1)
        return output

    def strip_rows(self, input: Tensor, weight: Tensor) -> Optional[int]:
        """Output rows of a strip, or None where the convolution is to run whole."""
        if input.layout is not torch.strided or not input.numel():  # of what is laid out otherwise no rows can be cut
            return None
        sides = len(self.module.kernel_size)
        if input.dim() not in (sides + 1, sides + 2):
            return None  # the operator's own error says it best
        size = input.shape[self.dim]
        rows = self.axis.output_size(size)
        reflected = self.mode in ("reflect", "circular") and max(self.axis.before, self.axis.after) >= size
        if rows < 1 or reflected:
            return None
        in_row, out_row = self._row_elements(input, weight)
        legal = max(in_row * size, out_row * rows) <= self.tiling.max_elements
        if legal and (rows < 2 or input.shape[-sides - 1 :].numel() < self.tiling.threshold):
            return None
        row_bytes = (in_row * (1 + self.input_copies) * self.axis.stride + out_row) * input.element_size()
        strip = strip_rows(rows, self.tiling.splits, row_bytes, input.device.type, self.tiling.strip_bytes)
        if not legal:
            return max(min(strip, self._legal_rows(in_row, out_row)), 1)
        return strip if strip < rows else None

    def tiled(self, input: Tensor, weight: Tensor, bias: Optional[Tensor], strip_rows: int) -> Tensor:
        """The whole output, strip by strip. Raises `OwnWaysError` where strips would not be the convolution."""
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
                call: ConvCall = call,
                samples: Tensor = samples,
                start: int = start,
                count: int = count,
            ) -> None:
                nonlocal output
                window = call.window(first, last, size)
                result = _of_given(call.strip(call.read(samples, window), window, first, last, weight, bias))
                if output is None:
                    output = self._allocate(result, rows, input, weight)
                target = output if len(groups) == 1 else output.narrow(0, start, count)
                target.narrow(self.dim, first, last - first).copy_(result)

            for done in self.each_strip(work, input, rows, strip_rows):
                self.report(index * rows + done, len(groups) * rows)
        assert output is not None
        return output

    def of_samples(self, start: int, count: int) -> ConvCall:
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
            with videos.in_strips(piece, weight, self._by_onednn):
                result = self.whole(piece, weight, bias)
            self._check(result, self.axis.output_size(piece.shape[self.dim]))
            return result.narrow(self.dim, window.skip, count)
        pads = list(self._uneven)
        pads[-2 * self.dim - 2] += window.before
        pads[-2 * self.dim - 1] += window.after
        if any(pads):
            piece = F.pad(piece, pads)
        piece = _in_format(piece, self._format, len(self.module.kernel_size))
        forward = type(self.module)._conv_forward  # type: ignore[attr-defined]
        with videos.in_strips(piece, weight, self._by_onednn):
            result = forward(self._strip_module, piece, weight, bias, *self._args, **self._kwargs)
        self._check(result, count)
        return result

    def _check(self, result: Tensor, rows: int) -> None:
        """Raises `OwnWaysError` for a forward that gives other rows than its module's settings say."""
        if result.shape[self.dim] != rows:
            raise OwnWaysError

    def _batched(self, input: Tensor, weight: Tensor, bias: Optional[Tensor], strip_rows: int) -> Optional[Tensor]:
        """All strips as one batch, in one call; None where that is impossible or does not fit."""
        size = input.shape[self.dim]
        rows = self.axis.output_size(size)
        if self.opaque or input.dim() != len(self.module.kernel_size) + 2 or _adds_to_tensor(input):
            return None
        ranges = equal_strips(rows, strip_rows)
        in_row, out_row = self._row_elements(input, weight)
        in_rows, out_rows = len(ranges) * (strip_rows * self.axis.stride + self.axis.span), len(ranges) * strip_rows
        if max(in_row * in_rows, out_row * out_rows) > self.tiling.max_elements:
            return None
        try:
            pieces = []
            for first, last in ranges:
                window = self.window(first, last, size)
                piece = self.read(input, window)
                pad = [0] * (-2 * self.dim - 2) + [window.before, window.after]
                pieces.append(F.pad(piece, pad) if any(pad) else piece)
            with without_autocast(input.device.type):  # which refuses float16 here, on a CPU
                batch = torch.cat(pieces)
            del pieces, piece
            window = Window(range(batch.shape[self.dim]))
            result = _of_given(self.strip(batch, window, 0, strip_rows, weight, bias))
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
        sides = len(self.module.kernel_size)
        batched = result.dim() == sides + 2
        result = _as_image(result, sides)
        if not batched:  # whose batch has a stride of its own
            result = result.as_strided(result.shape, (result.numel(), *result.stride()[1:]))
        format = _memory_format(result)
        if result.shape[1:].numel() == 1:  # one pixel has the strides of either format
            format = max(self._format, _memory_format(weight), key=_CHANNELS_LAST.__contains__)
        shape = list(result.shape)
        shape[self.dim] = rows
        if batched:
            shape[0] = input.shape[0]
        output = _empty_as(result, shape, format)
        output = output.squeeze(2) if sides == 1 else output
        return output if batched else output.squeeze(0)

    def _padded_format(self, input: Tensor) -> torch.memory_format:
        """The memory format in which a whole convolution of `input` gets it, behind the padding."""
        sides = len(self.module.kernel_size)
        if input.dim() not in (sides + 1, sides + 2):
            return torch.contiguous_format
        if (self.mode == "circular" and self._pads) or (sides == 1 and not input.is_contiguous()):
            return torch.contiguous_format  # as padding makes it, and as torch wants what has one side
        return _memory_format(_as_image(input, sides))

    def report(self, done: int, total: int) -> None:
        self.tiling.report(self.module, done, total)

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
        """Output rows whose input and output both stay within `Tiling.max_elements`; 0 if not even one does."""
        extra = self.axis.opaque_rows if self.opaque else self.axis.span - self.axis.stride
        extra_out = out_row * (extra // self.axis.stride + 1) if self.opaque else 0
        most = self.tiling.max_elements
        in_rows = legal_rows(in_row * self.axis.stride, in_row * extra, most)
        return min(in_rows, legal_rows(out_row, extra_out, most))

    def _legal_batches(self, input: Tensor, weight: Tensor) -> list[tuple[int, int]]:
        """`(start, count)` of the groups of samples that run one after the other: one, unless a row is too large."""
        in_row, out_row = self._row_elements(input, weight)
        if input.dim() != len(self.module.kernel_size) + 2 or self._legal_rows(in_row, out_row) > 0:
            return [(0, input.shape[0])]
        batch = input.shape[0]
        row = max(in_row * self.axis.span, out_row) // batch
        count = max(legal_rows(row, most=self.tiling.max_elements), 1)
        return [(start, min(count, batch - start)) for start in range(0, batch, count)]


def _of_given(result: Tensor) -> Tensor:
    """A strip's result. Raises `OwnWaysError` for that of parameters of the forward's own, whose gradients strips
    would lose."""
    if result.requires_grad:
        raise OwnWaysError
    return result


def _adds_to_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that adds to `Tensor` what operators hand on, and computes as that does."""
    kind, plain = type(tensor), Tensor
    return kind is not plain and getattr(kind, _DISPATCH) is getattr(plain, _DISPATCH)


def _empty_as(result: Tensor, shape: list[int], format: torch.memory_format) -> Tensor:
    """A tensor without values, of the type and the device of `result`; of its class too where that only adds to
    `Tensor`, as eager's would be."""
    if not _adds_to_tensor(result):
        return torch.empty(shape, dtype=result.dtype, device=result.device, memory_format=format)
    strides = torch.empty(shape, device="meta", memory_format=format).stride()
    return result.new_empty_strided(shape, strides)


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


def _as_image(tensor: Tensor, sides: int) -> Tensor:
    """A map `[C, ...]` as a batch of one, and one of a single side as an image of one row: as backends see them."""
    tensor = tensor if tensor.dim() == sides + 2 else tensor.unsqueeze(0)
    return tensor.unsqueeze(2) if sides == 1 else tensor


def _in_format(piece: Tensor, format: torch.memory_format, sides: int) -> Tensor:
    """A strip's input with channels first or last as the whole input has them: gathered rows and zeros lose that."""
    image = _as_image(piece, sides)
    if _memory_format(image) is format:
        return piece
    copied = torch.empty(image.shape, dtype=image.dtype, device=image.device, memory_format=format).copy_(image)
    copied = copied.squeeze(2) if sides == 1 else copied
    return copied if piece.dim() == sides + 2 else copied.squeeze(0)


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
