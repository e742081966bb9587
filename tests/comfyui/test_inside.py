"""ComfyUI's own classes and patchers, asked from inside by `probe.py`."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_helpers import assert_same

from .conftest import python


def probe(checkout: Path, *question: str) -> Any:
    command = [python(), str(Path(__file__).with_name("probe.py")), str(checkout), *question]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_halves_of_all_families(checkout: Path) -> None:
    """The half that a convolution's name says is the one that calls it, and both can be counted on fake tensors."""
    answer = probe(checkout, "halves")
    wrong = {family: found for family, found in answer.items() if found and "not here" not in found}
    assert not wrong
    assert sum(not found for found in answer.values()) >= 25


@pytest.mark.slow
def test_no_autoencoder_takes_more_than_eager(checkout: Path) -> None:
    """Every one that this ComfyUI can build, both ways, counted at the size that people use; and a narrow one of each
    in strips, equal to eager."""
    answer = probe(checkout, "table")
    there = {name: found for name, found in answer.items() if "not here" not in found}
    for name, found in there.items():
        print(name, found)
    assert not {name: found for name, found in there.items() if isinstance(found, str)}
    assert not {name: found for name, found in there.items() if found["ran"]["error"] > 1e-5}
    assert not {name: found for name, found in there.items() if found["streamed"] > found["eager"]}
    assert not [name for name, found in there.items() if any("through a view" in one for one in found["ran"]["whole"])]
    assert len(there) >= 55


def test_weights_streamed_at_every_use(checkout: Path) -> None:
    answer = probe(checkout, "streamed")
    assert answer["streaming"] > 100
    assert answer["difference"] <= 1e-5


def test_a_clone_for_another_device_has_weights_of_its_own(checkout: Path) -> None:
    answer = probe(checkout, "cloned")
    assert all(difference <= 1e-5 for difference in answer.values()), answer


@pytest.mark.parametrize("method", ["decode", "encode"])
def test_video_in_chunks(checkout: Path, method: str, tmp_path: Path) -> None:
    """Wan's decoder gets a few frames at a time, and keeps frames for the next: all of it is streamed at once."""
    files = [tmp_path / "eager.pt", tmp_path / "streamed.pt"]
    eager, streamed = (probe(checkout, "video", method, file.stem, str(file)) for file in files)
    print(*({key: one[key] for key in ("estimate", "measured")} for one in (eager, streamed)))
    expected, result = (torch.load(file, weights_only=True) for file in files)
    assert_same(result, expected, 1e-5)
    assert streamed["estimate"] < eager["estimate"] / 2
    copies = 2 * 9 * 384 * 384 * 3 * 4  # of the pixels, by the host itself
    assert streamed["measured"] <= streamed["estimate"] * 1.15 + copies
    assert streamed["measured"] < eager["measured"] / 2
    assert streamed["moves"] == sorted(streamed["moves"])


def test_the_bar_of_a_batch_goes_on_from_image_to_image(checkout: Path) -> None:
    moves = probe(checkout, "batch")
    print(moves)
    assert moves == sorted(moves)
    assert moves.index(1.0) == len(moves) - 1  # it is full with the last image, and no earlier


def test_what_newer_hosts_ask_of_a_vae(checkout: Path) -> None:
    """Where it streams no estimate sends it to tiles, and what it allocates is not recorded; other ways are as without
    us, and another node takes all of it back."""
    answer = probe(checkout, "newer")
    print(answer)
    assert answer["eager"] == {"reliable": True, "paused": [False]}
    for mode in ("stream", "auto", "patch"):
        found = answer[mode]
        assert found["reliable"] == (mode == "patch")
        assert not found["tiled"]
        assert found["paused"]
        assert all(found["paused"])
        assert found["difference"] <= 1e-5
        assert found["left"]


def test_what_no_widget_would_bring_is_refused_before_any_work(checkout: Path) -> None:
    """A link may bring any text, number or nothing: the host compares only what is chosen in the node."""
    answer = probe(checkout, "refused")
    wrong = {}
    for place, said in answer.items():
        name, _, value = place.partition(".")[2].partition("=")
        sentence = rf"'?{re.escape(value)}'?: use .* (or|to) .*\."
        if value == "None" or "x" in value:
            sentence = "(missing: what is|empty .*: connect|1 x 2 x 8 x 8 x 3: pictures are) .*"
        if not re.fullmatch(rf"ValueError: {name} is {sentence}", said):
            wrong[place] = said
    assert not wrong
    for one in ("VAE.mode=Other", "VAE.splits=-1", "Model.padding=Other", "Model.threshold=nan", "VAE.vae=None"):
        assert f"PatchConv{one}" in answer
    assert len(answer) >= 60


def test_an_upscale_model_in_half_precision(checkout: Path) -> None:
    """Where the host would take it; and the model that it has loaded keeps its weights."""
    answer = probe(checkout, "upscaled")
    assert 0 < answer["difference"] < 0.05
    assert answer["types"] == ["torch.bfloat16", "torch.float32"]
    assert answer["shapes"] == [[2, 96, 80, 3]] * 2
    assert answer["kept"]


@pytest.mark.parametrize(("width", "seconds"), [(16, 10), pytest.param(8, 180, marks=pytest.mark.slow)])
def test_sound(checkout: Path, width: int, seconds: int, tmp_path: Path) -> None:
    """Through the host's audio nodes, tiled too, by a narrow VAE of Stable Audio's class that the host has detected."""
    answer = probe(checkout, "sound", str(tmp_path), str(width), str(seconds))
    print(answer)
    assert answer["class"] == "AudioOobleckVAE"
    eager, stream, auto = (answer["way"][name] for name in ("eager", "stream", "auto"))
    for found in (stream, auto):
        assert max(found[name] for name in ("decode", "tiled", "encode")) <= 1e-5
        assert found["estimate"] < eager["estimate"] / 5
        copies = 3 * seconds * 44100 * 2 * 4  # of the waveform, by the host itself
        assert found["measured"] <= found["estimate"] * 1.15 + copies
    assert stream["lines"][0].startswith("VAE decoder streamed in ")
    assert auto["lines"][0].startswith("VAE decoder auto: streamed in ")
    if seconds > 60:
        assert stream["measured"] - copies <= 0.1 * eager["measured"]


@pytest.mark.slow
def test_stated_memory(checkout: Path, checkpoint: str) -> None:
    """What the patched VAE asks the host for is enough, and nearer to the need than the host's own estimate.

    Resident memory, the measure on a CPU, has up to a tenth of what the allocator keeps for itself in it.
    """
    answer = probe(checkout, "memory", str(checkout / "models" / "checkpoints" / checkpoint), "512")
    print(answer)
    assert answer["patched measured"] <= answer["patched estimate"] * 1.1
    assert answer["patched estimate"] < answer["eager estimate"] / 2
    assert answer["streamed measured"] <= answer["streamed estimate"] * 1.1
    assert answer["streamed estimate"] < answer["patched estimate"] / 1.5
