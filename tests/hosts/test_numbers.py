"""Numbers that users give."""

from __future__ import annotations

import math

import pytest

from comfyui_patchconv.hosts.numbers import check_number, check_range


@pytest.mark.parametrize("value", [0, 3, 2.5])
def test_numbers_from_nothing_on_pass(value: float) -> None:
    check_number("budget", value, "GiB")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, True, "2", None])
def test_anything_else_is_refused_in_a_sentence(value: object) -> None:
    with pytest.raises(ValueError, match=rf"^budget is {value!r}: use a number of GiB, or 0\.$"):
        check_number("budget", value, "GiB")


def test_whole_numbers_alone_pass_where_they_are_asked_for() -> None:
    check_number("splits", 2.0, "strips", whole=True)
    with pytest.raises(ValueError, match=r"splits is 1\.5"):
        check_number("splits", 1.5, "strips", whole=True)


@pytest.mark.parametrize("value", [2, 2.0, 1000])
def test_numbers_of_a_range_pass(value: float) -> None:
    check_range("steps", value, 2, 1000, whole=True)


@pytest.mark.parametrize("value", [1, 1001, 2.5, math.nan, math.inf, True, "2", None])
def test_others_are_refused_with_the_range(value: object) -> None:
    with pytest.raises(ValueError, match=rf"^steps is {value!r}: use a whole number from 2 to 1000\.$"):
        check_range("steps", value, 2, 1000, whole=True)
    with pytest.raises(ValueError, match=r"^guidance is -0\.1: use a number from 0 to 100\.5\.$"):
        check_range("guidance", -0.1, 0.0, 100.5)
