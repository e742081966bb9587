"""The demo's plot: memory over time of each mode, in one picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image, ImageColor

from comfyui_patchconv.cli.demo import NAMES, TILES, DemoSettings, Result, plot
from comfyui_patchconv.cli.vae import EAGER
from comfyui_patchconv.hosts.chart import HEIGHT, WIDTH, Series, lines

COLOURS = {"#9a9a9a": EAGER, "#c2410c": TILES, "#1668c7": "patch", "#1a7f37": "stream"}


def rows_of(picture: Image.Image, color: str) -> np.ndarray:
    """The rows between the axes that hold pixels of a colour; text, which has greys, is outside of them."""
    between = np.asarray(picture.convert("RGB"), int)[102 : HEIGHT - 70, 82 : WIDTH - 34]
    return np.flatnonzero((np.abs(between - ImageColor.getrgb(color)).sum(2) < 20).any(1))


def result(peak: int) -> Result:
    timeline = [(0.1, peak // 4), (0.4, peak), (0.6, peak), (1.0, peak // 4)]
    return Result(peak, 1.0, timeline, np.zeros((3, 8, 8), np.float32))


def test_each_mode_has_a_line_and_the_higher_peak_is_above(tmp_path: Path) -> None:
    results: dict[str, Optional[Result]] = {
        mode: result(peak) for mode, peak in zip(NAMES, (900_000_000, 700_000_000, 500_000_000, 300_000_000))
    }
    plot(results, DemoSettings(), tmp_path / "memory.png")
    picture = Image.open(tmp_path / "memory.png").convert("RGB")
    assert picture.size == (WIDTH, HEIGHT)
    tops = [rows_of(picture, color).min() for color in COLOURS]
    assert tops == sorted(tops)
    assert len(set(tops)) == 4


def test_a_mode_that_did_not_fit_has_no_line(tmp_path: Path) -> None:
    results = {EAGER: None, TILES: None, "patch": result(600_000_000), "stream": result(300_000_000)}
    plot(results, DemoSettings(), tmp_path / "memory.png")
    found = {mode: len(rows_of(Image.open(tmp_path / "memory.png"), color)) for color, mode in COLOURS.items()}
    assert found[EAGER] == found[TILES] == 0
    assert min(found["patch"], found["stream"]) > 0


def test_lines_without_points_are_axes_alone() -> None:
    picture = lines("title", [Series("none", "#ff0000")], "x", "y")
    assert picture.size == (WIDTH, HEIGHT)
    assert len(rows_of(picture, "#ff0000")) == 0


def test_labels_do_not_run_into_each_other() -> None:
    labels = [Series("a label as long as they come: peak 12345 MB, 123.4 s", color) for color in COLOURS]
    picture = lines("title", labels, "x", "y").convert("RGB")
    above = np.asarray(picture, int)[:92]
    starts = [np.argwhere(np.abs(above - ImageColor.getrgb(color)).sum(2) < 20) for color in COLOURS]
    assert all(len(found) for found in starts)
    places = sorted((found[:, 0].min(), found[:, 1].min()) for found in starts)
    assert all(right[0] > left[0] or right[1] - left[1] > 400 for left, right in pairwise(places))
