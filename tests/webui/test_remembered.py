"""What a user makes the default is there again when the WebUI has been started anew."""

from __future__ import annotations

import json
from pathlib import Path

from host_process import page_of

from .accordion import enabled, mode, number, open_tab, turn_on
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
        assert remembered[f"{path}/img2img/Mode/value"] == "patch"
        webui.stop()
        webui.start()
        with page_of(webui.address, 1280, 1400) as page:
            page.wait_for_selector("#txt2img_generate")
            assert mode(page, "stream").is_checked()
            assert number(page, "script_txt2img_patch_conv_budget").input_value() == "1.5"
            if webui.host is not FORGE:  # it remembers the state of no accordion
                assert enabled(page).is_checked()
