"""Operators with several results: the first comes row by row, others that are read are evaluated whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

from torch import Tensor

from ...graph.node import Node
from ...graph.steps import Whole
from ..shapes import Spec
from . import norms, pools, reductions
from .common import OperatorCall, over


def _first(builder: Callable[[OperatorCall], Optional[Node]]) -> Callable[[OperatorCall], Optional[Node]]:
    """A builder that has the operator called for its first result."""
    return lambda call: builder(call._replace(func=_First(call.func)))


class _First:
    """An operator of which the first result counts."""

    def __init__(self, func: Any) -> None:
        self.func, self.overloadpacket, self._schema = func, func.overloadpacket, func._schema
        self.namespace, self.tags, self._overloadname = func.namespace, func.tags, func._overloadname

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.func(*args, **kwargs)[0]


_batch_norm = _first(norms.batch_norm)

_BUILDERS: dict[str, Callable[[OperatorCall], Optional[Node]]] = {
    "native_group_norm": norms.group_norm,
    "native_layer_norm": _first(norms.over_last),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm"),
        _batch_norm,
    ),
    **{f"max_pool{sides}d_with_indices": pools.pool for sides in (1, 2, 3)},
    **{
        f"adaptive_max_pool{sides}d": lambda call: reductions.pooled_to_one(call) or pools.adaptive_pool(call)
        for sides in (1, 2, 3)
    },
}
"""What makes the first result's node."""


def build(call: OperatorCall, specs: Sequence[Spec]) -> Optional[tuple[Node, ...]]:
    """The nodes of all results, which look like `specs`; None for operators that are not here."""
    builder = _BUILDERS.get(call.name)
    first = None if builder is None else builder(call._replace(spec=specs[0]))
    return None if first is None else (first, *(_other(call, index, spec) for index, spec in enumerate(specs[1:], 1)))


def _other(call: OperatorCall, index: int, spec: Spec) -> Node:
    inputs, apply = over(call.args, call.kwargs)
    step = Whole(lambda pieces: apply(call.func, pieces)[index])
    step.name = call.name
    return call.recorder.node(step, inputs, [None] * len(inputs), spec, call.device, None)
