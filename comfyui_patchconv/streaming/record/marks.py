"""Marks by which torch has a tensor show conjugates or negatives of what is in its memory.

Operators act on marks before they reach a dispatch mode, so what a mode calls takes no notice of them: a value that is
read there must have none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

CONJUGATING = frozenset({"conj", "_conj", "mH", "adjoint", "matrix_H"})
"""Views that show conjugates of complex maps; some with dimensions exchanged."""


def plain(tensor: Tensor) -> Tensor:
    """The same values, in memory that has them as they are."""
    return tensor.clone() if tensor.is_conj() or tensor.is_neg() else tensor


def marks_of(view: Any) -> tuple[bool, bool]:
    """Whether eager's tensor for a `View` is marked as conjugate, and as negative."""
    names = []
    while view.parent is not None:
        names.append("" if view.func is None else view.func.overloadpacket.__name__)
        view = view.parent
    conjugate, negative, is_complex = False, False, view.spec.dtype.is_complex
    for name in reversed(names):
        if name in CONJUGATING and is_complex:
            conjugate = not conjugate
        elif name == "_neg_view":
            negative = not negative
        elif name in ("real", "imag", "view_as_real") and is_complex:
            negative, conjugate, is_complex = negative != (name == "imag" and conjugate), False, False
        elif name == "view_as_complex":
            is_complex = True
    return conjugate, negative
