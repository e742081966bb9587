"""Which operators treat the samples of a batch, which lie along the first dimension, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional

from ...graph.node import Node
from ..held import Held
from .common import OperatorCall, flat


def mark(call: OperatorCall, node: Node, pointwise: bool) -> None:
    """Note in the step of an operator which of its inputs are read by sample, where that is known: `Step.samples`.

    pointwise: it is one of elements at one place.
    """
    step = node.step
    rule = _at_one_place if pointwise else _RULES.get(call.name)
    if step is not None and step.samples is None and rule is not None and len(node.shape) > 1:
        step.samples = rule(call, node)


ByInput = Optional[Sequence[bool]]


def _has_samples(shape: Sequence[int], result: Sequence[int]) -> bool:
    """Whether an argument that broadcasts against a result has its samples."""
    return len(shape) == len(result) and shape[0] == result[0] != 1


def _at_one_place(call: OperatorCall, node: Node) -> ByInput:
    """Arguments that broadcast. What is held has to be the same for all samples: it is not split."""
    held = [one for one in flat(call.args, call.kwargs) if isinstance(one, Held)]
    if any(_has_samples(one.shape, node.shape) for one in held):
        return None
    return [_has_samples(source.shape, node.shape) for source in node.inputs]


def _factors(call: OperatorCall, node: Node) -> ByInput:
    """Products and attention of many matrices."""
    return _at_one_place(call, node) if len(node.shape) > 2 else None


def _first_alone(call: OperatorCall, node: Node) -> ByInput:
    """The map; weights are whole."""
    return [True, *[False] * (len(node.inputs) - 1)]


def _one_map(call: OperatorCall, node: Node) -> ByInput:
    return [True] if len(node.inputs) == 1 else None


def _image(call: OperatorCall, node: Node) -> ByInput:
    """What changes all but the first of four dimensions or more."""
    return [True] if len(node.shape) > 3 else None


def _along_others(call: OperatorCall, node: Node) -> ByInput:
    """An operator that treats some dimensions as a whole, if these are others than the first."""
    given, count = call.given(), len(next(iter(node.inputs)).shape)
    dims = given.get("dim", given.get("dims"))
    if dims is None or dims == [] or len(node.inputs) != 1:
        return None
    return None if 0 in [dim % count for dim in ([dims] if isinstance(dims, int) else dims)] else [True]


def _joined(call: OperatorCall, node: Node) -> ByInput:
    return [True] * len(node.inputs) if call.given().get("dim", 0) % len(node.shape) else None


def _repeated(call: OperatorCall, node: Node) -> ByInput:
    times, count = call.args[1], len(next(iter(node.inputs)).shape)
    return [True] if len(times) < count or (len(times) == count and times[0] == 1) else None


def _padded(call: OperatorCall, node: Node) -> ByInput:
    given = call.given()
    return [True] if len(given.get("pad", given.get("padding", ()))) < 2 * len(node.shape) else None


def _over_last(call: OperatorCall, node: Node) -> ByInput:
    return _first_alone(call, node) if len(call.given()["normalized_shape"]) < len(node.shape) else None


def _indexed(call: OperatorCall, node: Node) -> ByInput:
    return [True] if call.args[1][0] is None else None


_RULES: dict[str, Callable[[OperatorCall, Node], ByInput]] = {
    **dict.fromkeys(
        (
            "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        ),
        _first_alone,
    ),
    **dict.fromkeys(
        ("linear", "prelu", "_prelu_kernel", "batch_norm", "native_batch_norm", "contiguous", "lift_fresh_copy"),
        _one_map,
    ),
    **{
        f"{kind}_pool{sides}d": _one_map
        for kind in ("avg", "max", "adaptive_avg", "adaptive_max")
        for sides in (1, 2, 3)
    },
    **{f"max_pool{sides}d_with_indices": _one_map for sides in (1, 2, 3)},
    **{f"_adaptive_avg_pool{sides}d": _one_map for sides in (2, 3)},
    **{
        f"{prefix}{name}": _one_map
        for prefix in ("upsample_", "_upsample_")
        for name in (
            "nearest1d", "nearest2d", "nearest3d", "nearest_exact1d", "nearest_exact2d", "nearest_exact3d", "linear1d",
            "bilinear2d", "trilinear3d", "bicubic2d",
        )
    },
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _image),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    **{f"{kind}_pad{sides}d": _padded for kind in ("reflection", "replication") for sides in (1, 2, 3)},
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), _over_last),
    **dict.fromkeys(
        (
            "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "glu", "flip", "logcumsumexp",
            "index_select", "repeat_interleave", "roll", "mean", "sum", "amax", "amin", "linalg_vector_norm", "norm",
            "var", "std", "all", "any", "logsumexp", "prod", "argmax", "argmin",
        ),
        _along_others,
    ),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _joined),
    **dict.fromkeys(("repeat", "tile"), _repeated),
    **dict.fromkeys(("matmul", "bmm", "scaled_dot_product_attention"), _factors),
    "index": _indexed,
}  # fmt: skip
"""Which inputs of an operator are read by sample, by its name."""
