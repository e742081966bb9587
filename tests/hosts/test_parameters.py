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
    heeded,
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
    upscalers=st.booleans(),
)


@given(CHOSEN.filter(lambda settings: settings.vae or settings.unet or settings.upscalers))
def test_what_is_written_can_be_pasted(settings: Settings) -> None:
    text = to_infotext(settings)
    assert set(text) <= set(infotext_names())
    read = {name: str(value) for name, value in text.items()}
    assert settings_of([from_infotext(name, read) for name in NAMES], {}) == settings


def test_an_image_made_without_it_changes_nothing() -> None:
    assert {from_infotext(name, {"Steps": "2"}) for name in NAMES} == {None}


def test_arguments_come_in_order_or_by_name() -> None:
    settings = Settings("stream", vae=True, unet=False, splits=3, threshold=1.0, budget=2.0)
    assert settings_of([True, "stream", True, False, 3, 1.0, 2.0], {}) == settings
    named = {"enabled": True, "mode": "stream", "splits": 3, "threshold": 1.0, "budget": 2.0}
    assert settings_of([named], {}) == settings
    assert settings_of([named], {"mode": "patch"}) == Settings("patch", splits=3, threshold=1.0, budget=2.0)
    assert settings_of([{"enabled": True}], {}, DEFAULTS | {"mode": "stream"}) == Settings("stream")
    assert settings_of([{"enabled": 1, "mode": "STREAM", "vae": "false", "unet": 1.0}], {}) == Settings(
        "stream", vae=False, unet=True
    )
    assert settings_of([True, "patch", True, False, 3, 1.0, 2.0, None], {}) == Settings("patch", True, False, 3, 1.0, 2)
    assert settings_of([True, "patch", True, False, 3, 1.0, 2.0, ""], {}) == Settings("patch", True, False, 3, 1.0, 2)
    upscaling = Settings("stream", True, False, 3, 1.0, 2.0, upscalers=True)
    assert settings_of([True, "stream", True, False, 3, 1.0, 2.0, True], {}) == upscaling
    assert settings_of([named | {"upscalers": "true"}], {}) == upscaling
    assert settings_of([{"enabled": True, "vae": False, "upscalers": True}], {}) == Settings(vae=False, upscalers=True)


@pytest.mark.parametrize(
    "args",
    [
        [],
        [False, "patch"],
        [{}],
        [{"enabled": False, "unet": True}],
        [{"enabled": 0}],
        [{"enabled": "False", "mode": "tile"}],  # what is off is not looked at
    ],
)
def test_nothing_asked_for(args: list[Any]) -> None:
    assert settings_of(args, {}) is None


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            {"tiles": 3},
            "there is no argument 'tiles': use enabled, mode, vae, unet, splits, threshold, budget, upscalers, "
            "devices.",
        ),
        ({"enabled": 2}, "enabled is 2: use True or False."),
        ({"vae": "perhaps"}, "vae is 'perhaps': use True or False."),
        ({"vae": False}, "neither VAE nor U-Net nor Upscalers is chosen, so nothing will be patched."),
        ({"splits": 1e9}, "splits is 1000000000.0: use at most 4096 strips."),
        ({"splits": None}, "splits is None: use a number of strips, or 0."),
        ({"mode": "tile"}, "mode is 'tile': use 'auto', 'patch' or 'stream'."),
        ({"devices": "both"}, "devices is 'both': use one, all or a number of devices such as 2."),
        ({"devices": 0}, "devices is '0': use one, all or a number of devices such as 2."),
        ({"devices": True}, "devices is True: use one, all or a number of devices such as 2."),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        settings_of([{"enabled": True, **named}], {})
    assert str(error.value) == message


