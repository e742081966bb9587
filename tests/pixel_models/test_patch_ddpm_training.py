"""Training of patch-based DDPMs, and the command line from images to a model to images, in one process and several."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from processes import Ready, ended
from training_helpers import write_images

from comfyui_patchconv import cli
from comfyui_patchconv.pixel_models.patch_ddpm.checkpoints import load, save
from comfyui_patchconv.pixel_models.patch_ddpm.config import DiffusionConfig, ModelConfig
from comfyui_patchconv.pixel_models.patch_ddpm.model import PatchDenoiser
from comfyui_patchconv.pixel_models.training.loop import read_losses

DATA = Path(__file__).parents[1] / "data"
CHECKPOINT = DATA / "patch_ddpm.pt"
SMALL: dict[str, Any] = {
    "dim": 8, "dim_mults": [1, 2], "resnet_block_groups": 4, "patch_divider": 2, "image_size": 16
}  # fmt: skip
TRAINER: dict[str, Any] = {
    "train_batch_size": 2, "train_num_steps": 3, "save_and_sample_every": 2, "num_workers": 0, "step_start_ema": 1,
    "update_ema_every": 1, "ema_decay": 0.5,
}  # fmt: skip


def run(*argv: object, code: int = 0) -> None:
    assert cli.main(["patch-ddpm", *map(str, argv)]) == code


Write = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """A configuration's file, for images that are there; `log` is its folder."""
    write_images(tmp_path / "images", size=(16, 16))

    def write(log: str = "log", model: Any = (), diffusion: Any = (), **trainer: Any) -> Path:
        whole = TRAINER | {"train_dataset_dir": str(tmp_path / "images"), "log_dir": str(tmp_path / log)} | trainer
        sections = {"model": SMALL | dict(model), "diffusion": {"timesteps": 4} | dict(diffusion), "trainer": whole}
        path = tmp_path / f"{log}.json"
        path.write_text(json.dumps(sections))
        return path

    return write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file of random weights."""
    torch.manual_seed(0)
    config = ModelConfig(8, dim_mults=(1, 2), resnet_block_groups=4, patch_divider=3, image_size=(12, 24))
    denoiser = PatchDenoiser(config)
    for parameter in denoiser.parameters():
        parameter.data.normal_(std=0.1)
    save(denoiser, DiffusionConfig(10), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Of every part of a training's checkpoint, by names with dots."""
    found: dict[str, torch.Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{name}.{key}")

    walk(torch.load(path, weights_only=True), "")
    return found


def assert_same_log(one: Path, other: Path) -> None:
    """Two trainings' folders, bit for bit."""
    names = [sorted(str(path.relative_to(log)) for path in log.rglob("*")) for log in (one, other)]
    assert names[0] == names[1]
    for path in sorted(one.rglob("*.*")):
        twin = other / path.relative_to(one)
        if path.suffix == ".pt":  # pickles: not their bytes, but what they hold
            ours, theirs = tensors(path), tensors(twin)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), path.name
        else:
            assert path.read_bytes() == twin.read_bytes(), path.name


# Sampling


def test_sampling_writes_the_images_that_the_sampler_makes(tmp_path: Path, model: Path) -> None:
    """The seed system's options and names; no training images, no wandb."""
    variants: dict[str, tuple[object, ...]] = {
        "usual": ("--seed", 3),
        "again": ("--seed", 3),
        "patch": ("--seed", 3, "--patches-at-once", 1),
        "seed": ("--seed", 4),
        "steps": ("--seed", 3, "--steps", 5),
        "ddim": ("--seed", 3, "--sampler", "ddim"),
        "dpm++": ("--seed", 3, "--sampler", "dpm++"),
        "half": ("--seed", 3, "--dtype", "bfloat16"),
    }
    found: dict[str, Any] = {}
    for name, options in variants.items():
        out = tmp_path / name / "deeper"
        run("sample", "--ckpt", model, "--out-dir", out, "--n-samples", 3, "--batch-size", 2, *options)
        paths = sorted(out.iterdir())
        assert [path.name for path in paths] == [f"sample-{number:08}.png" for number in range(3)]
        found[name] = np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])
        assert found[name].shape == (3, 12, 24, 3)
    usual = found["usual"]
    assert np.array_equal(usual, found["again"])
    assert np.abs(usual - found["patch"]).max() <= 1
    for name in ("seed", "steps", "ddim", "dpm++"):
        assert not np.array_equal(usual, found[name]), name
    assert 0 < np.abs(usual - found["half"]).mean() < 8


