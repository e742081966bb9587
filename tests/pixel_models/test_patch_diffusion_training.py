"""What Patch Diffusion models are trained with, and the command line from images to a model to images."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conv_helpers import assert_same
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from training_helpers import words, write_images, write_keras

from comfyui_patchconv import cli
from comfyui_patchconv.files.images import grid, levels
from comfyui_patchconv.pixel_models.patch_diffusion import checkpoints
from comfyui_patchconv.pixel_models.patch_diffusion.checkpoints import load, save
from comfyui_patchconv.pixel_models.patch_diffusion.config import PUBLISHED, Config
from comfyui_patchconv.pixel_models.patch_diffusion.diffusion import signal_share
from comfyui_patchconv.pixel_models.patch_diffusion.loss import WEIGHTS, Loss
from comfyui_patchconv.pixel_models.patch_diffusion.model import PatchUNet

import_torch = partial(checkpoints.import_torch, trust=True)
"""On any torch: it is known who made these files."""
DATA = Path(__file__).parents[1] / "data"
CONFIG = Config(16, 4, 32, (1,), 1, head_channels=32)
CLASSES = Config(16, 4, 32, (1,), 1, classes=2, head_channels=32)
FLAGS = "--config lsun_p4 --image_size 16 --num_channels 32 --channel_mult 1 --num_head_channels 32 --num_res_blocks 1"


class Known(nn.Module):
    """Predicts what it is told to, and remembers what it was asked."""

    def __init__(self, clean: Tensor, place: float | None) -> None:
        super().__init__()
        self.clean, self.place = clean, place
        self.labels: list[Tensor | None] = []

    def forward(self, image: Tensor, steps: Tensor, labels: Tensor | None) -> Tensor:
        self.image = image
        self.labels.append(labels)
        if self.place is None:
            return self.clean
        return torch.cat([self.clean, torch.full_like(self.clean, self.place)], 1)


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("name", "at_quarter", "at_four"),
    [("sqrt_snr", 0.5, 2), ("p2", 0.25 / math.sqrt(1.25), 4 / math.sqrt(5)), ("snr", 0.25, 4), ("snr+1", 1.25, 5),
     ("truncated_snr", 1, 4)],
)  # fmt: skip
def test_weights_of_the_loss_follow_their_formulas(name: str, at_quarter: float, at_four: float) -> None:
    assert_same(WEIGHTS[name](torch.tensor([0.25, 4.0])), torch.tensor([at_quarter, at_four], dtype=torch.float32))
    steps = torch.tensor([3, 500, 999, 0])
    share = signal_share(0.02)[steps]
    config = Config(16, 4, 32, (1,), 1, head_channels=32, learn_sigma=False)
    found = Loss(config, name).at(Known(images() + 0.5, None), images(), None, steps, torch.zeros(4, 3, 16, 16))
    assert_same(found, 0.25 * WEIGHTS[name](share / (1 - share)).float())


def test_the_model_is_shown_the_image_in_noise() -> None:
    model, noise, steps = Known(images(), 1.0), torch.randn(4, 3, 16, 16), torch.tensor([0, 10, 500, 999])
    Loss(CONFIG).at(model, images(), None, steps, noise)
    share = signal_share(0.02)[steps].float().view(-1, 1, 1, 1)
    assert_same(model.image, share.sqrt() * images() + (1 - share).sqrt() * noise)


@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("error", [0.0, 0.05])
def test_the_variance_costs_the_divergence_of_the_two_normals(place: float, error: float) -> None:
    """Against torch.distributions, of the step's posterior as Ho et al. 2020 give it."""
    steps = torch.tensor([1, 30, 500, 999])
    noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = Known(images() + error, place)
    found = Loss(CONFIG).at(model, images(), None, steps, noise).double()
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    share = (1 - beta).cumprod(0)
    of = [part[steps].view(-1, 1, 1, 1) for part in (beta, share, torch.cat([torch.ones(1), share[:-1]]))]
    beta, now, before = of
    shown = now.sqrt() * images().double() + (1 - now).sqrt() * noise.double()

    def mean(clean: Tensor) -> Tensor:
        return (before.sqrt() * beta * clean.double() + (1 - beta).sqrt() * (1 - before) * shown) / (1 - now)

    smallest = beta * (1 - before) / (1 - now)
    variance = (place * smallest.log() + (1 - place) * beta.log()).exp()
    apart = kl_divergence(Normal(mean(images()), smallest.sqrt()), Normal(mean(model.clean), variance.sqrt()))
    bits = apart.flatten(1).mean(1) / math.log(2)
    squared = error**2 * (now / (1 - now)).sqrt().flatten()
    torch.testing.assert_close(found, squared + bits, atol=1e-7, rtol=1e-4)


