"""The accordion as a user meets it, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from host_process import page_of

from .accordion import ACCORDION, CHECKED, enabled, fill_number, mode, number, open_tab, turn_on
from .conftest import WebUI


@pytest.fixture(scope="module")
def page(webui: WebUI) -> Iterator[Any]:
    """The txt2img tab."""
    with page_of(webui.address, 1280, 1400) as page:
        page.wait_for_selector("#txt2img_generate")
        yield page


def test_turned_on_used_and_pasted_back(page: Any) -> None:
    assert not enabled(page).is_checked()
    page.fill("#txt2img_prompt textarea", "a cat")
    for name, value in (("txt2img_width", "128"), ("txt2img_height", "128"), ("txt2img_steps", "2")):
        fill_number(page, name, value)
    turn_on(page, "1.5")
    page.click("#txt2img_generate")
    page.wait_for_selector("#txt2img_gallery img")
    report = page.locator("#html_log_txt2img").first.inner_text()
    assert re.search(r"Patch Conv: VAE decoder streamed, peak [\d.]+ .iB", report)
    infotext = page.locator("#html_info_txt2img").first.inner_text()
    assert "Patch Conv: stream" in infotext

    page.reload()
    page.wait_for_selector("#txt2img_generate")
    assert not enabled(page).is_checked()
    page.fill("#txt2img_prompt textarea", infotext)
    page.click("#paste")
    page.wait_for_function(CHECKED)
    assert mode(page, "stream").is_checked()
    assert number(page, "script_txt2img_patch_conv_budget").input_value() == "1.5"


def test_parameters_from_elsewhere(page: Any) -> None:
    page.reload()
    page.wait_for_selector("#txt2img_generate")
    told = "a cat\nSteps: 2, Sampler: Euler, CFG scale: 1, Seed: 1, Size: 128x128, Patch Conv"
    page.fill("#txt2img_prompt textarea", f"{told}: banana, Patch Conv splits: 7")
    page.click("#paste")
    page.wait_for_function("() => document.querySelector('#txt2img_prompt textarea').value === 'a cat'")
    assert not enabled(page).is_checked()
    page.fill("#txt2img_prompt textarea", f"{told}: stream, Patch Conv splits: many, Patch Conv budget: -3")
    page.click("#paste")
    page.wait_for_function(CHECKED)
    assert mode(page, "stream").is_checked()
    for name in ("splits", "budget"):
        assert number(page, f"script_txt2img_patch_conv_{name}").input_value() == "0"


def test_what_does_not_count_looks_inactive(page: Any) -> None:
    page.reload()
    page.wait_for_selector("#txt2img_generate")
    page.locator(f"{ACCORDION} > .label-wrap").click()
    page.wait_for_function(CHECKED)
    nothing = page.get_by_text("Neither VAE nor U-Net nor Upscalers is ticked: nothing will be patched.").first

    def check(counting: set[str]) -> None:
        for name in ("splits", "threshold", "budget"):
            place = f"#script_txt2img_patch_conv_{name}"
            state = "enabled" if name in counting else "disabled"
            page.locator(f"{place} input[type=range]:{state}").wait_for()
            said = page.locator(place).inner_text()
            assert ("Not used with what is chosen above." in said) == (name not in counting)

    check({"splits", "threshold", "budget"})
    mode(page, "patch").check()
    check({"splits", "threshold"})
    mode(page, "stream").check()
    check({"budget"})
    for name in ("unet", "vae"):
        page.locator(f"#script_txt2img_patch_conv_{name} input").click()
    check({"splits", "threshold"})
    assert not nothing.is_visible()
    page.locator("#script_txt2img_patch_conv_unet input").click()
    nothing.wait_for()
    check(set())
    page.locator("#script_txt2img_patch_conv_upscalers input").click()
    check({"budget"})
    assert not nothing.is_visible()


def test_settings(page: Any) -> None:
    open_tab(page, "Settings")
    open_tab(page, "Patch Conv")
    for name in ("enabled", "mode", "vae", "unet", "splits", "threshold", "budget", "upscalers", "extras"):
        entry = page.locator(f"#setting_patch_conv_{name}")
        assert entry.is_visible()
        assert "Patch Conv: " in entry.inner_text()
    assert not page.locator("#setting_patch_conv_devices").count()  # there is one
    assert page.get_by_text("the whole VAE in strips, by far the least memory").last.is_visible()
