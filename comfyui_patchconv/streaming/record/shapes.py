"""What an operator's results look like: their shapes, strides and types, and whether they are views of an argument.

Asked of the operator itself, on tensors without values, and remembered.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph.node import dense_strides
from .schema import AT_ONE_PLACE, operator_of


class Spec(NamedTuple):
    """A tensor without its values. alias: the place of the argument that it is a view of; None for its own memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    alias: Optional[int] = None

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.dtype)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def empty(self, device: str = "meta") -> Tensor:
        """A tensor of this sort on the meta device, or of zeros."""
        strides = self.strides
        if not self.offset:
            tensor = torch.empty_strided(self.shape, strides, dtype=self.dtype, device=device)
            return tensor if device == "meta" else tensor.zero_()
        reach = 1 + sum((side - 1) * stride for side, stride in zip(self.shape, strides)) if 0 not in self.shape else 0
        memory = torch.zeros(self.offset + reach, dtype=self.dtype, device=device)
        return memory.as_strided(self.shape, strides, self.offset)


def load() -> None:
    """Has torch load what it answers with for tensors without values, which it would do at the first such question.

    That takes a second, and leaves a circle of frames behind (`torch.fx.wrap`): those of the program, with its maps, if
    it is asked from there.
    """
    if "torch._dynamo" not in sys.modules:
        with suppress(ImportError):
            importlib.import_module("torch._dynamo")
        gc.collect()


_MOST = 1 << 14
"""Answers that are remembered."""

_known: dict[Any, Optional[tuple[Any, ...]]] = {}


def specs_of(func: Any, args: Any, kwargs: dict[str, Any], spec: Callable[[Any], Optional[Spec]]) -> Any:
    """What `func(*args, **kwargs)` returns, as `Spec`s: one, or a tuple of several; None where that is not known.

    spec: the `Spec` of an argument that is a tensor, None for any other.
    """
    try:
        kinds: list[str] = []
        named = tuple([(name, _key(value, spec, kinds)) for name, value in kwargs.items()]) if kwargs else ()
        given = tuple([_key(value, spec, kinds) for value in args])
        key = (func, given, named, tuple(kinds))
        if key in _known:
            return _known[key]
    except (TypeError, NotImplementedError):  # an argument that cannot be remembered, or not be compared
        return None
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = answer = _asked(func, args, kwargs, spec)
    return answer


SIMPLE = frozenset({int, float, bool, type(None), str, torch.dtype, torch.layout, torch.memory_format})
"""Types of arguments in which there is nothing to look for."""


def _key(value: Any, spec: Callable[[Any], Optional[Spec]], kinds: list[str]) -> Any:
    """What is remembered of an argument; the types of devices go to `kinds`."""
    kind = type(value)
    if kind in SIMPLE:
        return kind, value
    if kind is list or kind is tuple:
        for one in value:
            if type(one) is not int:
                return tuple([_key(one, spec, kinds) for one in value])
        return int, tuple(value)
    sort = spec(value)
    if sort is not None:
        kinds.append(value.device.type)
        return sort
    if isinstance(value, (list, tuple)):
        return tuple([_key(one, spec, kinds) for one in value])
    return "device" if isinstance(value, torch.device) else (kind, value)


def _empty(value: Any, spec: Callable[[Any], Optional[Spec]], kept: list[Tensor], device: str) -> Any:
    """An argument without values of its own, on the meta device or of zeros; tensors go to `kept`."""
    sort = spec(value)
    if sort is not None:
        kept.append(sort.empty(device))
        return kept[-1]
    if isinstance(value, (list, tuple)):
        return type(value)(_empty(one, spec, kept, device) for one in value)
    return torch.device(device) if isinstance(value, torch.device) else value


_FEW = 1 << 14
"""Elements up to which an operator is asked on the CPU itself: some of its kernels give other strides than they say on
the meta device."""


def _is_small(func: Any, args: Any, kwargs: dict[str, Any], spec: Callable[[Any], Optional[Spec]]) -> bool:
    if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
        return func.overloadpacket.__name__ == "scaled_dot_product_attention" and _on_cpu_and_few(args, kwargs, spec)
    return _on_cpu_and_few(args, kwargs, spec)