def test_sampling_draws_another_seed_each_time(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        run("sample", "--ckpt", model, "--out-dir", tmp_path / name, "--n-samples", 1, "--steps", 2)
    said = capsys.readouterr().out
    assert (tmp_path / "one" / "sample-00000000.png").read_bytes() != (
        tmp_path / "two" / "sample-00000000.png"
    ).read_bytes()
    seed = said.splitlines()[0].rpartition(" ")[2]
    again = ("--out-dir", tmp_path / "again", "--n-samples", 1, "--steps", 2, "--seed", seed)
    run("sample", "--ckpt", model, *again)
    assert (tmp_path / "one" / "sample-00000000.png").read_bytes() == (
        tmp_path / "again" / "sample-00000000.png"
    ).read_bytes()


def test_the_authors_checkpoint_is_sampled_and_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is, with the configuration of its training, whose folders are not there; and imported."""
    given = ("--config", DATA / "patch_ddpm.json", "--ckpt", CHECKPOINT)
    few = ("--n-samples", 1, "--seed", 1)
    run("sample", *given, *few, "--out-dir", tmp_path / "theirs")
    run("import", *given, "--out", tmp_path / "ours.safetensors")
    assert "divider 2" in capsys.readouterr().out
    run("sample", "--ckpt", tmp_path / "ours.safetensors", *few, "--out-dir", tmp_path / "ours")
    theirs, ours = ((tmp_path / name / "sample-00000000.png").read_bytes() for name in ("theirs", "ours"))
    assert theirs == ours


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("sample --ckpt none.pt --out-dir OUT", "none.pt does not exist"),
        ("sample --ckpt MODEL --out-dir OUT --n-samples 0", "no image to sample"),
        ("sample --ckpt MODEL --out-dir OUT --batch-size 0", "no image to sample"),
        ("sample --ckpt MODEL --out-dir OUT --steps 0", "--steps is 0: use 1 to 10"),
        ("sample --ckpt MODEL --out-dir OUT --steps 11", "--steps is 11: use 1 to 10"),
        ("sample --ckpt MODEL --out-dir OUT --sampler euler", "invalid choice: 'euler'"),
        ("sample --ckpt MODEL --out-dir OUT --seed many", "'many' is not a whole number"),
        (f"sample --ckpt MODEL --out-dir OUT --steps {'9' * 21}", "99999999999999999999… is too large: use at most 20"),
        ("sample --ckpt MODEL --out-dir OUT --n-samples 100000001", "--n-samples is 100000001: use 100000000 or less"),
        ("sample --ckpt MODEL --out-dir OUT --device xpu7", "'xpu7' cannot be used here"),
        ("sample --ckpt MODEL --config AUTHORS --out-dir OUT", "another configuration than the one given: model.dim, "),
        ("sample --ckpt AUTHORS --out-dir OUT", "since torch 1.6, which alone is read safely"),
        ("import --ckpt MODEL --config none.json --out OUT.st", "none.json does not exist"),
        ("import --ckpt MODEL --out OUT.pt", "its name must end in .safetensors"),
        ("train", "the following arguments are required: --config"),
        ("train --config MODEL", "is no text: give the configuration's JSON file"),
    ],
)
def test_wrong_input_is_one_sentence(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], given: str, says: str
) -> None:
    names = {"MODEL": str(model), "AUTHORS": str(DATA / "patch_ddpm.json"), "OUT": str(tmp_path / "out")}
    names["OUT.pt"], names["OUT.st"] = str(tmp_path / "out.pt"), str(tmp_path / "out.safetensors")
    run(*(names.get(word, word) for word in given.split()), code=2)
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


# Training


def test_training_writes_its_files_and_goes_on(
    tmp_path: Path, written: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", "--config", written())
    assert "5 images" in capsys.readouterr().out
    log = tmp_path / "log"
    assert {str(path.relative_to(log)) for path in log.rglob("*.*")} == {
        "checkpoints/model-2.pt", "checkpoints/model-3.pt", "checkpoints/model-last.pt",
        "checkpoints/model-last.safetensors", "samples/00000002.png", "samples/00000003.png", "loss.csv",
    }  # fmt: skip
    assert Image.open(log / "samples" / "00000003.png").size == (4 * 16 + 3 * 2,) * 2
    trained, diffusion = load(log / "checkpoints" / "model-last.safetensors")
    assert trained.config.image_sides == (16, 16)
    assert diffusion.timesteps == 4
    run("train", "--config", written(train_num_steps=5))
    assert "going on from step 3" in capsys.readouterr().out
    assert [step for step, _ in read_losses(log / "loss.csv")] == [2, 3, 4, 5]
    for name in ("model-5.pt", "model-last.safetensors"):
        out = tmp_path / name
        run("sample", "--ckpt", log / "checkpoints" / name, "--out-dir", out, "--n-samples", 1, "--seed", 0)
    one, other = (tmp_path / name / "sample-00000000.png" for name in ("model-5.pt", "model-last.safetensors"))
    assert one.read_bytes() == other.read_bytes()


def test_what_a_training_is_given_counts(tmp_path: Path, written: Write) -> None:
    """Each value of the configuration that is to change the weights, changes them."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    changes: dict[str, dict[str, Any]] = {
        "usual": {},
        "again": {},
        "seed": {"seed": 1},
        "rate": {"train_lr": 1e-3},
        "batch": {"train_batch_size": 3},
        "accumulate": {"gradient_accumulate_every": 2},
        "loss": {"diffusion": {"loss_type": "l2"}},
        "objective": {"diffusion": {"objective": "pred_x0"}},
        "decay": {"ema_decay": 0.9},
        "start": {"step_start_ema": 3},
        "every": {"update_ema_every": 2},
    }
    for name, change in changes.items():
        run("train", "--config", written(name, save_and_sample_every=3, **change))
        found[name] = tensors(tmp_path / name / "checkpoints" / "model-last.pt")

    def same(name: str, part: str) -> bool:
        pairs = ((value, found["usual"][key]) for key, value in found[name].items() if key.startswith(f".{part}."))
        return all(torch.equal(one, other) for one, other in pairs)

    assert same("again", "model")
    assert same("again", "ema")
    for name in ("seed", "rate", "batch", "accumulate", "loss", "objective"):
        assert not same(name, "model"), name
    for name in ("decay", "start", "every"):
        assert same(name, "model"), name
        assert not same(name, "ema"), name


