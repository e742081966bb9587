"""What each operator does to rows: the table that the lazy tensor looks into.

An operator that is not here, or is called in a way that is not, is evaluated whole: always right, at worst not thrifty.
Operators come composite (`aten.conv2d`, in inference mode) or decomposed (`aten.convolution`): both are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..geometry import Axis
from ..onednn import conv3d
from . import engine
from .aliases import joined
from .graph import (
    Convolve,
    ConvolveTransposed,
    Node,
    Normalise,
    Pad,
    Resample,
    RowLocal,
    Step,
    UpsampledConvolve,
    Wrap,
    summed_kernels,
)

aten = torch.ops.aten

POINTWISE = frozenset(
    """
    silu relu relu6 leaky_relu elu gelu mish hardswish sigmoid tanh hardtanh softplus clamp clamp_min clamp_max neg abs
    exp log sin cos sqrt rsqrt square pow mul add sub rsub div maximum minimum lerp where addcmul reciprocal
    nan_to_num fill zero to _to_copy clone
    """.split()  # noqa: SIM905
)
"""Operators of one element, or of elements at one place; their in-place forms are taken too."""

OVER_CHANNELS = ("mean", "sum", "linalg_vector_norm", "norm", "var", "amax", "amin", "softmax", "_softmax")
"""Reductions, row-local if they run over dimensions between the batch and the rows alone."""

ARRANGING = (
    "permute", "movedim", "transpose", "expand", "expand_as", "repeat", "view", "_unsafe_view", "reshape", "flatten",
    "unflatten",
)  # fmt: skip
"""Operators that may leave the last two dimensions as they are."""

SAME = ("alias", "detach", "contiguous", "lift_fresh")
"""Operators whose result is their input; for others that may be it, see `keeps`."""

Operator = Callable[..., Any]
_CONVOLVE = (F.conv1d, F.conv2d, conv3d)
_CONVOLVE_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def build(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[tuple[Node, ...]]:
    """The nodes of what `func` returns, its tensor arguments being `Node`s where they are deferred; None if unknown."""
    name = func.overloadpacket.__name__
    special = _SPECIAL.get(name)
    if special is not None:
        node = special(func, *args, **kwargs)
        return None if node is None else (node,)
    plain = name.rstrip("_") if not name.startswith("_") else name
    if plain in POINTWISE or (plain in OVER_CHANNELS and _over_channels(args, kwargs)):
        return _row_local(getattr(getattr(aten, plain), func._overloadname), args, kwargs)
    if name in ("cat", "concat", "concatenate") and _not_along_rows(name, args, kwargs):
        maps = args[0]
        same = all(isinstance(one, Node) and len(one.shape) == len(maps[0].shape) for one in maps)
        if same and len({(one.height, one.dtype, one.device) for one in maps}) == 1:
            return (joined(maps, kwargs.get("dim", [*args, 0][1]) % len(maps[0].shape), maps[0]),)
    if name in _ALONG and _not_along_rows(name, args, kwargs):
        return _row_local(func, args, kwargs, moves=True)
    return None


def writes(name: str) -> bool:
    """Whether the operator `name` writes into its first argument."""
    return name.endswith("_") and not name.startswith("_")


def keeps(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether `func` returns its first argument itself: no cast where the type is right, no dropout in evaluation."""
    name, input = func.overloadpacket.__name__, args[0]
    if name in SAME:
        return True
    if name not in ("to", "type_as", "dropout", "feature_dropout"):
        return False
    given = _given(func, args, kwargs)
    if "train" in given:
        return not given["train"] or not given["p"]
    dtype, device = _target(given, input)
    return device == input.device and dtype == input.dtype and not given.get("copy")