def test_devices_are_named_or_those_of_the_machine() -> None:
    """They are no argument by place, and no picture's parameter: the picture is the same."""
    machine = DEFAULTS | {"devices": "all"}
    for args in ([True, "stream"], [{"enabled": True, "mode": "stream"}]):
        assert settings_of(args, {}) == Settings("stream")
        assert settings_of(args, {}, machine) == Settings("stream", devices="all")
    for value in ("ONE", 1, "2", 2, " all "):
        settings = settings_of([{"enabled": True, "devices": value}], {}, machine)
        assert settings == Settings(devices=str(value).strip().lower())
    assert not [name for name in infotext_names() if "devices" in name]
    assert to_infotext(Settings(devices="all")) == to_infotext(Settings())


def test_a_ninth_argument() -> None:
    with pytest.raises(ValueError, match=r"^there are more than 8 arguments: use enabled, mode, vae, "):
        settings_of([True, "patch", True, False, 3, 1.0, 2.0, False, 8], {})
    with pytest.raises(ValueError, match=r"^upscalers is 8: use True or False.$"):
        settings_of([True, "patch", True, False, 3, 1.0, 2.0, 8], {})


@pytest.mark.parametrize("mode", ["banana", "", "patch + stream", None])
def test_a_mode_that_does_not_exist_is_ignored(mode: Any) -> None:
    comments: list[str] = []
    parameters = {"Patch Conv": mode, "Patch Conv splits": "3"}
    assert {from_infotext(name, parameters, comments.append) for name in NAMES} == {None}
    assert comments == [
        f"Patch Conv in these parameters is ignored: mode is {mode!r}: use 'auto', 'patch' or 'stream'."
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("splits", "many", "splits is 'many': use a number of strips, or 0. The default is taken."),
        ("splits", "2.5", "splits is 2.5: use a number of strips, or 0. The default is taken."),
        ("splits", "1e9", "splits is 1000000000.0: use at most 4096 strips. The default is taken."),
        ("budget", "-3", "budget is -3.0: use a number of GiB, or 0. The default is taken."),
        ("threshold", "nan", "threshold is nan: use a number of millions of elements, or 0. The default is taken."),
        ("budget", 10**400, f"budget is {10**400}: use at most 1024 GiB. The default is taken."),
        ("parts", "wheels", "parts is 'wheels': use VAE, U-Net or Upscalers. The default is taken."),
    ],
)
def test_values_that_cannot_be_become_the_default(name: str, text: Any, said: str) -> None:
    comments: list[str] = []
    parameters = {"Patch Conv": "Stream", "Patch Conv parts": "VAE", f"Patch Conv {name}": text}
    read = [from_infotext(each, parameters, comments.append) for each in NAMES]
    assert read == [True, "stream", *(DEFAULTS[each] for each in NAMES[2:])]
    assert comments == [f"Patch Conv in these parameters: {said}"]
    assert settings_of(read, {}) == Settings("stream")


@given(st.dictionaries(st.sampled_from(infotext_names()), st.text() | st.floats().map(str)))
def test_any_parameters_can_be_pasted(parameters: dict[str, str]) -> None:
    read = [from_infotext(name, parameters) for name in NAMES]
    if None in read:
        assert set(read) == {None}
    else:
        settings_of(read, {})


def test_a_control_counts_where_something_heeds_it() -> None:
    assert heeded("patch", vae=True, unet=False, upscalers=False) == {"splits", "threshold"}
    assert heeded("stream", vae=True, unet=False, upscalers=False) == {"budget"}
    assert heeded("stream", vae=True, unet=True, upscalers=False) == {"splits", "threshold", "budget"}
    assert heeded("stream", vae=False, unet=True, upscalers=False) == {"splits", "threshold"}
    assert heeded("patch", vae=False, unet=False, upscalers=False) == set()
    assert heeded("patch", vae=False, unet=False, upscalers=True) == {"budget"}
    assert heeded("patch", vae=True, unet=False, upscalers=True) == {"splits", "threshold", "budget"}


def test_parameters_of_before_there_were_upscalers() -> None:
    parameters = {"Patch Conv": "stream", "Patch Conv parts": "VAE + U-Net"}
    assert from_infotext("upscalers", parameters) is False