def test_mixed_precision_trains(tmp_path: Path, written: Write) -> None:
    """A little other weights, which stay float32."""
    run("train", "--config", written("full"))
    AcceleratorState._reset_state(True)  # one for each process, and for each precision another
    run("train", "--config", written("mixed", use_amp=True))
    AcceleratorState._reset_state(True)
    full, mixed = (tensors(tmp_path / log / "checkpoints" / "model-last.pt") for log in ("full", "mixed"))
    weights = [name for name in full if ".denoise_fn." in name]
    assert {mixed[name].dtype for name in weights} == {torch.float32}
    assert 0 < max(float((mixed[name] - full[name]).abs().max()) for name in weights) < 1e-3


def test_training_goes_on_from_a_step(tmp_path: Path, written: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """From any that was saved, or from the beginning; where it stands is then what a later call goes on from."""
    config = written(train_num_steps=6)
    run("train", "--config", config)
    shutil.copytree(tmp_path / "log", tmp_path / "first")
    run("train", "--config", config, "--restart-step", 2)
    assert "going on from step 2" in capsys.readouterr().out
    assert_same_log(tmp_path / "log", tmp_path / "first")
    run("train", "--config", config, "--restart-step", 1)
    assert "going on" not in capsys.readouterr().out
    assert_same_log(tmp_path / "log", tmp_path / "first")
    run("train", "--config", config, "--restart-step", 3, code=2)
    assert "model-3.pt: go on from a step that was saved, or from 1" in capsys.readouterr().err


@pytest.mark.parametrize(("restart", "step"), [(1, None), (2, 2)])
def test_a_restart_that_is_killed_at_once_is_no_return_to_the_old_end(
    tmp_path: Path, written: Write, monkeypatch: pytest.MonkeyPatch, restart: int, step: Any
) -> None:
    config = written(train_num_steps=4)
    run("train", "--config", config)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("comfyui_patchconv.pixel_models.training.loop.Training.run", killed)
    run("train", "--config", config, "--restart-step", restart, code=130)
    last = tmp_path / "log" / "checkpoints" / "model-last.pt"
    assert (torch.load(last, weights_only=True)["step"] if last.exists() else None) == step


def test_a_training_of_theirs_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], written: Write) -> None:
    """From a checkpoint of the authors' code. Ours is to its trainer what its own is: the same names, types, shapes,
    and weights in the optimizer."""
    folder = tmp_path / "log" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copyfile(CHECKPOINT, folder / "model-last.pt")
    sections = json.loads((DATA / "patch_ddpm.json").read_text())
    config = written(model=sections["model"] | {"resnet_block_groups": 8}, diffusion={"timesteps": 20},
                     train_num_steps=1236, train_lr=1e-6)  # fmt: skip
    run("train", "--config", config)
    assert "going on from step 1234" in capsys.readouterr().out
    theirs, ours = (torch.load(path, weights_only=True) for path in (CHECKPOINT, folder / "model-last.pt"))
    assert ours.keys() == {*theirs, "config"}
    assert type(ours["step"]) is type(theirs["step"])
    assert ours["scaler"] is theirs["scaler"] is None
    for part in ("model", "ema"):
        assert [*ours[part]] == [*theirs[part]]
        for name, value in theirs[part].items():
            assert (ours[part][name].shape, ours[part][name].dtype) == (value.shape, value.dtype)
            torch.testing.assert_close(ours[part][name], value, atol=1e-5, rtol=0)
    (our_group,), (their_group,) = ours["opt"]["param_groups"], theirs["opt"]["param_groups"]
    assert our_group | {"lr": 0} == their_group | {"lr": 0}


