"""What each operator does to rows: the table that the recorder looks into.

An operator that is not here, or is called in a way that is not, is evaluated whole: always right, at worst not thrifty.
Operators come composite (`aten.conv2d`) or decomposed (`aten.convolution`): both are here. Those with several results
are in the table of `several`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Optional

import torch
from torch import Tensor

from ...graph.node import Node
from ..schema import AT_ONE_PLACE
from ..shapes import Spec
from . import arranging, convolution, kitchen, matrices, norms, pools, reductions, resample, samples, several
from .common import AsCalled, OperatorCall, over, row_local
from .convolution import CUDNN, usual

__all__ = [
    "CUDNN", "FILLED", "LIKE", "MADE", "OF_MAPS", "OF_PARAMETERS", "build", "build_several", "fill_like", "knows",
    "over", "usual",
]  # fmt: skip


def _pointwise(call: OperatorCall) -> Optional[Node]:
    return row_local(call)


def _prelu(call: OperatorCall) -> Optional[Node]:
    input, weight = call.args
    channels = isinstance(input, Node) and not input.flexible and input.dim == 1
    return None if isinstance(weight, Node) or channels else row_local(call, excluded=(1,), aligned=False)


_TABLE: dict[str, Callable[[OperatorCall], Optional[Node]]] = {
    **dict.fromkeys(AT_ONE_PLACE, _pointwise),
    **dict.fromkeys(("prelu", "_prelu_kernel"), _prelu),
    **convolution.TABLE,
    **pools.TABLE,
    **norms.TABLE,
    **resample.TABLE,
    **arranging.TABLE,
    **matrices.TABLE,
    **reductions.TABLE,
    **{
        f"{name}adaptive_avg_pool{sides}d": lambda call: reductions.pooled_to_one(call) or pools.adaptive_pool(call)
        for name in ("", "_")
        for sides in (1, 2, 3)
    },
}

_TABLES = {"aten": _TABLE, "comfy_kitchen": kitchen.TABLE}
"""By the namespace of operators."""

OF_MAPS = frozenset(
    """
    conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d group_norm native_group_norm
    upsample_nearest2d upsample_nearest3d
    """.split()  # noqa: SIM905
)
"""What decoders and encoders do to feature maps: with these streaming goes on where an ordinary map was in between."""

OF_PARAMETERS = frozenset({"_weight_norm", "_weight_norm_interface"})
"""What makes a weight of parameters alone, as weight norm does at each call: sounds' networks are full of it."""


def knows(func: Any) -> bool:
    """Whether it is known which rows `func` makes of which, though perhaps not for all of its arguments."""
    return _builder(func) is not None or (func.namespace == "aten" and func.overloadpacket.__name__ in several.TABLE)


@cache
def _builder(func: Any) -> Optional[Callable[[OperatorCall], Optional[Node]]]:
    """What makes the node of a call of `func`."""
    return _TABLES.get(func.namespace, {}).get(func.overloadpacket.__name__)


def build(
    recorder: Any, func: Any, args: Any, kwargs: dict[str, Any], spec: Spec, device: torch.device, writing: Any = None
) -> Optional[Node]:
    """The node of what `func` returns, row by row or as a reduction; None if it needs all of its arguments.

    writing: the operator that the program called, where that writes the result to its first argument.
    """
    builder = _builder(func)
    if builder is None or 0 in spec.shape:
        return None
    call = OperatorCall(recorder, func, args, kwargs, spec, device)
    node = builder(call)
    if node is not None:
        samples.mark(call, node, builder is _pointwise)
    if node is not None and node.eager is None and not convolution.has_better(node):
        node.eager = AsCalled(func, args, kwargs, writing)
    return node


def build_several(
    recorder: Any, func: Any, args: Any, kwargs: dict[str, Any], specs: Sequence[Spec]
) -> Optional[tuple[Node, ...]]:
    """The nodes of the results of an operator that has several."""
    if 0 in specs[0].shape or not isinstance(args[0], Node):
        return None
    call = OperatorCall(recorder, func, args, kwargs, specs[0], args[0].device)
    nodes = several.build(call, specs)
    if nodes is not None:
        samples.mark(call, nodes[0], False)
    return nodes


MADE = frozenset({"empty", "zeros", "ones", "full", "empty_strided", "randn", "rand"})
"""What makes a new tensor of numbers alone."""

Fill = Callable[[Any, dict[str, Any]], Any]

FILLED: dict[str, Fill] = {
    "zeros": lambda args, kwargs: 0,
    "ones": lambda args, kwargs: 1,
    "full": lambda args, kwargs: args[1] if len(args) > 1 else kwargs["fill_value"],
}
"""What makes a new tensor of one value: that value."""

LIKE: dict[str, Optional[Fill]] = {
    "empty_like": lambda args, kwargs: 0,
    "new_empty": lambda args, kwargs: 0,
    "new_empty_strided": lambda args, kwargs: 0,
    "zeros_like": lambda args, kwargs: 0,
    "new_zeros": lambda args, kwargs: 0,
    "ones_like": lambda args, kwargs: 1,
    "new_ones": lambda args, kwargs: 1,
    "full_like": lambda args, kwargs: args[1] if len(args) > 1 else kwargs["fill_value"],
    "new_full": lambda args, kwargs: args[2] if len(args) > 2 else kwargs["fill_value"],
    "rand_like": None,
    "randn_like": None,
    "randint_like": None,
}
"""What takes its looks from an argument and none of its values: what it is filled with; None for random numbers."""


def fill_like(name: str, made: Tensor, args: Any, kwargs: dict[str, Any]) -> None:
    """Give a new tensor the values that the operator `name` gives it."""
    fill = LIKE[name]
    if fill is not None:
        if not name.startswith(("empty", "new_empty")):
            made.fill_(fill(args, kwargs))
    elif name == "randn_like":
        made.normal_(generator=kwargs.get("generator"))
    elif name == "rand_like":
        made.uniform_(generator=kwargs.get("generator"))
    else:
        bounds = [value for value in args[1:] if isinstance(value, int)]
        made.random_(*([0] if len(bounds) == 1 else []), *bounds, generator=kwargs.get("generator"))
