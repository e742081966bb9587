"""`patchconv decode` of videos and sounds, and `encode` of images by the VAE of a video: the files that they become."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conv_helpers import assert_same
from PIL import Image
from processes import Ready
from products import crossed
from torch import Tensor
from vae_families import ALL
from vae_helpers import write

from comfyui_patchconv import cli
from comfyui_patchconv.cli import media
from comfyui_patchconv.cli.vae import Halves
from comfyui_patchconv.files import sounds
from comfyui_patchconv.files.images import levels, save_image
from comfyui_patchconv.files.latents import load_latent, save_latent
from comfyui_patchconv.files.sounds import quieter, save_sound
from comfyui_patchconv.streaming.call import Call

MODES = ("plain", "patch", "stream", "auto")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def case(folder: Path, name: str, *shape: int) -> tuple[Any, Path, Path]:
    """A VAE, the file of it, and one of a latent."""
    vae = ALL[name].make()
    save_latent(folder / "in.latent", random(*shape))
    return vae, write(folder / "vae.safetensors", vae.state_dict()), folder / "in.latent"


def run(job: str, given: Path, vae: Path, out: Path, *options: str, code: int = 0) -> None:
    option = {"decode": "--latent", "encode": "--image"}[job]
    argv = [job, "--vae", str(vae), option, str(given), "--out", str(out), "--device", "cpu", *options]
    assert cli.main(argv) == code


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def expected_frames(vae: Any, latent: Path) -> np.ndarray:
    """`[T, H, W, 3]`, as diffusers decodes them."""
    own = load_latent(latent, "video")
    buffers = dict(vae.named_buffers())
    if "latents_std" in buffers:  # LTX-Video's, as its pipeline has it
        mean, deviation = (buffers[name].view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        own = own * deviation + mean
    with torch.no_grad():
        video = vae.decode(own).sample[0]
    return levels(video.movedim(0, 1)).numpy().astype(int)


def assert_alike(found: np.ndarray, expected: np.ndarray, most: int = 1) -> None:
    assert found.shape == expected.shape
    assert np.ptp(expected) > 30
    assert np.abs(found - expected).max() <= most


# Videos


FRAMES = {
    "Wan 2.1": (5, "16x20"), "Wan 2.2": (5, "32x40"), "HunyuanVideo": (9, "16x20"), "CogVideoX": (9, "16x20"),
    "LTX-Video 0.9": (5, "16x20"),
}  # fmt: skip
"""By the name of a VAE, how many frames it makes of three, and of which size."""


@crossed(1, name=list(FRAMES), mode=MODES)
def test_a_video_becomes_numbered_frames(
    tmp_path: Path, name: str, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    count, size = FRAMES[name]
    theirs, vae, latent = case(tmp_path, name, 1, 16, 3, 5, 4)
    out = tmp_path / "out.png"
    run("decode", latent, vae, out, "--mode", mode, "--splits", "3", "--threshold", "0")
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == [f"out-{number:04}.png" for number in range(1, count + 1)]
    assert_alike(np.stack([pixels(tmp_path / one) for one in names]), expected_frames(theirs, latent))
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))}/out-0001.png to out-{count:04}.png: {count} frames of {size}, \d+\.\d s, "
        r"peak \d+ MB .*\n",
        capsys.readouterr().out,
    )


def test_what_is_there_of_a_video_is_skipped_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, vae, latent = case(tmp_path, "Wan 2.1", 1, 16, 2, 3, 4)
    (tmp_path / "out").mkdir()
    run("decode", latent, vae, tmp_path / "out")
    first = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in first] == ["in-0001.png", "in-0002.png", "in-0003.png"]
    before = first[0].read_bytes()
    first[1].unlink()
    first[0].write_bytes(b"mine")
    run("decode", latent, vae, tmp_path / "out")
    assert first[0].read_bytes() == b"mine"
    assert first[1].exists()
    capsys.readouterr()
    run("decode", latent, vae, tmp_path / "out")
    assert "in-0001.png to in-0003.png: there already, skipped" in capsys.readouterr().out
    run("decode", latent, vae, tmp_path / "out", "--overwrite")
    assert first[0].read_bytes() == before


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_video_becomes_a_file(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    theirs, vae, latent = case(tmp_path, "Wan 2.1", 1, 16, 3, 5, 4)
    run("decode", latent, vae, tmp_path / f"out{suffix}", "--fps", "12.5")
    with av.open(str(tmp_path / f"out{suffix}")) as opened:
        assert float(opened.streams.video[0].average_rate) == 12.5
        found = np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]).astype(int)
    expected = expected_frames(theirs, latent)
    if suffix == ".mkv":
        assert_alike(found, expected)
    else:  # which has colours of four pixels in one
        assert found.shape == expected.shape
        assert np.abs((found - expected).mean(-1)).mean() < 8 < expected.mean(-1).std()
    assert "5 frames of 16x20, 12.5 a second" in capsys.readouterr().out


def test_several_videos_become_files_of_one_format(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    _, vae, latent = case(tmp_path, "Wan 2.1", 2, 16, 2, 3, 4)
    run("decode", latent, vae, tmp_path / "out", "--format", "mkv", code=2)  # a file must end so
    (tmp_path / "out").mkdir()
    run("decode", latent, vae, tmp_path / "out", "--format", "mkv")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["in-0001.mkv", "in-0002.mkv"]


def test_a_video_of_one_frame_is_a_picture(tmp_path: Path) -> None:
    theirs, vae, latent = case(tmp_path, "Qwen-Image", 1, 16, 1, 5, 4)
    run("decode", latent, vae, tmp_path / "out.png")
    assert_alike(pixels(tmp_path / "out.png")[None], expected_frames(theirs, latent))


def test_images_go_through_the_vae_of_a_video(tmp_path: Path) -> None:
    theirs, vae, latent = case(tmp_path, "Qwen-Image", 2, 16, 5, 4)
    run("decode", latent, vae, tmp_path / "out.png")
    for number, one in enumerate(load_latent(latent, "video")):
        save_latent(tmp_path / "one.latent", one[None, :, None])
        assert_alike(
            pixels(tmp_path / f"out-{number + 1:04}.png")[None], expected_frames(theirs, tmp_path / "one.latent")
        )
    save_image(tmp_path / "picture.png", random(3, 12, 20).clamp(-1, 1))
    run("encode", tmp_path / "picture.png", vae, tmp_path / "out.latent")
    assert load_latent(tmp_path / "out.latent", "video").shape == (1, 16, 1, 3, 5)


def test_a_video_that_holds_nan_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, vae, latent = case(tmp_path, "Wan 2.1", 1, 16, 2, 3, 4)
    keep = media._levels
    monkeypatch.setattr(media, "_levels", lambda video: keep(video * torch.nan))
    run("decode", latent, vae, tmp_path / "out.png", code=2)
    assert "NaN" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


# Sounds


def heard(path: Path) -> tuple[Tensor, int]:
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed: pip install soundfile")
    found, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(found).T, rate


def expected_sound(vae: Any, latent: Path) -> Tensor:
    """As ComfyUI's VAE Decode Audio has it."""
    with torch.no_grad():
        sound = vae.decode(load_latent(latent, "sound")).sample
    return (sound / (5 * sound.std()).clamp(min=1))[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_sound_becomes_a_file(tmp_path: Path, suffix: str, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, vae, latent = case(tmp_path, "Oobleck", 1, 8, 300)
    out = tmp_path / f"out{suffix}"
    pytest.importorskip("soundfile", reason="soundfile is not installed: pip install soundfile")
    run("decode", latent, vae, out, "--mode", mode, "--splits", "3", "--threshold", "0")
    expected = expected_sound(theirs, latent)
    found, rate = heard(out)
    assert rate == 44100
    assert_same(found, expected if suffix == ".wav" else expected.clamp(-1, 1), 1e-5)
    told = capsys.readouterr().out
    assert re.match(rf"{re.escape(str(out))}: 0\.05 s of sound at 44100 Hz, \d+\.\d s, peak \d+ MB", told), told


def test_a_sound_is_computed_where_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed, what the VAE makes is never a tensor of its own: it goes to a file strip by strip."""
    pytest.importorskip("soundfile", reason="soundfile is not installed: pip install soundfile")
    _, vae, latent = case(tmp_path, "Oobleck", 1, 8, 100_000)
    calls: list[Call] = []
    evaluate = Call.evaluate

    def watch(self: Call, *given: Any) -> None:
        evaluate(self, *given)
        calls.append(self)

    monkeypatch.setattr(Call, "evaluate", watch)
    run("decode", latent, vae, tmp_path / "out.wav", "--mode", "stream")
    assert calls[0].in_strips
    assert not calls[0].stored


def test_sounds_in_a_folder_are_flacs_or_as_asked(tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="soundfile is not installed: pip install soundfile")
    _, vae, latent = case(tmp_path, "Oobleck", 2, 8, 30)
    (tmp_path / "out").mkdir()
    run("decode", latent, vae, tmp_path / "out")
    run("decode", latent, vae, tmp_path / "out", "--format", "wav")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["in-0001.flac", "in-0001.wav", "in-0002.flac", "in-0002.wav"]


def test_a_loud_sound_is_made_quieter_and_a_quiet_one_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "_AT_ONCE", 7)
    for factor in (0.01, 3.0):
        sound = factor * random(2, 40) + 0.5 * factor
        expected = sound / (5 * sound.std()).clamp(min=1)
        assert_same(quieter(sound.clone()), expected, 1e-6)


def test_a_long_sound_has_the_form_that_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed: pip install soundfile")
    monkeypatch.setattr(sounds, "_LONG", 100)
    sound = random(2, 40)
    save_sound(tmp_path / "long.wav", sound, 48000)
    assert soundfile.info(str(tmp_path / "long.wav")).format == "RF64"
    assert_same(heard(tmp_path / "long.wav")[0], sound, 1e-6)


def test_a_sound_that_holds_nan_is_not_written(tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="soundfile is not installed: pip install soundfile")
    with pytest.raises(ValueError, match="NaN"):
        save_sound(tmp_path / "out.wav", torch.full((2, 9), torch.nan), 44100)
    assert not list(tmp_path.iterdir())


FULL = """
import resource, signal, sys
from comfyui_patchconv import cli
import diffusers.models.autoencoders.autoencoder_kl_wan, diffusers.models.autoencoders.autoencoder_oobleck
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
sys.exit(cli.main())
"""


@pytest.mark.parametrize("out", ["out.wav", "out.flac", "out.mp4", "out.mkv", "out.png"])
def test_a_full_disk_is_one_sentence(tmp_path: Path, out: str, ready: Ready) -> None:
    module = {".wav": "soundfile", ".flac": "soundfile", ".png": "PIL"}.get(Path(out).suffix, "av")
    pytest.importorskip(module, reason=f"{module} is not installed: pip install {module}")
    name, shape = ("Oobleck", (1, 8, 300)) if module == "soundfile" else ("Wan 2.1", (1, 16, 2, 9, 8))
    _, vae, latent = case(tmp_path, name, *shape)
    argv = ["decode", "--vae", str(vae), "--latent", str(latent), "--out", out, "--device", "cpu"]
    done = ready.ended(argv, FULL, tmp_path)
    assert done.returncode == 2, done.stderr
    first = "out-0001.png" if out == "out.png" else out
    assert re.fullmatch(rf"patchconv: {first} cannot be written \(File too large\)[^\n]+\n", done.stderr), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.latent", "vae.safetensors"]


# What is refused


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"patchconv: [^\n]+\.\n", err), err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("name", "shape", "out", "options", "words"),
    [
        ("Wan 2.1", (1, 16, 2, 3, 4), "out.flac", (), (".png or .mp4 or .mkv",)),
        ("Oobleck", (1, 8, 9), "out.png", (), (".flac or .wav",)),
        ("TAESD", (1, 4, 3, 4), "out.mp4", (), (".png",)),
        ("Oobleck", (1, 8, 9), "out.wav", ("--format", "png"), ("sounds", "flac or wav")),
        ("Wan 2.1", (1, 16, 2, 3, 4), "out.mp4", ("--fps", "0"), ("frames a second",)),
        ("Wan 2.1", (1, 16, 2, 3, 4), "out.mp4", ("--fps", "0.0001"), ("0.0001 is not between 0.001",)),
        ("Oobleck", (1, 4, 3, 4), "out.wav", (), ("[batch, channels, length]",)),
        ("TAESD", (1, 4, 2, 3, 4), "out.png", (), ("[batch, channels, height, width]",)),
        ("Wan 2.1", (1, 8, 2, 3, 4), "out.png", (), ("8 channels and the VAE decodes 16",)),
    ],
    ids=str,
)
def test_a_file_of_another_medium_is_refused(
    tmp_path: Path,
    name: str,
    shape: tuple[int, ...],
    out: str,
    options: tuple[str, ...],
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if Path(out).suffix == ".wav" and not options:
        pytest.importorskip("soundfile", reason="soundfile is not installed: pip install soundfile")
    _, vae, latent = case(tmp_path, name, *shape)
    if name == "TAESD":
        vae = vae.rename(tmp_path / "taesd.safetensors")
    assert cli.main(["decode", "--vae", str(vae), "--latent", str(latent), "--out", str(tmp_path / out), *options]) == 2
    _, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words), err
    assert not (tmp_path / out).exists()


def test_an_image_cannot_be_encoded_to_a_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, vae, _ = case(tmp_path, "Oobleck", 1, 8, 9)
    save_image(tmp_path / "in.png", torch.zeros(3, 16, 16))
    run("encode", tmp_path / "in.png", vae, tmp_path / "out.latent", code=2)
    refused(capsys, "sounds")


@pytest.mark.parametrize(
    ("name", "shape", "out", "module", "extra"),
    [
        ("Oobleck", (1, 8, 9), "out.wav", "soundfile", "sound"),
        ("Wan 2.1", (1, 16, 2, 3, 4), "out.mp4", "av", "video"),
    ],
)
def test_without_its_library_a_file_is_refused_before_any_work(
    tmp_path: Path,
    name: str,
    shape: tuple[int, ...],
    out: str,
    module: str,
    extra: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(Halves, "decode", None)
    _, vae, latent = case(tmp_path, name, *shape)
    run("decode", latent, vae, tmp_path / out, code=2)
    refused(capsys, f"{module} is not installed: run pip install 'patchconv[{extra}]'")


# Latents


@pytest.mark.parametrize("alone", [True, False])
def test_a_latent_saved_by_torch_is_read(tmp_path: Path, alone: bool) -> None:
    latent = random(1, 16, 2, 3, 4)
    torch.save(latent if alone else {"samples": latent, "seed": 3}, tmp_path / "x.pt")
    assert torch.equal(load_latent(tmp_path / "x.pt", "video"), latent)


def test_latents_have_a_batch_or_not(tmp_path: Path) -> None:
    for medium, shape in (("image", (4, 3, 2)), ("sound", (64, 9))):
        write(tmp_path / "x.safetensors", {"samples": random(*shape)})
        assert load_latent(tmp_path / "x.safetensors", medium).shape == (1, *shape)  # pyright: ignore
    write(tmp_path / "x.safetensors", {"samples": random(2, 16, 1, 3, 4)})
    assert load_latent(tmp_path / "x.safetensors").shape == (2, 16, 3, 4)
    assert load_latent(tmp_path / "x.safetensors", "video").shape == (2, 16, 1, 3, 4)
