"""`patchconv decode` and `encode` in several processes, started as torchrun starts them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import LAUNCH, LIMIT, Ready, ended
from safetensors.torch import load_file
from vae_families import ALL
from vae_helpers import random_latent, write, write_vae

from comfyui_patchconv import cli
from comfyui_patchconv.files.latents import save_latent


def arguments(job: str, **options: object) -> list[str]:
    return [job, *(text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value)))]


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return write_vae(tmp_path / "vae.safetensors")


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """A folder of them, of several sizes, the first two in one batch."""
    folder = tmp_path / "latents"
    folder.mkdir()
    for place in range(5):
        batch = random_latent(height=4 + place, width=5).repeat(1 + (not place), 1, 1, 1)
        save_latent(folder / f"{place}.latent", batch)
    return folder


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def assert_same_pictures(folder: Path, other: Path) -> None:
    names = sorted(path.name for path in other.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert abs(pixels(folder / name) - pixels(other / name)).max() <= 1


def test_one_picture_over_all(ready: Ready, vae: Path, latents: Path, tmp_path: Path) -> None:
    latent, one, other = latents / "3.latent", tmp_path / "one.png", tmp_path / "other.png"
    assert cli.main(arguments("decode", vae=vae, latent=latent, out=one, mode="stream", budget="1MB")) == 0
    done = ready.ended(
        arguments("decode", vae=vae, latent=latent, out=other, mode="stream", budget="1MB"), LAUNCH, folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("other.png: 40x56, ".replace("other.png", str(other)))
    assert done.stdout.count("\n") == 1
    difference = abs(pixels(one) - pixels(other))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3  # where rounding goes the other way


def test_one_latent_over_all(ready: Ready, vae: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (72, 64, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "in.png")
    options: Any = {"vae": vae, "image": tmp_path / "in.png", "mode": "stream"}
    assert cli.main(arguments("encode", **options, out=tmp_path / "one.latent")) == 0
    done = ready.ended(arguments("encode", **options, out=tmp_path / "other.latent"), LAUNCH)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(tmp_path / f"{name}.latent")["latent_tensor"] for name in ("one", "other"))
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize(("name", "shape"), [("Wan 2.1", (1, 16, 3, 12, 5)), ("Oobleck", (1, 8, 3000))])
def test_one_video_and_one_sound_over_all(ready: Ready, tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    case, latent = ALL[name], torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if name == "Oobleck":
        pytest.importorskip("soundfile", reason="soundfile is not installed: pip install soundfile")
    save_latent(tmp_path / "in.latent", latent)
    vae = write(tmp_path / "vae.safetensors", case.make().state_dict())
    suffix = "png" if name == "Wan 2.1" else "wav"
    given: Any = {"vae": vae, "latent": tmp_path / "in.latent", "mode": "stream"}
    assert cli.main(arguments("decode", **given, out=tmp_path / f"one.{suffix}")) == 0
    done = ready.ended(arguments("decode", **given, out=tmp_path / f"other.{suffix}"), LAUNCH)
    assert done.returncode == 0, done.stderr
    if suffix == "wav":
        import soundfile  # pyright: ignore[reportMissingImports]

        one, other = (torch.from_numpy(soundfile.read(tmp_path / f"{of}.wav")[0]) for of in ("one", "other"))
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.abs().max()))
        return
    frames = sorted(path.name for path in tmp_path.glob("one-*.png"))
    assert len(frames) == 5
    assert all(abs(pixels(tmp_path / one) - pixels(tmp_path / f"other{one[3:]}")).max() <= 1 for one in frames)


@pytest.mark.parametrize("spread", ["rows", "pictures"])
def test_a_folder_is_done_by_several_processes_but_for_what_cannot_be_read(
    ready: Ready, vae: Path, latents: Path, tmp_path: Path, spread: str
) -> None:
    """The rest is done where one cannot be read, and what is done is skipped the next time."""
    assert cli.main(arguments("decode", vae=vae, latent=latents, out=tmp_path / "one")) == 0
    (latents / "bad.latent").write_text("not a latent at all")
    given = arguments("decode", vae=vae, latent=latents, out=tmp_path / "other", spread=spread)
    done = ready.ended(given, LAUNCH)
    assert done.returncode in (1, 2)
    assert done.stderr.count("bad.latent is not") == 1
    assert "1 of 6 failed" in done.stderr
    assert_same_pictures(tmp_path / "other", tmp_path / "one")
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "other").iterdir()}
    again = ready.ended(given, LAUNCH)
    assert again.stdout.count("there already, skipped\n") == 6
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "other").iterdir()} == changed


def test_failures_are_listed(ready: Ready, vae: Path, latents: Path, tmp_path: Path) -> None:
    for name in "ab":
        (latents / f"{name}.latent").write_text("not a latent at all")
    done = ready.ended(arguments("decode", vae=vae, latent=latents, out=tmp_path / "out"), LAUNCH)
    assert done.returncode == 1
    assert done.stderr.endswith(f"2 of 7 failed: {latents / 'a.latent'}, {latents / 'b.latent'}.\n")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "patch"}, "--mode is patch and several processes do one picture together"),
        ({"latent": "missing.latent"}, "missing.latent does not exist"),
        ({"latent": "empty"}, "empty is a folder without a file that ends in .latent or .safetensors"),
        ({"silent-seconds": "0"}, "silent_seconds is 0: give a number of seconds above 0"),
    ],
    ids=["mode", "latent", "folder", "seconds"],
)
def test_wrong_input_is_said_once(
    ready: Ready, vae: Path, latents: Path, tmp_path: Path, options: dict[str, str], sentence: str
) -> None:
    (tmp_path / "empty").mkdir()
    given = {"vae": vae, "latent": latents / "1.latent", "out": tmp_path / "out.png"} | options
    done = ready.ended(arguments("decode", **given), LAUNCH, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert sentence in done.stderr


@pytest.mark.slow
def test_killed_and_started_again(ready: Ready, vae: Path, latents: Path, tmp_path: Path) -> None:
    """By SIGKILL, at any moment: the pictures are those of an undisturbed run, and there is nothing else."""
    assert cli.main(arguments("decode", vae=vae, latent=latents, out=tmp_path / "one")) == 0
    given = arguments("decode", vae=vae, latent=latents, out=tmp_path / "other")
    draw = np.random.default_rng(0)
    for kill in range(20):
        running = ready.start(given, LAUNCH)
        end = time.monotonic() + draw.uniform(0.1, 0.3 + kill / 8)
        while time.monotonic() < end and not running.has_ended():
            time.sleep(0.05)
        if not running.has_ended():
            os.killpg(running.number, signal.SIGKILL)
        running.wait()
    assert ready.ended(given, LAUNCH).returncode == 0
    assert_same_pictures(tmp_path / "other", tmp_path / "one")


@pytest.mark.slow
def test_torchrun_gives_the_picture_of_one_process(vae: Path, latents: Path, tmp_path: Path) -> None:
    given = arguments(
        "decode", vae=vae, latent=latents / "2.latent", out=tmp_path / "out.png", silent_seconds=int(LIMIT)
    )
    started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "comfyui_patchconv"]
    done = ended([*started, *given])
    assert done.returncode == 0, done.stderr
    assert pixels(tmp_path / "out.png").shape == (48, 40, 3)
