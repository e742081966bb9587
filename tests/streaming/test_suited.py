"""Strips that suit a device: what is tried, what is chosen, that it is found once, and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from torch import nn

from comfyui_patchconv.memory.sizes import strip_bytes
from comfyui_patchconv.streaming import Streamed, Tuning, suited
from comfyui_patchconv.streaming.suited import LEAST, MOST, Kept, Suited, Traits, candidates, measured

CPU = torch.device("cpu")
H200, SMALL = Traits("H200", 132, 50 << 20), Traits("small", 6, 0)
MIB = 1 << 20


@pytest.mark.parametrize("traits", [H200, SMALL, Traits("3060", 28, 3 << 20), Traits("huge", 4000, 1 << 30)])
def test_sizes_that_are_tried_follow_the_processors_and_the_cache(traits: Traits) -> None:
    sizes = candidates(traits)
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= LEAST
    assert sizes[-1] <= MOST
    assert len(sizes) <= 5
    assert not LEAST <= traits.cache <= MOST or traits.cache in sizes


def clock(seconds: dict[int, float], worked: list[int]) -> Callable[[Callable[[], Any]], float]:
    """As if strips of so many bytes took so long, of those that are measured in turn."""
    sizes = [size for size in seconds for _ in range(4)]

    def of(work: Callable[[], Any]) -> float:
        work()
        worked.append(sizes[len(worked)])
        return seconds[worked[-1]]

    return of


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({6 * MIB: 1.0, 12 * MIB: 1.5, 24 * MIB: 3.0}, 12 * MIB),  # by row the second is the first as fast as any
        ({6 * MIB: 1.0, 12 * MIB: 2.0, 24 * MIB: 4.0}, 6 * MIB),
        ({6 * MIB: 1.0, 12 * MIB: 1.9, 24 * MIB: 2.0}, 24 * MIB),
        ({6 * MIB: 1.0, 12 * MIB: 2.2, 24 * MIB: 8.0}, 6 * MIB),
    ],
)
def test_the_smallest_that_is_about_as_fast_as_the_best_is_chosen(seconds: dict[int, float], chosen: int) -> None:
    worked: list[int] = []
    assert measured(CPU, list(seconds), clock(seconds, worked), 1e9) == chosen
    assert worked == [size for size in seconds for _ in range(4)]


def test_a_measurement_ends_in_time_with_what_it_has() -> None:
    start = time.monotonic()
    assert measured(CPU, [6 * MIB, 12 * MIB, 24 * MIB], lambda work: 1.0, 0.0) == 6 * MIB
    assert measured(CPU, [6 * MIB] * 1000, seconds=0.1) == 6 * MIB
    assert time.monotonic() - start < 20


class Measured:
    """In the place of a measurement: the largest, and how often it was asked."""

    def __init__(self, error: Optional[Exception] = None) -> None:
        self.asked: list[Sequence[int]] = []
        self.error = error

    def __call__(self, device: torch.device, sizes: Sequence[int]) -> int:
        self.asked.append(sizes)
        if self.error is not None:
            raise self.error
        return sizes[-1]


def test_it_is_measured_once_and_kept(tmp_path: Path) -> None:
    kept, measure = Kept(tmp_path / "below" / "strips.json"), Measured()
    ours = Suited(kept, lambda device: H200, measure)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: ours.strip_bytes(CPU), range(8)))
    assert found == {candidates(H200)[-1]}
    assert Suited(kept, lambda device: H200, Measured(RuntimeError("not asked"))).strip_bytes(CPU) in found
    assert len(measure.asked) == 1
    assert Suited(kept, lambda device: SMALL, measure).strip_bytes(CPU) == candidates(SMALL)[-1]
    assert len(kept.read()) == 2
    assert [path.name for path in kept.path.parent.iterdir()] == ["strips.json"]


@pytest.mark.parametrize("text", ["", "[1]", '{"H200": 12}', "not JSON", '{"H200": "8388608"}'])
def test_a_file_of_no_use_is_as_none(tmp_path: Path, text: str) -> None:
    path, measure = tmp_path / "strips.json", Measured()
    path.write_text(text, encoding="utf-8")
    assert Suited(Kept(path), lambda device: H200, measure).strip_bytes(CPU) == candidates(H200)[-1]
    assert len(Kept(path).read()) == 1


def test_where_nothing_can_be_kept_it_is_measured_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    ours = Suited(Kept(tmp_path / "file" / "strips.json"), lambda device: H200, Measured())
    assert ours.strip_bytes(CPU) == ours.strip_bytes(CPU) == candidates(H200)[-1]


def test_where_it_fails_the_usual_figure_is_taken(tmp_path: Path) -> None:
    kept, measure = Kept(tmp_path / "strips.json"), Measured(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    ours = Suited(kept, lambda device: H200, measure)
    assert ours.strip_bytes(CPU) is ours.strip_bytes(CPU) is None
    assert len(measure.asked) == 1
    assert not kept.path.exists()


def test_a_cpu_is_not_measured() -> None:
    assert suited.USUAL.strip_bytes(CPU) is None
    assert suited.USUAL.strip_bytes(torch.device("meta")) is None


@pytest.mark.parametrize("name", ["PATCHCONV_CACHE", "XDG_CACHE_HOME"])
def test_the_folder_is_the_users(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATCHCONV_CACHE", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv(name, str(tmp_path))
    below = [] if name == "PATCHCONV_CACHE" else ["patchconv"]
    assert Kept().path == tmp_path.joinpath(*below, "strips.json")


def test_what_was_measured_is_how_high_strips_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1)).requires_grad_(
        False
    )
    x, rows = torch.randn(1, 16, 512, 256), {}
    row_bytes = 16 * 256 * 4
    for size in (None, 6 * 40 * row_bytes, 6 * 90 * row_bytes):
        runner = Streamed(tuning=Tuning(always=True, suitable_bytes=size))
        with torch.inference_mode():
            torch.testing.assert_close(runner.call(model, (x,), {}), model(x), rtol=1e-5, atol=1e-5)
        assert runner.last is not None
        rows[size] = runner.last.rows
    assert list(rows.values()) == [min(strip_bytes("cpu") // 6 // row_bytes, 512), 40, 90]


def test_without_a_home_nothing_is_kept_and_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no entry."""

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    for name in (suited.VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    measure = Measured()
    assert Suited(None, lambda device: H200, measure).strip_bytes(CPU) == candidates(H200)[-1]
    assert len(measure.asked) == 1


def test_a_figure_that_cannot_be_kept_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "strips.json").mkdir()
    Kept(tmp_path / "strips.json").write("one", 8 * MIB)
    assert [one.name for one in tmp_path.iterdir()] == ["strips.json"]
