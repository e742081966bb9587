"""The accordion on the page of a WebUI."""

from __future__ import annotations

from typing import Any

ACCORDION = "#script_txt2img_patch_conv_enabled"
CHECKED = f"() => document.querySelector('{ACCORDION}-checkbox input').checked"


def enabled(page: Any) -> Any:
    """Its check box."""
    return page.locator(f"{ACCORDION}-checkbox input[type=checkbox]")


def mode(page: Any, name: str) -> Any:
    return page.locator("#script_txt2img_patch_conv_mode").get_by_label(name)


def number(page: Any, name: str) -> Any:
    """The field of a slider by the slider's id."""
    return page.locator(f"#{name} input[type=number]")


def fill_number(page: Any, name: str, value: str) -> None:
    number(page, name).fill(value)
    number(page, name).press("Tab")


def turn_on(page: Any, budget: str) -> None:
    """Stream, within a budget in GiB."""
    page.locator(f"{ACCORDION} > .label-wrap").click()
    page.wait_for_function(CHECKED)
    mode(page, "stream").check()
    fill_number(page, "script_txt2img_patch_conv_budget", budget)


def open_tab(page: Any, name: str) -> None:
    """What one gradio calls a tab is a button to another."""
    page.get_by_role("tab", name=name, exact=True).or_(page.get_by_role("button", name=name, exact=True)).first.click()
