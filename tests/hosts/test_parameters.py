"""The toggle's settings as a script's arguments and in an image's parameters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyui_patchconv.hosts.modes import MODES
from comfyui_patchconv.hosts.webui.parameters import (
    DEFAULTS,
    NAMES,
    from_infotext,
    infotext_names,
    settings_of,
    to_infotext,
)
from comfyui_patchconv.hosts.webui.toggle import Settings

CHOSEN = st.builds(
    Settings,
    mode=st.sampled_from(MODES),
    vae=st.booleans(),
    unet=st.booleans(),
    splits=st.integers(0, 64),
    threshold=st.floats(0, 256),
    budget=st.floats(0, 64),
)


@given(CHOSEN.filter(lambda settings: settings.vae or settings.unet))
def test_what_is_written_can_be_pasted(settings: Settings) -> None:
    text = to_infotext(settings)
    assert set(text) <= set(infotext_names())
    read = {name: str(value) for name, value in text.items()}
    assert settings_of([from_infotext(name, read) for name in NAMES], {}) == settings


def test_an_image_made_without_it_changes_nothing() -> None:
    assert {from_infotext(name, {"Steps": "2"}) for name in NAMES} == {None}


def test_arguments() -> None:
    settings = Settings("stream", vae=True, unet=False, splits=3, threshold=1.0, budget=2.0)
    assert settings_of([True, "stream", True, False, 3, 1.0, 2.0], {}) == settings
    named = {"enabled": True, "mode": "stream", "splits": 3, "threshold": 1.0, "budget": 2.0}
    assert settings_of([named], {}) == settings
    assert settings_of([named], {"mode": "patch"}) == Settings("patch", splits=3, threshold=1.0, budget=2.0)
    assert settings_of([{"enabled": True}], {}, DEFAULTS | {"mode": "stream"}) == Settings("stream")


@pytest.mark.parametrize(
    "args", [[], [False, "patch"], [{}], [{"enabled": True, "vae": False}], [{"enabled": False, "unet": True}]]
)
def test_nothing_asked_for(args: list[Any]) -> None:
    assert settings_of(args, {}) is None


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"tiles": 3}, "there is no argument 'tiles': use enabled, mode, vae, unet, splits, threshold, budget."),
        ({"enabled": 1}, "enabled is 1: use True or False."),
        ({"mode": "tile"}, "mode is 'tile': use 'patch' or 'stream'."),
    ],
)
def test_wrong_arguments(named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        settings_of([named], {})
    assert str(error.value) == message
