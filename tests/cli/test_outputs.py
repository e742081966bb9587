"""What the command line does with files that are there: replaced when the new one is whole, skipped in a folder, and
never an input."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patch_ddpm_helpers import CHECKPOINT, FEW, TALL, randomised
from PIL import Image
from processes import COMMAND_LINE, Ready, ended
from torch import nn
from vae_helpers import random_latent, small_vae, write, write_vae

from comfyui_patchconv import cli
from comfyui_patchconv.cli.outputs import Outputs
from comfyui_patchconv.cli.vae import Halves
from comfyui_patchconv.files.images import save_image
from comfyui_patchconv.files.latents import load_latent, save_latent
from comfyui_patchconv.pixel_models.patch_ddpm import checkpoints as ddpm
from comfyui_patchconv.pixel_models.patch_diffusion import checkpoints as diffusion
from comfyui_patchconv.pixel_models.patch_diffusion.config import Config
from comfyui_patchconv.pixel_models.patch_diffusion.model import PatchUNet

OLD = b"old" * 100


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return write_vae(tmp_path / "vae.safetensors")


@pytest.fixture
def latents(tmp_path: Path) -> list[Path]:
    """Three, of which the second is a batch of two."""
    paths = [tmp_path / f"{name}.latent" for name in ("one", "two", "three")]
    for number, path in enumerate(paths):
        save_latent(path, random_latent(batch=2 if number == 1 else 1))
    return paths


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    for path in paths:
        save_image(path, torch.rand(3, 16, 24))
    return paths


def run(job: str, given: list[Path], vae: Path, out: Path, *options: str) -> int:
    name = {"decode": "--latent", "encode": "--image"}[job]
    return cli.main([job, "--vae", str(vae), name, *map(str, given), "--out", str(out), "--device", "cpu", *options])


def save_diffusion(path: Path) -> Path:
    diffusion.save([PatchUNet(Config(8, 2, 32, (1.0,), 1, head_channels=32))], path)
    return path


def save_ddpm(path: Path) -> Path:
    ddpm.save(randomised(TALL), FEW, path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_several_latents_become_images_in_a_folder(tmp_path: Path, vae: Path, latents: list[Path]) -> None:
    out = tmp_path / "new"
    assert run("decode", latents, vae, out) == 0
    assert names(out) == ["one.png", "three.png", "two-0001.png", "two-0002.png"]
    assert run("decode", latents[2:], vae, tmp_path / "alone.png") == 0
    assert np.array_equal(pixels(out / "three.png"), pixels(tmp_path / "alone.png"))


def test_several_images_become_latents_in_a_folder(tmp_path: Path, vae: Path, images: list[Path]) -> None:
    out = tmp_path / "there"
    out.mkdir()
    assert run("encode", images, vae, out) == 0
    assert run("encode", images[:1], vae, tmp_path / "alone.latent") == 0
    assert names(out) == ["first.latent", "second.latent"]
    assert torch.equal(load_latent(out / "first.latent"), load_latent(tmp_path / "alone.latent"))


def test_a_folder_that_is_there_takes_a_single_result_too(tmp_path: Path, vae: Path, latents: list[Path]) -> None:
    (tmp_path / "there").mkdir()
    assert run("decode", latents[:1], vae, tmp_path / "there") == 0
    assert names(tmp_path / "there") == ["one.png"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_in_a_folder_is_skipped_unless_it_is_to_be_replaced(
    tmp_path: Path, vae: Path, latents: list[Path], overwrite: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("one.png", "two-0002.png"):
        (out / name).write_bytes(OLD)
    assert run("decode", latents, vae, out, *["--overwrite"] * overwrite) == 0
    kept = [(out / name).read_bytes() == OLD for name in ("one.png", "two-0002.png")]
    assert kept == [not overwrite] * 2
    assert names(out) == ["one.png", "three.png", "two-0001.png", "two-0002.png"]
    assert capsys.readouterr().out.count("there already, skipped") == (0 if overwrite else 2)


@pytest.mark.parametrize("suffix", ["png", "latent"])
def test_a_file_is_replaced(tmp_path: Path, vae: Path, latents: list[Path], images: list[Path], suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    out.write_bytes(OLD)
    assert run(*(("decode", latents[:1]) if suffix == "png" else ("encode", images[:1])), vae, out) == 0
    assert out.read_bytes() != OLD


@pytest.mark.parametrize("job", ["decode", "encode"])
def test_help_says_the_rule(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([job, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "replaced once the new one is whole" in text
    assert "what is there is skipped, unless --overwrite" in text


def test_one_that_fails_does_not_end_the_others(
    tmp_path: Path, vae: Path, latents: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    latents[0].write_text("damaged")
    save_latent(latents[1], random_latent(16))
    given = [*latents, tmp_path / "missing.latent"]
    assert run("decode", given, vae, tmp_path / "out") == 2
    assert names(tmp_path / "out") == ["three.png"]
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    lines = err.splitlines()
    assert [any(word in line for line in lines) for word in ("one.latent", "two.latent", "missing.latent")] == [
        True
    ] * 3
    assert lines[-1] == "patchconv: 3 of 4 failed."
    assert all(line.startswith("patchconv: ") and line.endswith(".") for line in lines)


def test_out_of_memory_for_one_is_the_exit_code(
    tmp_path: Path, vae: Path, latents: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = Halves.decode, []

    def limited(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
        return decode(*given)

    monkeypatch.setattr(Halves, "decode", limited)
    latents[2].write_text("damaged")
    assert run("decode", latents, vae, tmp_path / "out") == 3
    assert names(tmp_path / "out") == ["two-0001.png", "two-0002.png"]


def test_a_mistake_of_the_program_is_not_hidden(
    tmp_path: Path, vae: Path, latents: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("mistake")

    monkeypatch.setattr(Halves, "decode", broken)
    with pytest.raises(KeyError, match="mistake"):
        run("decode", latents, vae, tmp_path / "out")


def assert_refused(
    code: int, word: str, capsys: pytest.CaptureFixture[str], folder: Path, before: dict[Path, bytes]
) -> None:
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert word in err
    assert err.count("\n") == 1
    assert content(folder) == before


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["file", "missing/folder", "same names"])
def test_a_folder_that_cannot_be_one_is_refused(
    tmp_path: Path, vae: Path, latents: list[Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(OLD)
    out, given, word = tmp_path / kind, latents, {"file": "is a file", "missing/folder": "does not exist"}.get(kind, "")
    if kind == "same names":
        (tmp_path / "other").mkdir()
        given, out, word = [*latents, tmp_path / "other" / "one.latent"], tmp_path / "out", "would both be one.png"
    before = content(tmp_path)
    assert_refused(run("decode", given, vae, out), word, capsys, tmp_path, before)


@pytest.fixture(params=["pipe", "link to nothing", "folder", "name is empty"])
def unwritten(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The name of a file that cannot be written; without a suffix."""
    if request.param == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes with a name in a folder")
    if request.param == "folder":
        return str(request.getfixturevalue("unwritable") / "out")
    for suffix in (".png", ".latent", ".safetensors", ".npz"):
        if request.param == "pipe":
            os.mkfifo(tmp_path / f"out{suffix}")
        elif request.param == "link to nothing":
            (tmp_path / f"out{suffix}").symlink_to(tmp_path / "missing" / "file")
    return "" if request.param == "name is empty" else str(tmp_path / "out")


