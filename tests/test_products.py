"""Which cases of a product every run has."""

from __future__ import annotations

from itertools import product
from typing import Any

from products import crossed

AXES: dict[str, Any] = {"name": list("abcde"), "tuning": {"one": 1, "two": 2, "all": 3}, "order": "xy", "mode": "mn"}


def cases(whole: int) -> dict[tuple[Any, ...], bool]:
    """By their values, whether they are slow."""
    (names, found) = crossed(whole, **AXES).args
    assert names == tuple(AXES)
    return {case.values: bool(case.marks) for case in found}


def test_all_cases_are_there_and_those_of_the_first_axes_are_not_slow() -> None:
    found = cases(2)
    assert [*found] == [*product("abcde", (1, 2, 3), "xy", "mn")]
    quick = [case for case, slow in found.items() if not slow]
    assert [case[:2] for case in quick] == [*product("abcde", (1, 2, 3))]


def test_each_value_of_the_first_axes_meets_as_many_of_the_others_as_it_can() -> None:
    quick = [case for case, slow in cases(2).items() if not slow]
    for name in "abcde":
        assert len({case[2:] for case in quick if case[0] == name}) == 3
    for tuning in (1, 2, 3):
        assert len({case[2:] for case in quick if case[1] == tuning}) == 4


def test_names_of_cases_are_those_of_their_values() -> None:
    found = crossed(1, function=[cases, product], budget=[None, 1]).args[1]
    assert [case.id for case in found] == ["cases-None", "cases-1", "product-None", "product-1"]