def test_a_training_of_another_configuration_is_refused(
    tmp_path: Path, written: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", "--config", written())
    run("train", "--config", written(model={"dim": 12}), code=2)
    assert "another configuration: model.dim, 8 and 12. Give another log_dir" in capsys.readouterr().err
    shutil.copyfile(CHECKPOINT, tmp_path / "log" / "checkpoints" / "model-last.pt")
    run("train", "--config", written(), code=2)
    assert "another configuration: Error(s) in loading state_dict" in capsys.readouterr().err
    last = tmp_path / "log" / "checkpoints" / "model-last.pt"
    for config, said in ((5, "model-last.pt: the configuration is not a JSON object"), ("[" * 100_000, "is not JSON")):
        torch.save({"config": config}, last)
        run("train", "--config", written(), code=2)
        assert said in capsys.readouterr().err
    last.write_bytes(b"damaged")
    run("train", "--config", written(), code=2)
    assert "model-last.pt is damaged, or not in the form of torch.save" in capsys.readouterr().err


def test_a_training_that_cannot_be_is_refused(
    tmp_path: Path, written: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(train_dataset_dir=str(tmp_path / "none"))
    for path, says in ((config, "none holds no image"), (DATA / "without.json", "without.json does not exist")):
        run("train", "--config", path, code=2)
        assert says in capsys.readouterr().err
    config.write_text(json.dumps({"model": SMALL}))
    run("train", "--config", config, code=2)
    assert "the configuration has no trainer: add one, with train_dataset_dir and log_dir" in capsys.readouterr().err
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_grey_and_transparent_images_are_trained_with(tmp_path: Path, written: Write, channels: int, mode: str) -> None:
    """From files of any kind, to files of the model's."""
    images = tmp_path / "mixed"
    images.mkdir()
    for kind in ("L", "RGB", "RGBA", "P"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 16, 4), np.uint8)).convert(kind).save(
            images / f"{kind}.png"
        )
    run("train", "--config", written(model={"channels": channels}, train_dataset_dir=str(images)))
    log = tmp_path / "log"
    assert Image.open(log / "samples" / "00000003.png").mode == mode
    run("sample", "--ckpt", log / "checkpoints" / "model-last.safetensors", "--out-dir", tmp_path, "--n-samples", 1)
    assert Image.open(tmp_path / "sample-00000000.png").mode == mode


def test_images_that_are_not_square_are_trained_with(tmp_path: Path, written: Write) -> None:
    run("train", "--config", written(model={"image_size": [12, 24], "patch_divider": 3}))
    assert Image.open(tmp_path / "log" / "samples" / "00000003.png").size == (4 * 24 + 6, 4 * 12 + 6)


# Weights & Biases


def test_wandb_is_not_even_imported(tmp_path: Path, written: Write) -> None:
    """One that fails when it is imported does no harm, neither to training nor to sampling."""
    (tmp_path / "wandb.py").write_text("raise RuntimeError('imported')")
    out = tmp_path / "out"
    checkpoint = tmp_path / "log" / "checkpoints" / "model-last.pt"
    commands = [
        ["patch-ddpm", "train", "--config", str(written())],
        ["patch-ddpm", "sample", "--ckpt", str(checkpoint), "--out-dir", str(out), "--n-samples", "1"],
    ]
    code = f"import sys; from comfyui_patchconv import cli; sys.exit(any(map(cli.main, {commands})))"
    process(["-c", code], PYTHONPATH=tmp_path)
    assert (out / "sample-00000000.png").exists()