def test_the_last_step_costs_the_likelihood_of_the_8_bit_image() -> None:
    levels = torch.randint(256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(2))
    levels[0, 0, 0, :2] = torch.tensor([0, 255])
    clean = levels / 127.5 - 1
    steps = torch.zeros(4, dtype=torch.long)
    found = Loss(CONFIG).at(Known(clean + 0.001, 1.0), clean, None, steps, torch.randn_like(clean))
    share = signal_share(0.02)
    smallest = (1 - share[1] / share[0]) * (1 - share[0]) / (1 - share[1])
    normal, exact = Normal((clean + 0.001).double(), smallest.sqrt()), clean.double()
    above = torch.where(levels == 255, 1.0, normal.cdf(exact + 1 / 255))
    below = torch.where(levels == 0, 0.0, normal.cdf(exact - 1 / 255))
    bits = -(above - below).log2().flatten(1).mean(1)
    squared = 1e-6 * (share[0] / (1 - share[0])).sqrt()
    assert_same(found, (bits + squared).float(), 1e-3)


def test_the_variance_does_not_teach_the_mean() -> None:
    clean = (images() + 0.1).requires_grad_()
    share = signal_share(0.02)[500]
    loss = Loss(CONFIG).at(Known(clean, 0.5), images(), None, torch.full((4,), 500), torch.zeros(4, 3, 16, 16))
    (gradient,) = torch.autograd.grad(loss.sum(), clean)
    assert_same(gradient, 2 * 0.1 * (share / (1 - share)).sqrt().float() / 768 * torch.ones_like(gradient), 1e-4)


def test_labels_are_dropped_at_random() -> None:
    given, model = torch.zeros(2000, dtype=torch.long), Known(torch.zeros(2000, 3, 16, 16), 1.0)
    pictures = torch.zeros(2000, 3, 16, 16)
    for drop in (0.0, 0.1, 1.0):
        torch.manual_seed(0)
        Loss(CLASSES, drop=drop)(model, pictures, given)
    shares = [float((labels == 2).float().mean()) for labels in model.labels if labels is not None]
    assert shares[0] == 0
    assert 0.08 < shares[1] < 0.12
    assert shares[2] == 1
    Loss(CONFIG)(model, pictures, given)
    assert model.labels[-1] is None


def test_parts_of_the_noise() -> None:
    """The published split: one model up to timestep 395, the other from 396 on."""
    assert Loss(PUBLISHED["imagenet"], part=0).steps.tolist() == list(range(396))
    assert Loss(PUBLISHED["imagenet"], part=1).steps.tolist() == list(range(396, 1000))
    assert Loss(PUBLISHED["ffhq"]).steps.tolist() == list(range(1000))
    with pytest.raises(ValueError, match="is 2 models: say which one, 0 to 1"):
        Loss(PUBLISHED["imagenet"])
    with pytest.raises(ValueError, match="part is 2 and this configuration is 2 models"):
        Loss(PUBLISHED["imagenet"], part=2)


# The command line


