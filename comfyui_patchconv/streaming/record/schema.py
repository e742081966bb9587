"""What is known of an operator from its schema, whatever its arguments."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch


class Operator(NamedTuple):
    """What is known of an operator from its schema.

    names: of its arguments. written: names and places of those that it writes to. unsaid: names of those that it may
    write to though its schema does not say so. functional: the operator that gives the result instead of writing it.
    looks: it needs values. draws: it may draw random numbers. reshapes: it changes its argument's shape.
    """

    name: str
    names: tuple[str, ...]
    written: tuple[tuple[int, str], ...]
    unsaid: tuple[str, ...]
    functional: Any
    looks: bool
    draws: bool
    reshapes: bool


_LOOKING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


_REFUSING = frozenset(
    """
    _local_scalar_dense equal is_nonzero item cholesky cholesky_inverse cholesky_solve inverse lu_solve lu_unpack
    triangular_solve linalg_cholesky linalg_inv linalg_solve linalg_tensorsolve linalg_tensorinv linalg_lu_solve
    linalg_solve_triangular linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh _linalg_eigvals linalg_lstsq
    linalg_svd linalg_svdvals linalg_pinv linalg_matrix_power multinomial bincount
    """.split()  # noqa: SIM905
)
"""What gives a value of Python's, or refuses some values: the program may catch that."""


@cache
def operator_of(func: Any) -> Operator:
    """What is known of `func`; asked once."""
    name, schema = func.overloadpacket.__name__, func._schema
    written = tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    functional = None
    if len(written) == 1 and name.endswith("_") and not name.startswith("_"):
        packet = getattr(torch.ops.aten, name[:-1], None) if func.namespace == "aten" else None
        functional = getattr(packet, func._overloadname, None) if packet is not None else None
        if name in ("copy_", "fill_", "zero_"):
            functional = func
    tags = set(func.tags)
    looks = bool(tags & _LOOKING) or name in _REFUSING
    may_draw = torch.Tag.nondeterministic_seeded in tags or name in ("normal_", "uniform_", "bernoulli_", "random_")
    reshapes = torch.Tag.inplace_view in tags or name in ("set_", "resize_", "resize_as_")
    names = tuple(argument.name for argument in schema.arguments)
    said = {argument for _, argument in written}
    unsaid = tuple(one for one in _UNSAID.get(name, ()) if one in names and one not in said)
    return Operator(name, names, written, unsaid, functional, looks, may_draw, reshapes)


AT_ONE_PLACE = frozenset(
    """
    silu relu relu6 leaky_relu elu gelu mish hardswish hardsigmoid sigmoid log_sigmoid tanh hardtanh softplus selu celu
    softshrink hardshrink threshold clamp clamp_min clamp_max clip neg abs exp exp2 expm1 log log2 log10 log1p sin cos
    tan asin acos atan sinh cosh erf sqrt rsqrt square pow mul multiply add subtract sub rsub div divide true_divide
    floor_divide remainder fmod maximum minimum fmax fmin lerp where addcmul addcdiv reciprocal nan_to_num sign round
    floor ceil trunc frac isnan isinf isfinite eq ne lt le gt ge logical_and logical_or logical_not logical_xor
    bitwise_and bitwise_or bitwise_not bitwise_xor __and__ __or__ __xor__ masked_fill atan2 hypot float_power clone
    positive fill
    """.split()  # noqa: SIM905
)
"""Operators of one element, or of elements at one place."""


_STATISTICS = ("running_mean", "running_var")

_UNSAID: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "batch_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm",
            "_batch_norm_impl_index", "instance_norm", "batch_norm_update_stats", "batch_norm_gather_stats",
            "batch_norm_gather_stats_with_counts",
        ),
        _STATISTICS,
    ),
    **dict.fromkeys(("rrelu_with_noise", "rrelu_with_noise_"), ("noise",)),
}  # fmt: skip
"""What operators write to though the schemas of some releases do not say so: the running statistics of norms, and what
an activation has drawn."""

_TRAINING = frozenset({"training", "train", "use_input_stats"})
"""Arguments without which these write to nothing, where they have one."""


def looks(func: Any, args: Any) -> bool:
    """Whether an operator needs values: an index does not that is whole numbers, known to be within reach."""
    operator = operator_of(func)
    return operator.looks and not (operator.name == "index" and _is_within_reach(args[0].shape, args[1]))


def _is_within_reach(shape: Any, indices: Any) -> bool:
    """Whether eager takes such indices of a tensor of `shape`; False where they would have to be asked for on a device,
    or are deferred."""
    for side, index in zip(shape, indices):
        if index is None:
            continue
        if type(index) is not torch.Tensor or index.device.type != "cpu" or index.dtype not in _WHOLE_NUMBERS:
            return False
        if index.numel() and not -side <= int(index.min()) <= int(index.max()) < side:
            return False
    return True


_WHOLE_NUMBERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64})
"""Types that indices have; those of truth values and uint8 tell places by their values."""


def draws(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator that can draw random numbers does: dropout of nothing, or in evaluation, does not. What draws
    from a chance of zero, or from chances that a tensor has, does."""
    given = dict(zip(operator_of(func).names, args)) | kwargs
    if "dropout_p" in given or func.overloadpacket.__name__.startswith(("scaled_dot", "_scaled_dot")):
        return bool(given.get("dropout_p"))
    if "p" in given and "train" in given:
        return bool(given["p"]) and given["train"] is not False
    return True


def written_unsaid(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The tensors that an operator, called so, writes to though its schema does not say so."""
    operator = operator_of(func)
    if not operator.unsaid:
        return []
    given = dict(zip(operator.names, args)) | kwargs
    flags = _TRAINING.intersection(operator.names)
    if flags and not any(given.get(name) for name in flags):
        return []
    values = (given.get(name) for name in operator.unsaid)
    return [value for value in values if isinstance(value, torch.Tensor)]


_GIVING_BACK = frozenset(
    """
    to type_as contiguous dropout feature_dropout alpha_dropout flatten atleast_1d atleast_2d atleast_3d real conj
    resolve_conj resolve_neg positive sum_to_size to_dense lift_fresh
    """.split()  # noqa: SIM905
)
"""What gives its argument back, the same object, where it has nothing to do."""


def gives_back(operator: Operator, given: Any, result: Any) -> bool:
    """Whether an operator that gives a view of its argument gives the argument itself; both by their `Spec`s."""
    if operator.name not in _GIVING_BACK or given.shape != result.shape:
        return False
    return given.dtype == result.dtype and not (given.dtype.is_complex and "conj" in operator.name)
