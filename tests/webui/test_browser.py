"""The accordion as a user meets it, in a real browser."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host_process import page_of

from .conftest import WebUI

ACCORDION = "#script_txt2img_patch_conv_enabled"
CHECKED = f"() => document.querySelector('{ACCORDION}-checkbox input').checked"


@pytest.fixture(scope="module")
def page(webui: WebUI) -> Iterator[Any]:
    """The txt2img tab."""
    with page_of(webui.address, 1280, 1400) as page:
        page.wait_for_selector("#txt2img_generate")
        yield page


def number(page: Any, name: str) -> Any:
    return page.locator(f"#{name} input[type=number]")


def test_turned_on_used_and_pasted_back(page: Any, tmp_path: Path) -> None:
    enabled = page.locator(f"{ACCORDION}-checkbox input[type=checkbox]")
    assert not enabled.is_checked()
    page.fill("#txt2img_prompt textarea", "a cat")
    for name, value in (("txt2img_width", "128"), ("txt2img_height", "128"), ("txt2img_steps", "2")):
        number(page, name).fill(value)
        number(page, name).press("Tab")
    page.locator(f"{ACCORDION} > .label-wrap").click()
    page.wait_for_function(CHECKED)
    page.locator("#script_txt2img_patch_conv_mode").get_by_label("stream").check()
    number(page, "script_txt2img_patch_conv_budget").fill("1.5")
    number(page, "script_txt2img_patch_conv_budget").press("Tab")
    page.click("#txt2img_generate")
    page.wait_for_selector("#txt2img_gallery img", timeout=300_000)
    report = page.locator("#html_log_txt2img").first.inner_text(timeout=60_000)
    assert re.search(r"Patch Conv: VAE decoder streamed, peak [\d.]+ .iB", report)
    infotext = page.locator("#html_info_txt2img").first.inner_text()
    assert "Patch Conv: stream" in infotext
    page.locator(ACCORDION).scroll_into_view_if_needed()
    screenshot = os.environ.get("SCREENSHOT") or str(tmp_path / "webui.png")
    page.screenshot(path=screenshot)

    page.reload()
    page.wait_for_selector("#txt2img_generate")
    assert not enabled.is_checked()
    page.fill("#txt2img_prompt textarea", infotext)
    page.click("#paste")
    page.wait_for_function(CHECKED)
    assert page.locator("#script_txt2img_patch_conv_mode").get_by_label("stream").is_checked()
    assert number(page, "script_txt2img_patch_conv_budget").input_value() == "1.5"


def test_settings(page: Any) -> None:
    page.get_by_role("tab", name="Settings").or_(page.get_by_role("button", name="Settings", exact=True)).first.click()
    name = {"name": "Patch Conv", "exact": True}
    page.get_by_role("tab", **name).or_(page.get_by_role("button", **name)).first.click()
    for name in ("enabled", "mode", "vae", "unet", "splits", "threshold", "budget"):
        assert page.locator(f"#setting_patch_conv_{name}").is_visible()
