"""Operators with several results: the first comes row by row, others that are read are evaluated whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Optional

from torch import Tensor

from ...graph.node import Node
from ..shapes import Spec
from . import norms, pools, reductions
from .common import AsCalled, OperatorCall

TABLE: dict[str, Callable[[OperatorCall], Optional[Node]]] = {
    "native_group_norm": norms.group_norm,
    "native_layer_norm": norms.over_last,
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm"),
        norms.batch_norm,
    ),
    **{f"max_pool{sides}d_with_indices": pools.pool for sides in (1, 2, 3)},
    **{
        f"adaptive_max_pool{sides}d": lambda call: reductions.pooled_to_one(call) or pools.adaptive_pool(call)
        for sides in (1, 2, 3)
    },
}
"""What makes the first result's node."""


class _First:
    """An operator of which the first result counts."""

    def __init__(self, func: Any) -> None:
        self.func, self.overloadpacket, self._schema = func, func.overloadpacket, func._schema
        self.namespace, self.tags, self._overloadname = func.namespace, func.tags, func._overloadname

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.func(*args, **kwargs)[0]


_first_of = cache(_First)


def build(call: OperatorCall, specs: Sequence[Spec]) -> Optional[tuple[Node, ...]]:
    """The nodes of all results, which look like `specs`; None for operators that are not here."""
    builder, of_first = TABLE.get(call.name), call._replace(func=_first_of(call.func), spec=specs[0])
    first = None if builder is None else builder(of_first)
    if first is None or first.step is None:
        return None
    first.step.bytes_beside = sum(spec.nbytes for spec in specs[1:])
    if first.eager is None:
        first.eager = AsCalled(of_first.func, call.args, call.kwargs)
    _, *others = call.recorder.parts(call.func, call.args, call.kwargs, specs, call.device)
    return (first, *others)
