"""Choices that users make."""

from __future__ import annotations

import pytest

from comfyui_patchconv.hosts.choices import check_option


def test_one_of_the_options_passes() -> None:
    check_option("mode", "auto", ("auto", "patch", "stream"))


@pytest.mark.parametrize("value", ["Auto", "", None, 1, ["auto"]])
def test_anything_else_is_refused_in_a_sentence(value: object) -> None:
    with pytest.raises(ValueError) as raised:
        check_option("mode", value, ("auto", "patch", "stream"))
    assert str(raised.value) == f"mode is {value!r}: use auto, patch or stream."
    with pytest.raises(ValueError, match=r": use plain or partial\.$"):
        check_option("padding", value, {"plain": 1, "partial": 2})
