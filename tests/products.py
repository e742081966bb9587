"""Products of parameters: which of their cases every run has, and which are marked slow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any, Union

import pytest

Axis = Union[Mapping[str, Any], Iterable[Any]]
"""Values of one parameter, by what a test's name calls them, or functions and classes by their own names."""


def crossed(whole: int, **axes: Axis) -> pytest.MarkDecorator:
    """All cases of a product as `pytest.mark.parametrize`, of which those that repeat what others prove are slow.

    Not slow are all cases of the first `whole` axes, each with one case of the other axes. These take turns, so that
    each value of each of the first axes meets as many of them as it has cases.
    """
    named = {name: _named(axis) for name, axis in axes.items()}
    first = [list(enumerate(axis.items())) for axis in list(named.values())[:whole]]
    others = list(product(*(axis.items() for axis in list(named.values())[whole:])))
    cases = []
    for places in product(*first):
        turn = sum(place for place, _ in places) % len(others)
        for index, other in enumerate(others):
            parts = [*(item for _, item in places), *other]
            marks = () if index == turn else (pytest.mark.slow,)
            cases.append(
                pytest.param(*(value for _, value in parts), id="-".join(key for key, _ in parts), marks=marks)
            )
    return pytest.mark.parametrize(tuple(named), cases)


def _named(axis: Axis) -> dict[str, Any]:
    if isinstance(axis, Mapping):
        return dict(axis)
    return {getattr(value, "__name__", str(value)): value for value in axis}