def _given(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs


def _target(given: dict[str, Any], input: Any) -> tuple[torch.dtype, torch.device]:
    """Type and device of what a cast of `input` returns."""
    dtype, device = (given.get(name) or getattr(given.get("other"), name, None) for name in ("dtype", "device"))
    return dtype or input.dtype, placed(device or input.device, input.device)


def placed(device: Any, like: torch.device) -> torch.device:
    """The device, by its number, that a user means who speaks of `device` to a map on `like`."""
    device = torch.device(device)
    if device.index is not None or device.type == like.type:
        return device if device.index is not None else like
    return torch.empty(0, device=device).device


def _row_local(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], moves: bool = False
) -> Optional[tuple[Node, ...]]:
    flat, spec = tree_flatten((list(args), dict(kwargs)))
    height, run = next((value.height, value.run) for value in flat if isinstance(value, Node))
    places: list[int] = []
    inputs: list[Node] = []
    for place, value in enumerate(flat):
        if isinstance(value, Tensor):
            zeros = run.origins.one_zero(value)
            flat[place] = value = (
                run.origins.own(value) if zeros is None else zeros
            )  # it may be written to before it is read
            if value.dim() >= 2 and value.shape[-2] != 1:
                value = Node.of(value, run, counted=zeros is None and not isinstance(value, nn.Parameter))
        if isinstance(value, torch.device):
            here = next(iter(_nodes(flat))).device
            if placed(value, here) != here:
                return None
        if isinstance(value, Node):
            if value.height != height and value.height != 1:
                return None
            if value.height == 1 != height:
                flat[place] = engine.whole(value)
                continue
            places.append(place)
            inputs.append(value)

    def call(pieces: Sequence[Any], flat: Sequence[Any] = tuple(flat)) -> Any:
        values = list(flat)
        for place, piece in zip(places, pieces):
            values[place] = piece
        positional, named = tree_unflatten(values, spec)
        return func(*positional, **named)

    with _disable_current_modes():  # see `_shaped`
        meta = call([_meta(node.shape, node.dtype) for node in inputs], [as_meta(value) for value in flat])
    outputs = [meta] if isinstance(meta, Tensor) else list(meta)
    if any(output.dim() < 4 or output.shape[-2] != height for output in outputs):
        return None
    device = inputs[0].device
    if isinstance(meta, Tensor):
        return (Node(run, meta.shape, meta.dtype, device, RowLocal(call, moves), inputs),)
    steps = [RowLocal(lambda pieces, index=index: call(pieces)[index], moves) for index in range(len(outputs))]
    return tuple(Node(run, out.shape, out.dtype, device, step, inputs) for out, step in zip(outputs, steps))


def _convolution(
    func: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *rest: Any,
) -> Optional[Node]:
    """`aten.conv2d`, `conv3d` (groups follow) and `convolution` (transposed, output padding and groups follow)."""
    transposed, groups = (rest[0], rest[2]) if len(rest) == 3 else (False, rest[0] if rest else 1)
    if transposed:
        return _transposed(func, input, weight, bias, stride, padding, rest[1], groups, dilation)
    if not isinstance(input, Node) or isinstance(weight, Node) or isinstance(padding, str):
        return None
    sides = len(input.shape) - 2
    stride, padding, dilation = (_each(value, sides) for value in (stride, padding, dilation))
    axis = Axis.of(weight.shape[-2], stride[-2], dilation[-2], padding[-2])
    if axis.output_size(input.height) < 1 or weight.dim() != len(input.shape):
        return None
    weight, bias = input.run.origins.own(weight), own(bias)
    convolve = _CONVOLVE[sides - 1]
    inner = [*padding[:-2], 0, padding[-1]]
    same = (list(weight.shape[2:]), stride, padding, dilation) == _SAME_3X3
    # Not in half precision: sums of kernels would be rounded once more than plain's.
    if same and _doubles(input.step) and weight.dtype in (torch.float32, torch.float64):
        (small,) = input.inputs
        kept = input.run.kernels if isinstance(weight, nn.Parameter) else {}  # a video's chunks use one weight
        kernels = kept.setdefault(id(weight), kept.get(id(weight)) or summed_kernels(weight))
        doubled = UpsampledConvolve(kernels, bias, lambda x, kernel: convolve(x, kernel, padding=(0, 1), groups=groups))
        shape = (input.shape[0], weight.shape[0], *input.shape[2:])
        return small.then(doubled, shape)

    def call(pieces: Sequence[Tensor]) -> Tensor:
        return convolve(pieces[0], weight, bias, stride, inner, dilation, groups)

    return _shaped(input, Convolve(axis, call, weight.nbytes), lambda x: convolve(
        x, as_meta(weight), as_meta(bias), stride, padding, dilation, groups
    ))  # fmt: skip


