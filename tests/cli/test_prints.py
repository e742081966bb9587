"""Work is done and counts whatever becomes of what is printed: nowhere to print, a full disk, a pipe that is closed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from patch_ddpm_helpers import FEW, TALL, randomised
from processes import COMMAND_LINE, Ready
from upscale_helpers import require_spandrel
from upscale_weights import compact
from vae_helpers import random_latent, write_vae

from comfyui_patchconv import cli
from comfyui_patchconv.files.images import save_image
from comfyui_patchconv.files.latents import save_latent
from comfyui_patchconv.files.tensors import save_tensors
from comfyui_patchconv.pixel_models.patch_ddpm.checkpoints import save
from comfyui_patchconv.pixel_models.patch_diffusion.checkpoints import save as save_diffusion
from comfyui_patchconv.pixel_models.patch_diffusion.config import Config
from comfyui_patchconv.pixel_models.patch_diffusion.model import PatchUNet


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return write_vae(tmp_path / "vae.safetensors")


@pytest.fixture
def latents(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.latent" for name in ("one", "two")]
    for path in paths:
        save_latent(path, random_latent())
    return paths


def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `pythonw` and closed descriptors leave a process."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)


@pytest.mark.parametrize("mode", ["patch", "stream", "auto"])
def test_a_decode_without_a_place_to_print_to(
    tmp_path: Path, vae: Path, latents: list[Path], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere(monkeypatch)
    argv = ["decode", "--vae", vae, "--latent", latents[0], "--out", tmp_path / "out.png", "--mode", mode]
    assert cli.main([*map(str, argv), "--device", "cpu"]) == 0
    assert (tmp_path / "out.png").exists()
    assert (sys.stdout, sys.stderr) == (None, None)


def test_upscaling_without_a_place_to_print_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_spandrel()
    save_tensors(tmp_path / "model.safetensors", compact(scale=2))
    save_image(tmp_path / "in.png", torch.rand(3, 8, 8))
    nowhere(monkeypatch)
    argv = ["upscale", "--model", tmp_path / "model.safetensors", "--image", tmp_path / "in.png", "--device", "cpu"]
    assert cli.main([*map(str, argv), "--out", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").exists()


def test_sampling_without_a_place_to_print_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(randomised(TALL), FEW, tmp_path / "ddpm.safetensors")
    config = Config(8, 2, 32, (1.0,), 1, head_channels=32)
    save_diffusion([PatchUNet(config)], tmp_path / "diffusion.safetensors")
    nowhere(monkeypatch)
    ddpm = ["patch-ddpm", "sample", "--ckpt", tmp_path / "ddpm.safetensors", "--out-dir", tmp_path / "out"]
    assert cli.main([*map(str, ddpm), "--n-samples", "1", "--steps", "1", "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "sample-00000000.png").exists()
    diffusion = ["patch-diffusion", "sample", "cpu", "grid", tmp_path / "diffusion.safetensors", 1, tmp_path / "grid"]
    assert cli.main([*map(str, diffusion), "--timesteps", "2"]) == 0
    assert (tmp_path / "grid.png").exists()


def test_wrong_input_without_a_place_to_print_to(tmp_path: Path, vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere(monkeypatch)
    argv = ["decode", "--vae", vae, "--latent", tmp_path / "missing.latent", "--out", tmp_path / "out.png"]
    assert cli.main(list(map(str, argv))) == 2
    assert cli.main(["decode"]) == 2
    assert cli.main(["--help"]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_full_disk_for_what_is_printed_is_said_once(
    tmp_path: Path, vae: Path, latents: list[Path], ready: Ready
) -> None:
    argv = ["decode", "--vae", vae, "--latent", *latents, "--out", tmp_path / "out", "--device", "cpu"]
    full = "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    done = ready.ended(argv, f"{full}\n{COMMAND_LINE}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == done.stderr.count("cannot be printed (No space left on device)") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.png", "two.png"]


@pytest.mark.parametrize("stream", [1, 2])
def test_nobody_who_reads_what_is_printed(
    tmp_path: Path, vae: Path, latents: list[Path], stream: int, ready: Ready
) -> None:
    argv = ["decode", "--vae", vae, "--latent", *latents, tmp_path / "missing.latent", "--out", tmp_path / "out"]
    closed = f"import os\nreader, writer = os.pipe()\nos.close(reader)\nos.dup2(writer, {stream})"
    done = ready.ended([*argv, "--device", "cpu"], f"{closed}\n{COMMAND_LINE}")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "missing" not in line] == (
        ["patchconv: 1 of 3 failed."] if stream == 1 else []
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.png", "two.png"]


def test_a_file_does_not_get_the_number_of_a_closed_stream(
    tmp_path: Path, vae: Path, latents: list[Path], ready: Ready
) -> None:
    """Libraries write what they complain about to the number 2, whatever is open there."""
    code = """
import os, sys
from comfyui_patchconv import cli
from comfyui_patchconv.cli import encode, decode
kept, load = os.dup(2), decode.load_latent
os.close(2)
stream, sys.stderr = sys.stderr, None
def watched(*given):
    with open(given[0], "rb") as file:
        os.write(kept, str(file.fileno() > 2).encode())
    return load(*given)
decode.load_latent = watched
code = cli.main()
sys.stderr = stream
sys.exit(code)
"""
    argv = ["decode", "--vae", vae, "--latent", latents[0], "--out", tmp_path / "out.png", "--device", "cpu"]
    done = ready.ended(argv, code)
    assert (done.returncode, done.stderr) == (0, "True")