def _on_cpu_and_few(args: Any, kwargs: dict[str, Any], spec: Callable[[Any], Optional[Spec]]) -> bool:
    kinds = _device_types((args, kwargs))
    if not kinds or any(kind != "cpu" for kind in kinds):
        return False
    if any(isinstance(value, torch.device) and value.type != "cpu" for value in (*args, *kwargs.values())):
        return False
    return _elements((args, kwargs), spec) <= _FEW


def _elements(value: Any, spec: Callable[[Any], Optional[Spec]]) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)) and spec(value) is None:
        return sum(_elements(one, spec) for one in value)
    sort = spec(value)
    return 0 if sort is None else torch.Size(sort.shape).numel()


def _asked(func: Any, args: Any, kwargs: dict[str, Any], spec: Callable[[Any], Optional[Spec]]) -> Any:
    known = _asked_on("meta", func, args, kwargs, spec)
    if isinstance(known, Spec) and _is_refused(func, args, kwargs, spec, known):
        return None
    few = sum(torch.Size(one.shape).numel() for one in _as_tuple(known)) <= _FEW  # of its result, too: scores are many
    if known is not None and few and _is_small(func, args, kwargs, spec):
        told = _asked_on("cpu", func, args, kwargs, spec)
        one, other = ([_Looks(*spec[:1], spec.dtype) for spec in _as_tuple(answer)] for answer in (known, told))
        return told if one == other else known
    return known


def _is_refused(
    func: Any, args: Any, kwargs: dict[str, Any], spec: Callable[[Any], Optional[Spec]], known: Spec
) -> bool:
    """Whether the CPU refuses such types, or gives another, where the meta device says otherwise: asked of an operator
    of elements at one place, with ones."""
    kinds = _device_types((args, kwargs))
    if operator_of(func).name not in AT_ONE_PLACE or func._schema.is_mutable or any(kind != "cpu" for kind in kinds):
        return False
    if any(isinstance(value, (list, tuple)) for value in (*args, *kwargs.values())):
        return False

    def one(value: Any) -> Any:
        sort = spec(value)
        return value if sort is None else torch.ones([1] * len(sort.shape), dtype=sort.dtype)

    try:
        made = func(*map(one, args), **{name: one(value) for name, value in kwargs.items()})
    except Exception:
        return True
    return made.dtype != known.dtype


class _Looks(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


def _as_tuple(answer: Any) -> tuple[Spec, ...]:
    return () if answer is None else (answer,) if isinstance(answer, Spec) else answer


def _asked_on(device: str, func: Any, args: Any, kwargs: dict[str, Any], spec: Callable[[Any], Optional[Spec]]) -> Any:
    """As `specs_of`, asked on the meta device, or on the CPU with zeros."""
    kept: list[Tensor] = []
    if func.overloadpacket.__name__ in _CONVOLUTIONS and not _go_together(func, args, kwargs, spec):
        return None
    try:
        result = func(
            *(_empty(value, spec, kept, device) for value in args),
            **{name: _empty(value, spec, kept, device) for name, value in kwargs.items()},
        )
    except Exception:  # no implementation without values, or arguments that eager refuses, too
        return None
    storages: dict[int, int] = {}
    for place, tensor in enumerate(kept):
        storages.setdefault(tensor.untyped_storage()._cdata, place)
    several = isinstance(result, (list, tuple))
    results = tuple(result) if several else (result,)
    if not all(isinstance(one, Tensor) and one.layout is torch.strided for one in results):
        return None
    answer = tuple(Spec.of(one)._replace(alias=storages.get(one.untyped_storage()._cdata)) for one in results)
    if device == "cpu":
        return answer if several else answer[0]
    if func.overloadpacket.__name__ in _CONVOLUTIONS:
        return _as_backend_has_it(func, args, kwargs, spec, answer[0])
    if func.overloadpacket.__name__ == "scaled_dot_product_attention":
        return _of_attention(args, kwargs, func, spec, answer[0])
    if func.overloadpacket.__name__ in _ARITHMETIC:
        answer = _with_numbers_as_tensors(func, args, kwargs, spec, answer)
    if _keeps_format(func, args, kwargs) and _device_types((args, kwargs))[:1] == ["cpu"]:
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(answer[0].shape))
        if last is not None and answer[0].alias is None and _suggests(spec(args[0])):
            tensor = torch.empty(answer[0].shape, dtype=answer[0].dtype, device="meta", memory_format=last)
            answer = (Spec.of(tensor), *answer[1:])
    return answer if several else _as_few_places_have_it(func, args, kwargs, spec, answer[0])