def _transposed(
    func: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Optional[Node]:
    """`aten.conv_transpose2d` and `conv_transpose3d`."""
    if not isinstance(input, Node) or isinstance(weight, Node) or weight.dim() != len(input.shape):
        return None
    sides = len(input.shape) - 2
    stride, padding, added, dilation = (_each(value, sides) for value in (stride, padding, output_padding, dilation))
    axis = Axis.of(weight.shape[-2], stride[-2], dilation[-2], padding[-2])
    weight, bias = input.run.origins.own(weight), own(bias)
    convolve = _CONVOLVE_TRANSPOSED[sides - 1]
    inner = [*padding[:-2], 0, padding[-1]]

    def call(pieces: Sequence[Tensor]) -> Tensor:
        return convolve(pieces[0], weight, bias, stride, inner, added, groups, dilation)

    return _shaped(input, ConvolveTransposed(axis, call, weight.nbytes), lambda x: convolve(
        x, as_meta(weight), as_meta(bias), stride, padding, added, groups, dilation
    ))  # fmt: skip


def own(weight: Any) -> Any:
    """A weight that stays what it is: hosts stream them through buffers that they use again, parameters excepted."""
    return weight.clone() if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter) else weight


_SAME_3X3 = ([3, 3], [1, 1], [1, 1], [1, 1])


def _doubles(step: Optional[Step]) -> bool:
    """Whether a step is nearest upsampling to twice the height and width."""
    return isinstance(step, Resample) and step.nearest == (2.0, 2.0)