def run(*argv: object, code: int = 0) -> None:
    assert cli.main(["patch-diffusion", *map(str, argv)]) == code


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = PatchUNet(CLASSES)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.05)
    save([network], tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


FEW = ("--timesteps", "4", "--seed", "3")


def test_folder_grid_and_archive_hold_the_same_images(tmp_path: Path, model: Path) -> None:
    for action, name in (("folder", "images"), ("grid", "grid"), ("fid", "fid")):
        run("sample", "cpu", action, model, 5, tmp_path / name, *FEW, "--batch_size", 2)
    paths = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in paths] == [f"{number:06}.png" for number in range(5)]
    pictures = np.stack([np.asarray(Image.open(path)) for path in paths])
    with np.load(tmp_path / "fid.npz") as archive:
        assert np.array_equal(archive["arr_0"], pictures)
        assert set(archive["arr_1"].tolist()) <= {0, 1}
        assert len(archive["arr_1"]) == 5
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (34, 52, 3)
    assert np.array_equal(grid[18:34, 18:34], pictures[4])
    assert (grid[16:18] == 255).all()
    assert (grid[18:, 36:] == 255).all()


def test_options_change_the_images(tmp_path: Path, model: Path) -> None:
    variants: dict[str, tuple[object, ...]] = {
        "usual": FEW,
        "again": FEW,
        "seed": ("--timesteps", "4", "--seed", "4"),
        "ddim": (*FEW, "--ddim"),
        "guidance": (*FEW, "--guidance", "3"),
        "more": ("--timesteps", "5", "--seed", "3"),
        "zero": (*FEW, "--label", "0"),
        "one": (*FEW, "--label", "1"),
        "half": (*FEW, "--policy", "bf16"),
    }
    found: dict[str, Any] = {}
    for name, options in variants.items():
        run("sample", "cpu", "fid", model, 2, tmp_path / f"{name}.npz", *options)
        with np.load(tmp_path / f"{name}.npz") as archive:
            found[name] = archive["arr_0"].astype(int)
    assert np.array_equal(found["usual"], found["again"])
    assert not np.array_equal(found["zero"], found["one"])
    for name in ("seed", "ddim", "guidance", "more"):
        assert not np.array_equal(found["usual"], found[name]), name
    assert 0 < np.abs(found["usual"] - found["half"]).mean() < 3