_ARITHMETIC = frozenset(
    """
    add sub rsub subtract mul multiply div divide true_divide remainder fmod eq ne lt le gt ge where
    """.split()  # noqa: SIM905
)
"""What takes a number in the place of a tensor, and says other strides on the meta device then."""


def _with_numbers_as_tensors(
    func: Any, args: Any, kwargs: dict[str, Any], spec: Callable[[Any], Optional[Spec]], answer: tuple[Spec, ...]
) -> tuple[Spec, ...]:
    """The strides of arithmetic with numbers, where those of a tensor of one place in a dimension leave a choice."""
    sorts = [spec(value) for value in args]
    odd = any(sort is not None and _leaves_a_choice(sort) for sort in sorts)
    if not odd or not any(type(value) in (int, float) for value in args):
        return answer
    given = [
        torch.empty((), dtype=torch.tensor(value).dtype, device="meta") if type(value) in (int, float) else
        value if sort is None else sort.empty()
        for value, sort in zip(args, sorts)
    ]  # fmt: skip
    result = func.overloadpacket(*given, **kwargs)
    alike = result.shape == answer[0].shape and result.dtype == answer[0].dtype
    return (answer[0]._replace(strides=tuple(result.stride())),) if alike else answer


def _leaves_a_choice(spec: Spec) -> bool:
    """Whether a dimension of one place has another stride than the dimensions behind it give it."""
    size = 1
    for side, stride in zip(reversed(spec.shape), reversed(spec.strides)):
        if side == 1 and stride != size:
            return True
        size *= side
    return False


_KEEPING_FORMAT = frozenset(
    """
    group_norm native_group_norm pixel_shuffle channel_shuffle roll pad reflection_pad2d reflection_pad3d
    replication_pad2d replication_pad3d max_unpool2d
    """.split()  # noqa: SIM905
)
"""What keeps channels last on the CPU, and says otherwise on the meta device."""