def _group_norm(
    func: Any, input: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> Optional[Node]:
    if not isinstance(input, Node):
        return None
    step = Normalise(groups, own(weight), own(bias), eps)
    return input.then(step, input.shape)


def _batch_norm(func: Any, input: Any, *args: Any) -> Optional[Node]:
    if not isinstance(input, Node) or args[4]:  # in training
        return None
    values = [own(value) for value in args]
    return input.then(RowLocal(lambda pieces: func(pieces[0], *values)), input.shape)


_SMOOTH = {"bilinear2d": ("bilinear", 1), "trilinear3d": ("trilinear", 1), "bicubic2d": ("bicubic", 2)}
"""Upsampling that mixes rows: its mode, and how many rows beside its own an output row may read."""


def _upsample(func: Any, input: Any, size: Any = None, *rest: Any) -> Optional[Node]:
    mode, halo = _SMOOTH.get(func.overloadpacket.__name__.rpartition("_")[2], ("nearest", 0))
    corners, rest = True in rest, tuple(value for value in rest if not isinstance(value, bool))
    scales = next((value for value in rest if isinstance(value, (list, tuple))), rest or None)
    if not isinstance(input, Node) or len(input.shape) not in (4, 5) or corners:
        return None
    sides = len(input.shape) - 2
    if size is None:
        factors = [float(value) for value in scales or ()]
    else:
        factors = [out / side for out, side in zip(size, input.shape[2:])]
    if len(factors) != sides or any(factor != int(factor) or factor < 1 for factor in factors):
        return None
    # Plain finds the weights of rows by their number in float32, exactly for powers of two alone.
    if halo and int(factors[-2]) & (int(factors[-2]) - 1):
        return None

    def call(pieces: Sequence[Tensor]) -> Tensor:
        return F.interpolate(pieces[0], scale_factor=factors, mode=mode)

    nearest = tuple(factors) if mode == "nearest" else ()
    return _shaped(input, Resample(int(factors[-2]), 1, call, halo, nearest), lambda x: call([x]))


def _shuffle(func: Any, input: Any, factor: int) -> Optional[Node]:
    if not isinstance(input, Node):
        return None
    up, down = (factor, 1) if func.overloadpacket.__name__ == "pixel_shuffle" else (1, factor)
    return _shaped(input, Resample(up, down, lambda pieces: func(pieces[0], factor)), lambda x: func(x, factor))


def _average(
    func: Any,
    input: Any,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: Optional[int] = None,
) -> Optional[Node]:
    if not isinstance(input, Node):
        return None
    kernel, padding = (_each(value, len(input.shape) - 2) for value in (kernel, padding))
    stride = _each(stride, len(kernel)) if stride else kernel
    axis = Axis.of(kernel[-2], stride[-2], 1, padding[-2])
    if ceil_mode or (any(padding) and not count_include_pad) or axis.output_size(input.height) < 1:
        return None
    inner = [*padding[:-2], 0, padding[-1]]

    def pool(piece: Tensor, padding: list[int]) -> Tensor:
        return func(piece, kernel, stride, padding, ceil_mode, count_include_pad, divisor)

    return _shaped(input, Convolve(axis, lambda pieces: pool(pieces[0], inner)), lambda x: pool(x, padding))


def _pad(func: Any, input: Any, pad: Sequence[int], *rest: Any) -> Optional[Node]:
    name = func.overloadpacket.__name__
    mode = {"r": "replicate" if name.startswith("replic") else "reflect"}.get(name[0], "constant")
    if rest and isinstance(rest[0], str):
        mode = rest[0]
    if not isinstance(input, Node) or min(pad) < 0:
        return None
    value = next((float(one) for one in rest if isinstance(one, (int, float))), 0.0)
    left, right, before, after, *others = [*pad, *(0,) * (4 - len(pad))]
    if mode == "reflect" and max(before, after) >= input.height:
        return None

    def pad_with(piece: Tensor, above: int, below: int) -> Tensor:
        edges = (left, right, above, below, *others)
        return F.pad(piece, edges, mode, value if mode == "constant" else None) if any(edges) else piece

    step: Step = Pad(before, after, mode, value, lambda pieces: pad_with(pieces[0], 0, 0))
    if mode == "circular" and before + after:
        step = Wrap(before, after, lambda pieces: pad_with(pieces[0], 0, 0))
    return _shaped(input, step, lambda x: pad_with(x, before, after))


def _arranged(func: Any, input: Any, *args: Any, **kwargs: Any) -> Optional[Node]:
    """Operators that arrange the map anew and leave rows and columns, the last two dimensions, as they are."""
    name = func.overloadpacket.__name__
    if not isinstance(input, Node) or any(isinstance(value, Tensor) for value in args):
        return None
    values = [as_meta(value) for value in args]
    arranged = func(_meta(input.shape, input.dtype), *values, **kwargs)
    shape = arranged.shape
    if len(shape) < 4 or tuple(shape[-2:]) != input.shape[-2:] or arranged.dtype != input.dtype:
        return None
    if name in ("permute", "movedim", "transpose"):  # of what stays last two, none may have come from elsewhere
        probe = func(_meta(range(2, 2 + len(input.shape)), input.dtype), *values, **kwargs).shape
        if tuple(probe[-2:]) != (len(input.shape), len(input.shape) + 1):
            return None

        def call(pieces: Sequence[Tensor]) -> Tensor:
            return func(pieces[0], *values, **kwargs)
    elif name in ("expand", "expand_as", "repeat"):

        def call(pieces: Sequence[Tensor]) -> Tensor:
            rows = pieces[0].shape[-2]
            if name == "repeat":
                return func(pieces[0], *values, **kwargs)
            return pieces[0].expand(*shape[:-2], rows, shape[-1])
    else:

        def call(pieces: Sequence[Tensor]) -> Tensor:
            return pieces[0].reshape(*shape[:-2], pieces[0].shape[-2], shape[-1])

    return input.then(RowLocal(call, moves=True), shape)


def _cast(func: Any, input: Any, *args: Any, **kwargs: Any) -> Optional[Node]:
    """Casts, to another device too; strips wait for their copies, whatever was asked for: the host may read them."""
    return _like(input, *_target(_given(func, (input, *args), kwargs), input)) if isinstance(input, Node) else None


def _copied(func: Any, target: Any, source: Any, non_blocking: bool = False) -> Optional[Node]:
    """`target.copy_(source)`: what `target` is then."""
    if not isinstance(source, Node) or source.shape != target.shape:
        return None
    return _like(source, target.dtype, target.device)


def _like(input: Node, dtype: torch.dtype, device: torch.device) -> Node:
    step = RowLocal(lambda pieces: pieces[0].to(device, dtype))
    return Node(input.run, input.shape, dtype, device, step, [input])


def _dropout(func: Any, input: Any, p: float, train: bool) -> Optional[Node]:
    return None if (train and p) or not isinstance(input, Node) else _identity(input)


def _identity(input: Node) -> Node:
    return input.then(RowLocal(lambda pieces: pieces[0]), input.shape)


_SPECIAL: dict[str, Operator] = {
    "conv2d": _convolution,
    "conv3d": _convolution,
    "convolution": _convolution,
    "conv_transpose2d": _transposed,
    "conv_transpose3d": _transposed,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "upsample_nearest2d": _upsample,
    "upsample_nearest3d": _upsample,
    "_upsample_nearest_exact2d": _upsample,
    "_upsample_nearest_exact3d": _upsample,
    **{f"upsample_{name}": _upsample for name in _SMOOTH},
    "pixel_shuffle": _shuffle,
    "pixel_unshuffle": _shuffle,
    "avg_pool2d": _average,
    "avg_pool3d": _average,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "replication_pad2d": _pad,
    "replication_pad3d": _pad,
    "reflection_pad2d": _pad,
    "reflection_pad3d": _pad,
    **dict.fromkeys(ARRANGING, _arranged),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    "copy_": _copied,
    "dropout": _dropout,
    "dropout_": _dropout,
    "feature_dropout": _dropout,
}


def _shaped(input: Node, step: Step, plain: Callable[[Tensor], Tensor]) -> Node:
    with _disable_current_modes():  # in a dry run of torch 2.1 casts and upsampling fail on the meta device
        meta = plain(_meta(input.shape, input.dtype))
    return input.then(step, meta.shape, meta.dtype)


def _meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def as_meta(value: Any) -> Any:
    """A tensor without values, or the meta device, in the place of a map, a tensor or a device."""
    if isinstance(value, torch.device):
        return torch.device("meta")
    return _meta(value.shape, value.dtype) if isinstance(value, (Node, Tensor)) else value


def _nodes(values: Any) -> list[Node]:
    return [value for value in values if isinstance(value, Node)]


def _each(value: Any, sides: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * sides if len(values) == 1 else values


def _over_channels(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a reduction of a map runs over dimensions between the batch and the rows alone."""
    given = [*args[1:2], *(kwargs[key] for key in ("dim",) if key in kwargs)]
    lists = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, (list, tuple))]
    dims = lists[0] if lists else [value for value in given if isinstance(value, int) and not isinstance(value, bool)]
    if not isinstance(args[0], Node) or not dims:
        return False
    sides = len(args[0].shape)
    return all(0 < dim % sides < sides - 2 for dim in dims)


_ALONG = {
    "cat": 1, "concat": 1, "concatenate": 1, "slice": 1, "narrow": 1, "select": 1, "unbind": 1, "unsqueeze": 1,
    "squeeze": 1, "stack": 1, "split": 2, "split_with_sizes": 2, "chunk": 2, "repeat_interleave": 2,
}  # fmt: skip
"""Operators along one dimension, and where among their arguments it stands."""


def _not_along_rows(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operator of `_ALONG` leaves the rows, second from last, what they are and where they are."""
    nodes = _nodes(args[0] if isinstance(args[0], (list, tuple)) else args[:1])
    place = _ALONG[name]
    dim = kwargs.get("dim", args[place] if len(args) > place else 0)
    if not nodes or not isinstance(dim, int):
        return False
    added, removed = name in ("unsqueeze", "stack"), name in ("select", "unbind", "squeeze")
    dims = len(nodes[0].shape) + added
    return dim % dims < dims - 2 if added or removed else dim % dims != dims - 2