def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, vae: Path, latents: list[Path], images: list[Path], unwritten: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def out(suffix: str) -> str:
        return unwritten and unwritten + suffix

    monkeypatch.setattr(nn.Module, "__call__", None)  # nothing is computed
    before = content(tmp_path)
    model = save_diffusion(tmp_path / "model.safetensors")
    before[model] = model.read_bytes()
    for argv in (
        ["decode", "--vae", vae, "--latent", latents[0], "--out", out(".png")],
        ["encode", "--vae", vae, "--image", images[0], "--out", out(".latent")],
        ["patch-diffusion", "sample", "cpu", "grid", model, "1", out(".png")],
        ["patch-diffusion", "sample", "cpu", "fid", model, "1", out(".npz")],
        ["patch-diffusion", "import", "lsun_p4", out(".safetensors"), "--model_path", tmp_path / "missing.pt"],
        ["patch-ddpm", "import", "--ckpt", CHECKPOINT, "--trust", "--out", out(".safetensors")],
    ):
        code = cli.main([str(one) for one in argv])
        assert_refused(code, "cannot be written" if unwritten else "the name is empty", capsys, tmp_path, before)


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(
    tmp_path: Path, vae: Path, latents: list[Path], images: list[Path], unwritable: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(nn.Module, "__call__", None)
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    model, other = save_diffusion(tmp_path / "model.safetensors"), save_ddpm(tmp_path / "ddpm.safetensors")
    (tmp_path / "images").mkdir()
    save_image(tmp_path / "images" / "one.png", torch.rand(3, 16, 16))
    before = content(tmp_path)
    for out in (unwritable, unwritable / "new", tmp_path / "link"):
        for argv in (
            ["decode", "--vae", vae, "--latent", *latents, "--out", out],
            ["encode", "--vae", vae, "--image", *images, "--out", out],
            ["patch-diffusion", "sample", "cpu", "folder", model, "1", out],
            ["patch-diffusion", "train", tmp_path / "images", "--out", out],
            ["patch-ddpm", "sample", "--ckpt", other, "--out-dir", out],
            ["demo", "--out", out],
        ):
            code = cli.main([str(one) for one in argv])
            word = "a link to nothing" if out.name == "link" else "nothing can be written"
            assert_refused(code, word, capsys, tmp_path, before)


def test_a_result_in_a_folder_that_cannot_be_written_is_refused_before_its_work(
    tmp_path: Path, vae: Path, latents: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "one.png").symlink_to(tmp_path / "missing" / "file")
    done: list[str] = []
    decode = Halves.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Halves, "decode", lambda *given: (done.append(""), decode(*given))[1])
        assert run("decode", latents, vae, out) == 2
    assert len(done) == 3
    assert names(out) == ["one.png", "three.png", "two-0001.png", "two-0002.png"]
    assert "one.png cannot be written" in capsys.readouterr().err


