"""What a run took, in words and as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from comfyui_patchconv import convert_model
from comfyui_patchconv.hosts.chart import HEIGHT, WIDTH, draw, steps
from comfyui_patchconv.hosts.figures import Figures, StripCount
from comfyui_patchconv.memory.recorder import Recorder
from comfyui_patchconv.units import size_of, time_of

pytest.importorskip("PIL", reason="Pillow is not installed: it draws the plot")
MIB = 2**20
BLUE, ORANGE = (37, 99, 235), (194, 65, 12)


def recorded(seconds: float, peak: int, timeline: list[tuple[float, int]]) -> Recorder:
    recorder = Recorder()
    recorder.seconds, recorder.peak, recorder.timeline = seconds, peak, timeline
    return recorder


def test_calls_add_up() -> None:
    figures = Figures("VAE decoder", streamed=True, strips=7, eager=900 * MIB)
    figures.add(recorded(2.0, 300 * MIB, [(0.5, 100 * MIB), (1.5, 300 * MIB)]))
    figures.add(recorded(1.5, 200 * MIB, [(1.0, 200 * MIB)]))
    assert (figures.calls, figures.seconds, figures.peak) == (2, 3.5, 300 * MIB)
    assert figures.timeline == [(0.5, 100 * MIB), (1.5, 300 * MIB), (3.0, 200 * MIB)]
    assert (
        figures.line()
        == "VAE decoder streamed in 7 strips, peak 300 MiB (without Patch Conv: at least 900 MiB, counted), 3.5 s"
    )
    told = figures.as_json()
    assert told["line"] == figures.line()
    assert told["words"]["peak"] == "peak 300 MiB"
    assert told["words"]["eager_short"] == "≥ 900 MiB without Patch Conv"
    assert (told["state"], told["ending"], told["eager"]) == ("done", "", 900 * MIB)
    assert told["timeline"] == figures.timeline


def test_long_timelines_keep_their_peak() -> None:
    figures = Figures("Model")
    figures.add(recorded(10.0, 5000, [(n / 100, 5000 if n == 731 else n) for n in range(1000)]))
    assert len(figures.timeline) <= 240
    assert max(size for _, size in figures.timeline) == 5000
    assert [at for at, _ in figures.timeline] == sorted(at for at, _ in figures.timeline)


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        (Figures("Model"), "Model whole (no convolution above the threshold)"),
        (Figures("Model", calls=1), "Model whole (compiled by torch.compile, or left to another extension)"),
        (Figures("Model", strips=1), "Model whole (no convolution above the threshold)"),
        (Figures("U-Net", strips=3), "U-Net in up to 3 strips"),
        (Figures("VAE encoder", streamed=True), "VAE encoder streamed"),
        (Figures("VAE encoder", streamed=True, strips=1), "VAE encoder streamed in 1 strip"),
        (
            Figures("VAE encoder", streamed=True, strips=2, over="3 devices"),
            "VAE encoder streamed in 2 strips over 3 devices",
        ),
        (
            Figures("VAE encoder", streamed=True, strips=2, seconds=3.0, alone="rank 1 has ended"),
            "VAE encoder streamed in 2 strips, 3.0 s, on one device: rank 1 has ended",
        ),
        (Figures("VAE encoder", streamed=True, ran_eagerly=True), "VAE encoder eager, for strips would not help"),
        (Figures("VAE encoder", streamed=True, ran_eagerly=False), "VAE encoder streamed"),
        (Figures("Model", state="stopped"), "Model whole (no convolution above the threshold), stopped"),
        (Figures("Model", strips=2, seconds=3.0, state="running"), "Model in up to 2 strips, 3.0 s so far"),
        (
            Figures("Model", strips=2, eager=3 << 30),
            "Model in up to 2 strips, without Patch Conv: at least 3.00 GiB, counted",
        ),
        (Figures("Model", strips=2, peak=MIB, seconds=60), "Model in up to 2 strips, peak 1 MiB, 60.0 s"),
    ],
)
def test_only_what_is_known_is_said(figures: Figures, line: str) -> None:
    assert figures.line() == line


def test_a_count_of_eager_below_what_we_took_is_no_comparison() -> None:
    timeline = [(n / 10, 150 * MIB) for n in range(100)]
    figures = Figures(
        "Model", strips=2, seconds=10.0, peak=150 * MIB, eager=100 * MIB, timeline=timeline, state="stopped"
    )
    assert figures.line() == (
        "Model in up to 2 strips, peak 150 MiB (without Patch Conv: not measured), 10.0 s, stopped"
    )
    told = figures.as_json()
    assert told["eager"] == 0
    assert "eager_short" not in told["words"]
    assert (told["state"], told["ending"]) == ("stopped", ", stopped")
    assert ORANGE not in colors(draw([figures]))
    figures.eager = 200 * MIB
    assert ORANGE in colors(draw([figures]))


def test_sizes_and_times_are_printed_in_units_of_their_size() -> None:
    assert [size_of(value * MIB) for value in (0.4, 1023, 1024)] == ["0 MiB", "1023 MiB", "1.00 GiB"]
    assert [time_of(value) for value in (0.034, 1.26, 99.9, 100, 3605)] == [
        "0.03 s", "1.3 s", "99.9 s", "1 min 40 s", "60 min 05 s",
    ]  # fmt: skip


def test_strips_are_counted_of_the_convolution_that_was_cut_most() -> None:
    figures = Figures("Model")
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.AvgPool2d(4), nn.Conv2d(2, 2, 3, padding=1))
    convert_model(model, 5, threshold=0, on_strip=StripCount(figures))
    model(torch.randn(1, 2, 20, 8))
    assert figures.strips == 5
    convert_model(model, 5, threshold=1000, on_strip=StripCount(whole := Figures("Model")))
    model(torch.randn(1, 2, 20, 8))
    assert whole.strips == 1


def colors(image: Any) -> set[tuple[int, ...]]:
    return {tuple(color) for color in np.asarray(image).reshape(-1, 3)}


def test_plot_has_the_curve_and_the_counted_level_where_they_belong() -> None:
    timeline = [(n / 10, (50 if n < 50 else 100) * MIB) for n in range(101)]
    figures = Figures(
        "VAE decoder", strips=4, calls=1, seconds=10.0, peak=100 * MIB, eager=150 * MIB, timeline=timeline
    )
    image = draw([figures])
    assert image.size == (WIDTH, HEIGHT)
    pixels = np.asarray(image).astype(int)

    def rows(color: tuple[int, ...], column: int) -> np.ndarray:
        return np.flatnonzero(np.abs(pixels[:, column] - color).max(axis=-1) < 40)

    low, high = rows(BLUE, 200), rows(BLUE, 800)
    zero = int(rows((31, 36, 48), 500).max())  # the axis
    assert (zero - low.max()) / (zero - high.min()) == pytest.approx(0.5, abs=0.03)
    eager = np.flatnonzero((np.abs(pixels - ORANGE).max(axis=-1) < 40).sum(axis=1) > WIDTH / 3)
    assert (zero - eager.mean()) / (zero - high.min()) == pytest.approx(1.5, abs=0.03)
    assert ORANGE not in colors(draw([Figures("VAE decoder", seconds=10.0, peak=100 * MIB, timeline=timeline)]))


def test_plots_stand_one_below_the_other_and_none_says_so() -> None:
    one = Figures("Model", strips=2, calls=1, seconds=0.01, peak=3 << 30)
    assert draw([one, one]).size == (WIDTH, 2 * HEIGHT)
    empty = draw([])
    assert empty.size == (WIDTH, HEIGHT)
    assert len(colors(empty)) > 1


@pytest.mark.parametrize("top", [0.003, 0.0999, 1.0, 4.9, 13, 999, 1e7])
def test_steps_are_round_and_reach_the_top(top: float) -> None:
    step, count = steps(top)
    assert f"{step:.0e}"[0] in "125"
    assert step * (count - 1) < top <= step * count * (1 + 1e-9)
    assert 2 <= count <= 6
