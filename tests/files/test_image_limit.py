"""Pillow's limit of pixels, which is one for the process, is the host's again after each image."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from comfyui_patchconv.files.images import open_image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(path)
    return path


@pytest.mark.parametrize("limit", [None, 50, 200, 2**31])
def test_the_limit_is_put_back(image: Path, limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert open_image(image).size == (16, 16)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_put_back_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    (tmp_path / "damaged.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="not an image"):
        open_image(tmp_path / "damaged.png")
    assert Image.MAX_IMAGE_PIXELS == 50


def test_threads_that_overlap_put_the_limit_back(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    original: Any = Image.open

    def slowly(path: Any) -> Any:
        time.sleep(0.02)
        return original(path)

    monkeypatch.setattr(Image, "open", slowly)
    threads = [threading.Thread(target=open_image, args=(image,)) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert Image.MAX_IMAGE_PIXELS == 200