def _keeps_format(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator is one of these: not where it goes on at the other end."""
    operator = operator_of(func)
    if operator.name not in _KEEPING_FORMAT:
        return False
    given = dict(zip(operator.names, args)) | kwargs
    return given.get("mode") != "circular" and (operator.name != "roll" or bool(given.get("dims")))


def _as_few_places_have_it(
    func: Any, args: Any, kwargs: dict[str, Any], spec: Callable[[Any], Optional[Spec]], result: Spec
) -> Spec:
    """The result of an operator that treats each place by itself, in the order in which the CPU has that of few places
    of such arguments: some kernels give other strides than they say on the meta device."""
    tags = func.tags
    if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in tags or operator_of(func).looks:
        return result
    values = [*args, *kwargs.values()]
    sorts = [sort for sort in map(spec, values) if sort is not None]
    usual = all(dense_strides(sort.shape, range(len(sort.shape), 0, -1)) == list(sort.strides) for sort in sorts)
    if usual or result.alias is not None or len(result.shape) < 3 or _keeps_format(func, args, kwargs):
        return result
    if any(kind != "cpu" for kind in _device_types((args, kwargs))):
        return result
    if any(isinstance(value, (list, tuple)) and _device_types(value) for value in values):
        return result
    if any(isinstance(value, torch.device) and value.type != "cpu" for value in values):
        return result

    def few(value: Any) -> Any:
        sort = spec(value)
        return value if sort is None else _of_few_places(sort, result.shape)

    try:
        made = func(*map(few, args), **{name: few(value) for name, value in kwargs.items()})
    except Exception:  # it is no such operator
        return result
    alike = isinstance(made, Tensor) and made.layout is torch.strided and made.dtype == result.dtype
    if not alike or made.shape != tuple(min(side, 2) for side in result.shape):
        return result
    strides, size = [0] * len(result.shape), 1
    for dim in sorted(range(len(strides)), key=lambda dim: (made.stride(dim), result.shape[dim] > 1, -dim)):
        strides[dim], size = size, size * max(result.shape[dim], 1)
    known = dense_strides(result.shape, result.strides)
    if known is None or _in_one_order(result.shape, known, strides):
        return result
    return result._replace(strides=tuple(strides))


def _of_few_places(sort: Spec, result: Sequence[int]) -> Tensor:
    """A tensor of ones that lies as one of `sort` does, of two places along each dimension of the result's; as it is
    where it does not broadcast against that. Raises ValueError where it is large then."""
    behind = result[len(result) - len(sort.shape) :]
    if len(sort.shape) > len(result) or any(side not in (1, other) for side, other in zip(sort.shape, behind)):
        if prod(sort.shape) > _FEW:
            raise ValueError("a large tensor of another shape")
        return torch.empty_strided(sort.shape, sort.strides, dtype=sort.dtype).fill_(1)
    shape = [min(side, 2) for side in sort.shape]
    strides = list(sort.strides)
    if dense_strides(sort.shape, strides) == strides:
        ends, size = {1: 1}, 1  # what strides become, also those of one place, which lie where others end
        for dim in sorted(range(len(shape)), key=lambda dim: (strides[dim], -dim)):
            if shape[dim] > 1:
                ends[strides[dim]], size = size, size * shape[dim]
                ends[strides[dim] * sort.shape[dim]] = size
        strides = [ends.get(stride, stride) for stride in strides]
    return torch.empty_strided(shape, strides, dtype=sort.dtype).fill_(1)


def _in_one_order(shape: Sequence[int], strides: Sequence[int], others: Sequence[int]) -> bool:
    return all(one == other or side <= 1 for one, other, side in zip(strides, others, shape))


_CONVOLUTIONS = frozenset(
    {"conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)


def _go_together(func: Any, args: Any, kwargs: dict[str, Any], spec: Callable[[Any], Optional[Spec]]) -> bool:
    """Whether a convolution's input, weight and bias are such as eager takes; the meta device takes others too."""
    given = dict(zip(operator_of(func).names, args)) | kwargs
    input, weight, bias = (spec(given.get(name)) for name in ("input", "weight", "bias"))
    if input is None or weight is None or len(input.shape) < len(weight.shape) - 1:
        return False
    transposed, groups = "transpose" in func.overloadpacket.__name__ or given.get("transposed"), given.get("groups", 1)
    channels = input.shape[1 - len(weight.shape)]
    alike = channels == (weight.shape[0] if transposed else weight.shape[1] * groups) and input.dtype == weight.dtype
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    return alike and (bias is None or (bias.shape == (outputs,) and bias.dtype == input.dtype))


def _as_backend_has_it(func: Any, args: Any, kwargs: dict[str, Any], spec: Any, result: Spec) -> Spec:
    """The result of a convolution, whose strides are up to the backend that will be chosen for its arguments: channels
    last where these are, on most. Asked for the CPU, whose tensors take no memory until they are written to."""
    given = dict(zip(operator_of(func).names, args)) | kwargs
    input, weight = spec(given["input"]), spec(given["weight"])
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(len(result.shape))
    if last is None or not any(_suggests(one) for one in (input, weight)):
        return result
    if all(device == "cpu" for device in _device_types((args, kwargs))):
        sides = len(result.shape) - 2

        def each(name: str, default: int) -> list[int]:
            value = given.get(name, default)
            values = [value] if isinstance(value, int) else list(value)
            return values * sides if len(values) == 1 else values

        x, w = (torch.empty_strided(one.shape, one.strides, dtype=one.dtype) for one in (input, weight))
        if isinstance(given.get("padding"), str):
            x, given["padding"] = _padded_before(x, weight.shape[2:], each("dilation", 1), given["padding"], last)
        transposed = "transpose" in func.overloadpacket.__name__ or bool(given.get("transposed"))
        backend = torch._C._select_conv_backend(
            x, w, None, each("stride", 1), each("padding", 0), each("dilation", 1), transposed,
            each("output_padding", 0), given.get("groups", 1), None,
        )  # fmt: skip
        last = torch._C._conv_determine_backend_memory_format(x, w, backend)
    tensor = torch.empty(result.shape, dtype=result.dtype, device="meta", memory_format=last)
    return Spec.of(tensor)


def _padded_before(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: str, last: torch.memory_format
) -> tuple[Tensor, list[int]]:
    """What a convolution padded to the same size is given, which is wider by what is uneven, and its padding."""
    totals = [0 if padding == "valid" else step * (side - 1) for side, step in zip(kernel, dilation)]
    if any(total % 2 for total in totals):
        sides = [side + total % 2 for side, total in zip(x.shape[2:], totals)]
        order = last if _suggests(Spec.of(x)) else torch.contiguous_format
        x = torch.empty((*x.shape[:2], *sides), dtype=x.dtype, memory_format=order)
    return x, [total // 2 for total in totals]


def _suggests(spec: Optional[Spec]) -> bool:
    """Whether backends take a tensor for channels last: by its strides alone (`is_channels_last_strides`, c10)."""
    if spec is None or len(spec.shape) not in (4, 5) or spec.strides[1] == 0:
        return False
    least = 0
    for dim in (1, *range(len(spec.shape) - 1, 1, -1), 0):
        side, stride = spec.shape[dim], spec.strides[dim]
        if side == 0 or stride < least or (dim == 0 and least == spec.strides[1]):
            return False
        least = stride * max(side, 1)
    return True


def _of_attention(
    args: Any, kwargs: dict[str, Any], func: Any, spec: Callable[[Any], Optional[Spec]], result: Spec
) -> Spec:
    """The result of attention, which fused kernels give with its heads behind the pixels, or in the query's order."""
    given = dict(zip(operator_of(func).names, args)) | kwargs
    looks = [spec(given[name]) for name in ("query", "key", "value")]
    if len(result.shape) != 4 or any(one is None or len(one.shape) != 4 for one in looks):
        return result
    order = [0, 2, 1, 3]
    if all(kind == "cpu" for kind in _device_types((args, kwargs))):
        mask = spec(given.get("attn_mask"))
        tensors = [torch.empty_strided(one.shape, one.strides, dtype=one.dtype) for one in looks if one is not None]
        masked = None if mask is None else torch.empty_strided(mask.shape, mask.strides, dtype=mask.dtype)
        options = {"scale": given.get("scale"), "enable_gqa": given.get("enable_gqa", False)}
        options = {name: value for name, value in options.items() if value}
        try:
            choose: Any = getattr(torch, "_fused_sdp_choice")  # noqa: B009 - it is no public name
            choice = choose(*tensors, masked, given.get("dropout_p", 0.0), given.get("is_causal", False), **options)
        except (RuntimeError, TypeError):
            return result
        if choice != _FLASH:
            return result
        order = _order_of_attention(tensors, bool(options.get("enable_gqa")))
    strides, size = [0] * 4, 1
    for dim in reversed(order):
        strides[dim], size = size, size * result.shape[dim]
    return result._replace(strides=tuple(strides))


def _order_of_attention(tensors: Sequence[Tensor], grouped: bool) -> list[int]:
    """The order in memory, the outermost first, of the dimensions of what the CPU's kernel gives for such a query, key
    and value: releases of torch differ, so it is asked with a few of their pixels."""
    few = [one[:2, :, :2].zero_() for one in tensors]
    options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
    made = F.scaled_dot_product_attention(few[0], few[1], few[2], **options)
    return sorted(range(4), key=lambda dim: (-made.stride(dim), dim))


_FLASH = 1
"""`torch.nn.attention.SDPBackend.FLASH_ATTENTION`."""


def _device_types(values: Any) -> list[str]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        return [one for value in values for one in _device_types(value)]
    return [values.device.type] if isinstance(values, Tensor) else []
