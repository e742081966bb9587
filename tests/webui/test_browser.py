"""The accordion as a user meets it, in a real browser."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
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


def test_turned_on_used_and_pasted_back(page: Any, tmp_path: Path) -> None:
    assert not enabled(page).is_checked()
    page.fill("#txt2img_prompt textarea", "a cat")
    for name, value in (("txt2img_width", "128"), ("txt2img_height", "128"), ("txt2img_steps", "2")):
        fill_number(page, name, value)
    turn_on(page, "1.5")
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
    assert not enabled(page).is_checked()
    page.fill("#txt2img_prompt textarea", infotext)
    page.click("#paste")
    page.wait_for_function(CHECKED)
    assert mode(page, "stream").is_checked()
    assert number(page, "script_txt2img_patch_conv_budget").input_value() == "1.5"


def test_settings(page: Any) -> None:
    open_tab(page, "Settings")
    open_tab(page, "Patch Conv")
    for name in ("enabled", "mode", "vae", "unet", "splits", "threshold", "budget"):
        assert page.locator(f"#setting_patch_conv_{name}").is_visible()