def test_wandb_that_is_missing_is_named(
    tmp_path: Path, written: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("comfyui_patchconv.pixel_models.patch_ddpm.train.find_spec", lambda name: None)
    run("train", "--config", written(wandb_enabled=True), code=2)
    assert "wandb is missing: run pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "log").exists()


def test_wandb_that_is_there_is_told(tmp_path: Path, written: Write) -> None:
    """Without an account: what would be sent is written to the training's folder."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    config = written(wandb_enabled=True, wandb_project="project", wandb_name="name")
    command = ["-m", "comfyui_patchconv.cli", "patch-ddpm", "train", "--config", config]
    process(command, WANDB_MODE="offline")
    (record,) = (tmp_path / "log" / "wandb").glob("offline-run-*/run-*.wandb")
    sent = record.read_bytes()
    assert b"project" in sent
    assert b"loss" in sent
    assert b"patch_divider" in sent
    assert len([*record.parent.glob("files/media/images/sample_*.png")]) == 2


# Whole processes


def process(command: list[Any], **more: Any) -> None:
    done = ended(command, **more)
    assert done.returncode == 0, done.stderr[-3000:]


def launch(*words: object) -> None:
    """`accelerate launch` on two devices, which are processes of the CPU here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = ["--cpu", "--num_processes", 2, "--main_process_port", port]
    start = ["-m", "accelerate.commands.launch", *two, "-m", "comfyui_patchconv.cli", "patch-ddpm"]
    process([*start, *words])


@pytest.mark.slow  # test_training.py has two processes train
def test_several_devices_sample_as_one_and_go_on_bit_for_bit(tmp_path: Path, written: Write, model: Path) -> None:
    """Sampling gives the same files as one device. Training shares a step's images, and goes on bit for bit."""
    few = ("--n-samples", 5, "--batch-size", 2)
    launch("sample", "--ckpt", model, "--out-dir", tmp_path / "two", *few, "--seed", 3)
    run("sample", "--ckpt", model, "--out-dir", tmp_path / "one", *few, "--seed", 3)
    assert_same_log(tmp_path / "two", tmp_path / "one")
    launch("sample", "--ckpt", model, "--out-dir", tmp_path / "drawn", *few)
    assert len([*(tmp_path / "drawn").iterdir()]) == 5
    launch("train", "--config", written("whole", train_batch_size=4, train_num_steps=5))
    launch("train", "--config", written("parts", train_batch_size=4, train_num_steps=2))
    launch("train", "--config", written("parts", train_batch_size=4, train_num_steps=5))
    assert_same_log(tmp_path / "whole", tmp_path / "parts")
    assert [step for step, _ in read_losses(tmp_path / "whole" / "loss.csv")] == [2, 4, 5]


def test_a_batch_that_the_devices_cannot_share_is_refused(
    tmp_path: Path, written: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 3)
    run("train", "--config", written(), code=2)
    assert "train_batch_size is 2 and 3 processes share it: use a multiple" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path: Path, written: Write, ready: Ready) -> None:
    """kill -9, again and again, from the first file on; what is there in the end is what an uninterrupted one wrote."""
    options: dict[str, Any] = {"train_num_steps": 36, "save_and_sample_every": 3}
    start = ["patch-ddpm", "train", "--config"]
    assert ready.ended([*start, written("whole", **options)]).returncode == 0
    chance, log, kills = random.Random(0), tmp_path / "killed", []
    config = written("killed", **options)
    for _ in range(5):
        before = len([*log.rglob("*")])
        going = ready.start([*start, config])
        try:
            while len([*log.rglob("*")]) <= before and not going.has_ended():
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.4))
        finally:
            going.kill()
            code = going.wait().returncode
        kills.append(sorted(path.name for path in log.rglob("*") if path.is_file())[-3:])
        if code == 0:
            break
    print(kills)
    assert code == -signal.SIGKILL  # it was not done before
    assert ready.ended([*start, config]).returncode == 0
    for left in log.rglob(".*.part"):  # half a file of the last kill; the next of its name takes its place
        left.unlink()
    assert_same_log(tmp_path / "whole", log)
