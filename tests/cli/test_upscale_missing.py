"""`patchconv upscale` without what it needs: a sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from upscale_weights import compact

from comfyui_patchconv import cli


def test_without_spandrel_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    save_file(compact(), tmp_path / "model.safetensors")
    (tmp_path / "in.png").write_bytes(b"")
    given = ["--model", str(tmp_path / "model.safetensors"), "--image", str(tmp_path / "in.png")]
    assert cli.main(["upscale", *given, "--out", str(tmp_path / "out.png")]) == 2
    assert "spandrel is not installed: run pip install 'patchconv[upscale]'." in capsys.readouterr().err