def test_nothing_that_is_given_is_empty(tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a variable is that is not set: it would be the folder at hand."""
    before = content(tmp_path)
    code = cli.main(["decode", "--vae", str(vae), "--latent", "", "--out", str(tmp_path / "out")])
    assert_refused(code, "the name is empty", capsys, tmp_path, before)


@pytest.mark.parametrize(("system", "same"), [("linux", False), ("darwin", True), ("win32", True)])
def test_names_that_differ_in_capitals_alone_are_one_where_the_system_has_it_so(
    tmp_path: Path, latents: list[Path], system: str, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    other = latents[0].rename(tmp_path / "other" / "ONE.latent")
    save_latent(latents[0], random_latent())
    given = [other, latents[0]]
    monkeypatch.setattr(sys, "platform", system)
    if same:
        with pytest.raises(ValueError, match="would both be"):
            Outputs(tmp_path / "out", given, [], ".png")
    else:
        outputs = Outputs(tmp_path / "out", given, [], ".png")
        found = [name for path in given for name in outputs.of(path)]
        assert found == [tmp_path / "out" / "ONE.png", tmp_path / "out" / "one.png"]


@pytest.mark.parametrize(("system", "same"), [("linux", False), ("darwin", True)])
def test_names_of_a_batch_that_differ_in_capitals_alone(
    tmp_path: Path, system: str, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [tmp_path / "two.latent", tmp_path / "TWO-0001.latent"]
    outputs = Outputs(tmp_path / "out", given, [], ".png")
    monkeypatch.setattr(sys, "platform", system)
    outputs.of(given[0], 2)
    if same:
        with pytest.raises(ValueError, match=r"TWO-0001\.png has been written for .*two\.latent"):
            outputs.of(given[1])
    else:
        assert outputs.of(given[1]) == [tmp_path / "out" / "TWO-0001.png"]


def test_a_name_is_printed_whatever_letters_there_are(
    tmp_path: Path, vae: Path, latents: list[Path], ready: Ready
) -> None:
    """What is not a terminal has the letters of one language on Windows."""
    latent = latents[0].rename(tmp_path / "写真.latent")
    argv = ["decode", "--vae", vae, "--latent", latent, "--out", tmp_path / "写真.png", "--device", "cpu"]
    done = ready.ended(argv, f"import sys\nsys.stdout.reconfigure(encoding='cp1252')\n{COMMAND_LINE}")
    assert done.returncode == 0, done.stderr
    assert "\\u5199\\u771f.png: 40x48, " in done.stdout
    assert pixels(tmp_path / "写真.png").shape == (48, 40, 3)


def test_names_of_a_batch_replace_no_other_result(
    tmp_path: Path, vae: Path, latents: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    clash = tmp_path / "two-0001.latent"
    save_latent(clash, random_latent())
    assert run("decode", [clash, latents[1]], vae, tmp_path / "out", "--overwrite") == 2
    assert names(tmp_path / "out") == ["two-0001.png"]
    assert "two-0001.png has been written for" in capsys.readouterr().err


@pytest.mark.parametrize("link", ["", "symbolic", "hard"])
@pytest.mark.parametrize("read", ["vae", "image"])
def test_an_output_that_is_an_input_is_refused(
    tmp_path: Path, vae: Path, images: list[Path], read: str, link: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = vae if read == "vae" else images[0].rename(tmp_path / "image.latent")
    image = path if read == "image" else images[0]
    out = path if not link else tmp_path / "out.latent"
    if link:
        (out.symlink_to if link == "symbolic" else out.hardlink_to)(path)
    before = content(tmp_path)
    assert_refused(run("encode", [image], vae, out), "an input", capsys, tmp_path, before)


def test_an_output_of_a_batch_that_is_an_input_is_refused(
    tmp_path: Path, latents: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    vae = write_vae(tmp_path / "two-0001.safetensors")
    (tmp_path / "two-0001.png").symlink_to(vae)
    before = content(tmp_path)
    code = run("decode", [latents[1]], vae, tmp_path / "two.png")
    assert_refused(code, "an input", capsys, tmp_path, before)


@pytest.mark.parametrize("name", ["image.png", "memory.png", "comparison.png"])
def test_the_demo_replaces_no_input(tmp_path: Path, vae: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).symlink_to(vae)
    before = content(tmp_path)
    code = cli.main(["demo", "--vae", str(vae), "--out", str(tmp_path), "--size", "64"])
    assert_refused(code, "an input", capsys, tmp_path, before)


def test_a_latent_with_nan_is_not_written(
    tmp_path: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    state = small_vae().state_dict()
    state["encoder.conv_in.bias"] += 3e38
    before = content(tmp_path)
    vae = write(tmp_path / "vae.safetensors", state)
    before[vae] = vae.read_bytes()
    assert_refused(run("encode", images[:1], vae, tmp_path / "out.latent"), "NaN", capsys, tmp_path, before)


FAULTS = {
    "full disk": "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))",
    "Ctrl-C": "os.kill(os.getpid(), signal.SIGINT)",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "termination": "os.kill(os.getpid(), signal.SIGTERM)",
}

FAULTY = """
import os, resource, signal, sys
from PIL import PngImagePlugin
from comfyui_patchconv import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
encode = PngImagePlugin.ImageFile._save
def half(image, file, *rest, **options):
    file.write(b"half" * 30)
    {fault}
    encode(image, file, *rest, **options)
PngImagePlugin.ImageFile._save = half
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    ("fault", "code"),
    [("full disk", 2), ("Ctrl-C", 130), ("kill", "SIGKILL"), ("termination", "SIGTERM")],
)
def test_what_ends_a_decode_early_leaves_the_old_image(
    tmp_path: Path, vae: Path, latents: list[Path], fault: str, code: int | str, ready: Ready
) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(OLD)
    before = content(tmp_path)
    argv = ["decode", "--vae", vae, "--latent", latents[0], "--out", out]
    done = ready.ended(argv, FAULTY.format(fault=FAULTS[fault]))
    assert done.returncode == (-signal.Signals[code] if isinstance(code, str) else code), done.stderr
    assert content(tmp_path) == before
    assert "Traceback" not in done.stderr


def test_no_empty_folder_is_left_for_temporary_files(
    tmp_path: Path, vae: Path, latents: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one removed that was there."""
    folder = tmp_path / "temporary"
    (folder / "torchinductor_before").mkdir(parents=True)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    argv = ["decode", "--vae", vae, "--latent", latents[0], "--out", tmp_path / "out.png", "--mode", "stream"]
    assert ended(["-m", "comfyui_patchconv.cli", *argv], TMPDIR=folder).returncode == 0
    assert names(folder) == ["torchinductor_before"]