def test_the_authors_files(tmp_path: Path) -> None:
    """As they are, and imported, with the flags that their configuration needs."""
    flags = words("--image_size 64 --num_channels 32 --channel_mult 1,1 --num_res_blocks 1 --num_head_channels 32")
    weights = DATA / "patch_diffusion_uncond_p4.pt"
    run("import", "church_p4", tmp_path / "ours.safetensors", "--model_path", weights, *flags)
    (imported,) = load(tmp_path / "ours.safetensors")
    assert (imported.config.patch, imported.config.image_size, imported.config.mults) == (4, 64, (1, 1))
    run("sample", "cpu", "grid", tmp_path / "ours.safetensors", 1, tmp_path / "a.png", *FEW)
    run("sample", "cpu", "grid", "lsun_p4", 1, tmp_path / "b.png", *FEW, "--model_path", weights, *flags)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_tensorflow_versions_file(tmp_path: Path) -> None:
    """Written as Keras does it, with the weights of the port's file: the same images."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install h5py")
    config = Config(64, 4, 32, (1, 1), 1, head_channels=32)
    write_keras(h5py, tmp_path / "ema_weights.h5", import_torch(DATA / "patch_diffusion_uncond_p4.pt", config))
    flags = words("--image_size 64 --num_channels 32 --channel_mult 1,1 --num_res_blocks 1 --num_head_channels 32")
    for name, weights in (("a", DATA / "patch_diffusion_uncond_p4.pt"), ("b", tmp_path / "ema_weights.h5")):
        run("import", "church_p4", tmp_path / f"{name}.safetensors", "--model_path", weights, *flags)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_imports_that_cannot_be_are_refused_in_a_sentence(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, weights, says in (
        (tmp_path / "out.pt", model, "must end in .safetensors"),
        (tmp_path / "missing" / "out.safetensors", model, "does not exist"),
        (tmp_path / "out.safetensors", tmp_path / "none.h5", "none.h5 does not exist"),
    ):
        run("import", "ffhq", out, "--model_path", weights, code=2)
        assert says in capsys.readouterr().err


def test_the_authors_stride(tmp_path: Path, model: Path) -> None:
    """`--modified_stride` is 250 steps, most of them where there is little noise."""
    for name, options in (
        ("modified", ("--timesteps", "250", "--modified_stride", "True")),
        ("bare", ("--modified_stride",)),
        ("sections", ("--timesteps", "90,60,60,20,20")),
    ):
        run("sample", "cpu", "grid", model, 1, tmp_path / f"{name}.png", *options, "--seed", 3)
    modified, bare, sections = ((tmp_path / f"{name}.png").read_bytes() for name in ("modified", "bare", "sections"))
    assert modified == bare == sections


def test_half_precision_that_is_too_narrow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = PatchUNet(CONFIG)
    next(network.out.parameters()).data.fill_(6e4)
    save([network], tmp_path / "large.safetensors")
    run("sample", "cpu", "fid", tmp_path / "large.safetensors", 1, tmp_path / "out", *FEW, "--policy", "fp16", code=2)
    assert "--policy is fp16 and gives NaN for an image: use bf16 or fp32" in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("cpu grid ffhq 2 out", "weights that the authors published for ffhq are lost"),
        ("cpu grid MODEL 0 out", "no image to sample"),
        ("cpu grid MODEL 2 missing/out", "missing does not exist"),
        ("cpu grid MODEL 2 out --timesteps 2000", "2000 steps of a section of 1000"),
        ("cpu grid MODEL 2 out --timesteps many", "steps is 'many'"),
        ("cpu grid MODEL 2 out --label 2", "--label is 2 and the model has 2 classes"),
        ("cpu grid MODEL 2 out --guidance nan", "'nan' is not a number"),
        ("cpu grid MODEL 2 out --seed 18446744073709551616", "use a seed below 2^64"),
        ("cpu grid MODEL 2 . --seed 1", "SAVE_PATH is ., which is a folder"),
        ("cpu fid MODEL 2 images --seed 1", "images.npz, which is a folder: give the name of a file"),
        ("cpu folder MODEL 2 MODEL", "which is a file: give the name of a folder"),
        ("cpu grid ffhq 2 out --model_path missing.pt", "missing.pt does not exist"),
        ("cpu grid ffhq 2 out --model_path MODEL --num_channels 32", "leave out the model's options"),
        ("cpu grid ffhq 2 out --model_path WEIGHTS", "is not a model of this configuration"),
        ("cpu grid WEIGHTS 2 out", "does not say what model it is: name its configuration"),
        ("cpu grid ffhq 2 out --model_path WEIGHTS --channel_mult 1,x", "'x' is not a number"),
        ("cpu grid ffhq 2 out --model_path WEIGHTS --attention_resolutions 8.5", "'8.5' is not a whole number"),
        ("cpu grid ffhq 2 out --model_path WEIGHTS --noise_schedule cosine", "'cosine' is not linear"),
        ("cpu grid ffhq 2 out --model_path WEIGHTS --noise_schedule linear7", "beta_max is 7.0"),
        ("cpu grid ffhq 2 out --model_path WEIGHTS --image_size 30", "patch is 4: use a divisor"),
        ("cpu grid MODEL 2 out --num_channels 32", "leave out --model_path and the model's options"),
        ("cpu grid nothing 2 out", "nothing does not exist"),
        ("xpu7 grid MODEL 2 out", "'xpu7' cannot be used here"),
        ("cpu video MODEL 2 out", "invalid choice: 'video'"),
        ("cpu grid MODEL two out", "'two' is not a whole number"),
        ("cpu grid MODEL 2 out --modified_stride yes", "'yes' is not True or False"),
    ],
)
def test_wrong_input_is_one_sentence(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images.npz").mkdir()
    weights = str(DATA / "patch_diffusion_uncond_p4.pt")
    run("sample", *given.replace("MODEL", str(model)).replace("WEIGHTS", weights).split(), code=2)
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_training_stops_goes_on_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path / "images", size=(20, 24))
    out = tmp_path / "out"
    common = (
        folder,
        "--out",
        out,
        *FLAGS.split(),
        *words("--batch_size 2 --save_every 2 --samples 2 --workers 0"),
    )
    run("train", *common, "--steps", 3, "--class_cond")
    said = capsys.readouterr().out
    assert "5 images, classes one, two" in said
    (trained,) = load(out / "model.safetensors")
    assert trained.config == CLASSES
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "training.pt", "loss.csv", "samples-00000002.png", "samples-00000003.png"
    }  # fmt: skip
    run("train", *common, "--steps", 5, "--class_cond")
    assert "going on from step 3" in capsys.readouterr().out
    with (out / "loss.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "3", "4", "5"]
    assert "step 3 of 3: loss " in said
    run("train", *common, "--steps", 5, code=2)
    assert "holds the training of another configuration" in capsys.readouterr().err
    table = (out / "loss.csv").read_bytes()
    for other in (b"epoch,loss\n1,2\n", b"step,loss\n1\n", b"\xff"):
        (out / "loss.csv").write_bytes(other)
        run("train", *common, "--steps", 6, "--class_cond", code=2)
        assert "loss.csv is no table of steps and losses" in capsys.readouterr().err
    (out / "loss.csv").write_bytes(table)
    held = torch.load(out / "training.pt", weights_only=True)
    for other, said in (
        ({"config": held["config"]}, "training.pt cannot be gone on from"),
        ({**held, "step": []}, "training.pt cannot be gone on from"),
        ({**held, "config": 5}, "training.pt: the configuration is not a JSON object"),
        ({"step": 3}, "training.pt is no training of a Patch Diffusion model"),
    ):
        torch.save(other, out / "training.pt")
        run("train", *common, "--steps", 5, "--class_cond", code=2)
        assert said in capsys.readouterr().err
    (out / "training.pt").write_bytes(b"damaged")
    run("train", *common, "--steps", 5, "--class_cond", code=2)
    assert "training.pt is damaged, or not in the form of torch.save" in capsys.readouterr().err
    run("sample", "cpu", "grid", out / "model.safetensors", 1, tmp_path / "sampled.png", *FEW)
    assert Image.open(tmp_path / "sampled.png").size == (16, 16)


def test_training_of_one_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two models, and sampling with both."""
    folder, few = (
        write_images(tmp_path / "images"),
        words("--steps 1 --batch_size 2 --workers 0 --snr_splits 0.25"),
    )
    run("train", folder, "--out", tmp_path / "x", *FLAGS.split(), *few, code=2)
    assert "is 2 models: say which one" in capsys.readouterr().err
    for part in ("0", "1"):
        run("train", folder, "--out", tmp_path / part, *FLAGS.split(), *few, "--part", part)
    both = ",".join(str(tmp_path / part / "model.safetensors") for part in ("0", "1"))
    run("import", "lsun_p4", tmp_path / "both.safetensors", "--model_path", both)
    assert len(load(tmp_path / "both.safetensors")) == 2
    run("sample", "cpu", "grid", tmp_path / "both.safetensors", 1, tmp_path / "grid.png", *FEW)


