"""What a user makes the default is there again when the WebUI has been started anew."""

from __future__ import annotations

import json
from pathlib import Path

from host_process import page_of

from .accordion import ACCORDION, enabled, mode, number, open_tab, turn_on
from .conftest import FORGE, serve


def test_new_defaults_outlast_a_restart(checkout: Path, checkpoint: str, tmp_path: Path) -> None:
    with serve(checkout, checkpoint, tmp_path, ("--ui-debug-mode",)) as webui:  # without a model, which takes long
        with page_of(webui.address, 1280, 1400) as page:
            page.wait_for_selector("#txt2img_generate")
            turn_on(page, "1.5")
            open_tab(page, "Settings")
            open_tab(page, "Defaults")
            page.click("#ui_defaults_apply")
            page.get_by_text("Wrote ").wait_for()
        remembered = json.loads((tmp_path / "ui-config.json").read_text())
        path = "customscript/patch_conv.py"
        assert remembered[f"{path}/txt2img/Mode/value"] == "stream"
        assert remembered[f"{path}/img2img/Mode/value"] == "auto"
        webui.stop()
        webui.start()
        with page_of(webui.address, 1280, 1400) as page:
            page.wait_for_selector("#txt2img_generate")
            assert mode(page, "stream").is_checked()
            assert number(page, "script_txt2img_patch_conv_budget").input_value() == "1.5"
            if webui.host is not FORGE:  # it remembers the state of no accordion
                assert enabled(page).is_checked()


def test_on_from_the_start_is_seen(checkout: Path, checkpoint: str, tmp_path: Path) -> None:
    """Chosen under Settings once the first start has written down that the accordion is closed."""
    with serve(checkout, checkpoint, tmp_path, ("--ui-debug-mode",)) as webui:
        webui.stop()
        assert (tmp_path / "ui-config.json").exists()
        options = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(options | {"patch_conv_enabled": True}))
        webui.start()
        with page_of(webui.address, 1280, 1400) as page:
            page.wait_for_selector("#txt2img_generate")
            assert enabled(page).is_checked()
            assert page.locator(f"{ACCORDION} > .label-wrap.open").count() == 1
            mode(page, "auto").wait_for()
            page.locator(ACCORDION).screenshot(path=tmp_path / "on.png")