def test_training_that_cannot_be_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, says in (
        ((tmp_path / "none", "--out", tmp_path / "out"), "holds no image"),
        ((write_images(tmp_path / "images"), "--out", tmp_path / "out", "--steps", 0), "steps is 0"),
        ((tmp_path / "images", "--out", tmp_path / "out", "--image_size", 30), "patch is 4: use a divisor"),
        ((tmp_path / "images", "--out", tmp_path / "out", "--classes", 2), "--class_cond is not given to find the cl"),
        (
            (tmp_path / "images", "--out", tmp_path / "out", "--class_cond", "--classes", 1),
            f"--class_cond finds the classes in {tmp_path / 'images'}, 2: leave out --classes",
        ),
        ((tmp_path / "images", "--out", tmp_path / "out", "--label_dropout", 2), "share of labels to drop is 2.0"),
        ((tmp_path / "images", "--out", tmp_path / "out", "--beta2", 1), "betas of Adam are (0.9, 1.0)"),
    ):
        run("train", *given, code=2)
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_grids_and_levels() -> None:
    for count, shape in ((1, (4, 4)), (2, (4, 10)), (3, (10, 10)), (5, (10, 16))):
        together = grid(-torch.ones(count, 1, 4, 4))
        assert together.shape == (1, *shape)
        assert int((together == -1).sum()) == count * 16
    assert levels(torch.tensor([-2.0, -1, 0, 1, 2]).view(1, 1, 5)).tolist() == [[0, 0, 128, 255, 255]]
    assert levels(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
