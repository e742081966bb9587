"""The training loop: images as they are on the disk, an order that steps alone decide, and resuming bit for bit."""

from __future__ import annotations

import copy
import itertools
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Ready, ended
from torch import Tensor, nn
from training_helpers import words, write_images

from comfyui_patchconv.pixel_models.training.images import Batches, ImageFolder, derived_seed
from comfyui_patchconv.pixel_models.training.loop import Options, Training, add_losses, begin, read_losses

OPTIONS = Options(steps=7, batch=2, accumulate=2, learning_rate=0.01, warm_up=3, ema_every=1, every=3)


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    return ImageFolder(write_images(tmp_path / "images"), (8, 8))


# Images


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("kind", ["L", "RGB", "RGBA", "P", "I;16", "LA"])
def test_any_image_is_read_in_any_number_of_channels(tmp_path: Path, channels: int, mode: str, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 4), dtype=np.uint8)
    whole = Image.fromarray(pixels)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16))
    (deep if kind == "I;16" else whole.convert(kind)).save(tmp_path / "image.png")
    image, label = ImageFolder(tmp_path, (6, 4), channels)[0, False]
    assert (image.shape, image.dtype, label) == ((channels, 6, 4), torch.float32, 0)
    assert 0 <= float(image.min()) < float(image.max()) <= 1


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "image.png")
    assert torch.equal(ImageFolder(tmp_path, (4, 4), 3)[0, False][0], torch.ones(3, 4, 4))
    assert torch.equal(ImageFolder(tmp_path, (4, 4), 4)[0, False][0][3], torch.zeros(4, 4))


def test_16_bits_of_grey_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x4040, dtype=np.uint16)).save(tmp_path / "image.png")
    assert torch.equal(ImageFolder(tmp_path, (4, 4), 3)[0, False][0], torch.full((3, 4, 4), 0x40 / 255))


def test_the_middle_is_taken_and_mirrored(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    folder = ImageFolder(tmp_path, (4, 4))
    image, mirrored = folder[0, False][0], folder[0, True][0]
    assert torch.equal(image[:, :, 0], torch.ones(3, 4))
    assert not image[:, :, 1:].any()
    assert torch.equal(mirrored, image.flip(-1))


@pytest.mark.parametrize("place", ["images", "images/out", "images/../images/a/b"])
def test_a_training_does_not_write_among_its_images(tmp_path: Path, place: str) -> None:
    folder = write_images(tmp_path / "images")
    with pytest.raises(ValueError, match="be trained on: choose a folder outside"):
        ImageFolder(folder, (8, 8), written=tmp_path / place)
    assert len(ImageFolder(folder, (8, 8), written=tmp_path / "images of the training"))


def test_classes_are_the_first_folders(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    found = ImageFolder(folder, (8, 8), labelled=True)
    assert found.classes == ["one", "two"]
    assert [found[number, False][1] for number in range(5)] == [0, 0, 1, 1, 1]
    Image.new("RGB", (8, 8)).save(folder / "loose.png")
    with pytest.raises(ValueError, match="lie in no folder of a class"):
        ImageFolder(folder, (8, 8), labelled=True)
    with pytest.raises(ValueError, match="holds no image"):
        ImageFolder(tmp_path / "nothing", (8, 8))


# The order


def items(count: int, **options: Any) -> list[list[tuple[int, bool]]]:
    return list(itertools.islice(iter(Batches(5, 2, 0, **options)), count))


def test_every_image_once_an_epoch() -> None:
    numbers = [number for batch in items(10) for number, _ in batch]
    assert all(sorted(numbers[start : start + 5]) == [0, 1, 2, 3, 4] for start in (0, 5, 10, 15))
    assert numbers[:5] != numbers[5:10]


def test_a_step_has_the_same_images_wherever_one_begins() -> None:
    assert items(10, first=4) == items(14)[4:]


def test_processes_share_the_order() -> None:
    together = [item for batch in items(8) for item in batch]
    parts = zip(items(4, part=0, parts=2), items(4, part=1, parts=2))
    assert [item for pair in parts for batch in pair for item in batch] == together


def test_half_of_the_images_are_mirrored() -> None:
    mirrored = [side for batch in items(200) for _, side in batch]
    assert 0.4 < np.mean(mirrored) < 0.6
    assert not any(side for batch in items(50, mirror=False) for _, side in batch)


def test_seeds_differ_and_stay() -> None:
    assert len({derived_seed(*parts) for parts in itertools.product(range(5), range(5))}) == 25
    assert derived_seed(1, 23) != derived_seed(12, 3)
    assert derived_seed(0, 1) == 3457208628156884004


# The loop


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 3, 1))


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return (model(images + torch.randn_like(images)) - images).square().mean()


class KilledError(Exception):
    pass


def train(images: ImageFolder, options: Options = OPTIONS, state: Any = None, until: int = 0) -> tuple[Training, Any]:
    """A training, and its state at its last checkpoint; killed in the step after `until`, if not 0."""
    training: Training[nn.Module] = Training(network(), options, begin())
    if state is not None:
        training.load_state(state)
    kept: list[Any] = [None]

    def counted(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        if until and training.step >= until:
            raise KilledError
        return loss(model, images, labels)

    def keep(losses: list[tuple[int, float]]) -> None:
        kept[0] = copy.deepcopy(training.state())

    with suppress(KilledError):
        training.run(images, counted, keep)
    return training, kept[0]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("until", [3, 4, 5, 6])
def test_a_killed_training_ends_as_an_uninterrupted_one(images: ImageFolder, tmp_path: Path, until: int) -> None:
    whole, _ = train(images)
    _, state = train(images, until=until)
    torch.save(state, tmp_path / "state.pt")
    resumed, _ = train(images, state=torch.load(tmp_path / "state.pt", weights_only=True))
    assert state["step"] == until // 3 * 3
    assert same(whole.model, resumed.model)
    assert same(whole.ema, resumed.ema)
    assert not same(whole.model, whole.ema)
    assert not same(whole.model, train(images, replace(OPTIONS, seed=1))[0].model)


def test_a_step_adds_up_its_batches() -> None:
    """Against Adam by hand, on the mean of the two losses."""
    folder = _Fixed()
    done, _ = train(folder, replace(OPTIONS, steps=1, warm_up=0))
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), OPTIONS.learning_rate, OPTIONS.betas)
    for number, (batch, _) in enumerate(zip(Batches(5, 2, 0), range(2))):
        pictures = torch.stack([folder[item][0] for item in batch])
        torch.manual_seed(derived_seed(0, 0, number, 0))
        (loss(model, pictures, pictures) / 2).backward()
    optimizer.step()
    assert same(done.model, model)


class _Fixed(ImageFolder):
    """Images without files."""

    def __init__(self) -> None:
        self.paths = [Path(str(number)) for number in range(5)]

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(item[0]))
        return (image.flip(-1) if item[1] else image), 0


def test_averaged_weights_follow_their_formula(images: ImageFolder) -> None:
    """Those of the training up to `ema_start`, from then on lagging behind by the decay."""
    three, _ = train(images, replace(OPTIONS, steps=3, ema_start=3, ema_decay=0.75))
    assert same(three.model, three.ema)
    four, _ = train(images, replace(OPTIONS, steps=4, ema_start=3, ema_decay=0.75))
    for before, trained, averaged in zip(three.ema.parameters(), four.model.parameters(), four.ema.parameters()):
        torch.testing.assert_close(averaged, 0.75 * before + 0.25 * trained)
    rarely, _ = train(images, replace(OPTIONS, steps=3, ema_every=2, ema_decay=0.0))
    assert same(rarely.ema, train(images, replace(OPTIONS, steps=2))[0].model)


def test_it_learns_and_clips(images: ImageFolder) -> None:
    found: list[tuple[int, float]] = []
    training: Training[nn.Module] = Training(network(), replace(OPTIONS, steps=60, every=10), begin())
    training.run(images, loss, found.extend)
    assert [step for step, _ in found] == [10, 20, 30, 40, 50, 60]
    assert found[-1][1] < found[0][1] * 0.7
    still, _ = train(images, replace(OPTIONS, steps=1, clip=1e-12))
    moved, _ = train(images, replace(OPTIONS, steps=1))
    assert not same(still.model, moved.model)
    for before, after in zip(network().parameters(), still.model.parameters()):
        torch.testing.assert_close(before, after, atol=1e-4, rtol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, workers: int) -> None:
    (tmp_path / "image.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^\S+image.png is not an image that Pillow can read") as caught:
        train(ImageFolder(tmp_path, (8, 8)), replace(OPTIONS, workers=workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_link_to_nothing_is_named_and_a_folder_is_no_image(tmp_path: Path, workers: int) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "missing.png")
    images = ImageFolder(tmp_path, (8, 8))
    assert images.paths == [tmp_path / "link.png"]
    with pytest.raises(FileNotFoundError, match=r"^\S+link.png does not exist") as caught:
        train(images, replace(OPTIONS, workers=workers))
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_ends_it(images: ImageFolder) -> None:
    training: Training[nn.Module] = Training(network(), OPTIONS, begin())

    def nothing(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return loss(model, images, labels) * float("nan")

    with pytest.raises(ValueError, match="the loss is nan at step 3: use a smaller learning rate"):
        training.run(images, nothing, lambda losses: None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"learning_rate": 0.0}, "learning rate is 0.0"),
        ({"ema_decay": 1.0}, "averaged weights is 1.0"),
        ({"betas": (0.9, 1.0)}, "betas of Adam are"),
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(OPTIONS, **wrong)


# Files


def test_losses_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    assert read_losses(path) == []
    add_losses(path, [(50, 0.5), (100, 0.25)])
    add_losses(path, [(100, 0.125), (150, 1 / 3)])
    assert read_losses(path) == [(50, 0.5), (100, 0.125), (150, 1 / 3)]


# Whole processes


CONFIG = words(
    "--config lsun_p4 --image_size 16 --num_channels 32 --channel_mult 1 --num_head_channels 32 --num_res_blocks 1"
)


def command(folder: Path, out: Path) -> list[str]:
    options = words("--steps 6 --batch_size 2 --save_every 2 --samples 1 --workers 0")
    return ["patch-diffusion", "train", str(folder), "--out", str(out), *CONFIG, *options]


def states(out: Path) -> dict[str, Tensor]:
    """All tensors that a training goes on from: weights, averaged weights, and Adam's moments."""
    held = torch.load(out / "training.pt", weights_only=True)
    found = {f"{part}.{name}": value for part in ("model", "ema") for name, value in held[part].items()}
    for number, moments in held["opt"]["state"].items():
        found |= {f"opt.{number}.{name}": value for name, value in moments.items()}
    return found


def test_killed_processes_lose_no_step_they_kept(tmp_path: Path, ready: Ready) -> None:
    """A training is killed as soon as it has written its first checkpoint."""
    folder = write_images(tmp_path / "images", size=(16, 16))
    going = ready.start(command(folder, tmp_path / "killed"))
    try:
        while not (tmp_path / "killed" / "training.pt").exists():
            assert not going.has_ended()
    finally:
        going.kill()
        going.wait()
    assert torch.load(tmp_path / "killed" / "training.pt", weights_only=True)["step"] < 6
    for name in ("killed", "whole"):
        assert ready.ended(command(folder, tmp_path / name)).returncode == 0
    one, other = states(tmp_path / "killed"), states(tmp_path / "whole")
    assert len(one) == len(other) > 200
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for name in ("model.safetensors", "loss.csv", "samples-00000006.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


PROCESSES = """
import sys
from pathlib import Path
import torch
from torch import nn
from comfyui_patchconv.pixel_models.training.images import ImageFolder
from comfyui_patchconv.pixel_models.training.loop import Options, Training, begin
torch.manual_seed(0)
model = nn.Conv2d(3, 3, 3, padding=1)
options = Options(steps=4, batch=int(sys.argv[3]), learning_rate=0.01, every=4)
training = Training(model, options, begin())
loss = lambda model, images, labels: (model(images) - images).square().mean()
training.run(ImageFolder(sys.argv[1], (8, 8)), loss, lambda losses: torch.save(training.state(), sys.argv[2]))
"""


def test_several_processes_do_what_one_does(tmp_path: Path) -> None:
    """As `accelerate launch` starts them for several devices: two with a batch of 2 do what one does with 4."""
    folder = write_images(tmp_path / "images")
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for way, name, batch in ((launch, "two", 2), ([], "one", 4)):
        done = ended([*way, script, folder, tmp_path / f"{name}.pt", batch])
        assert done.returncode == 0, done.stderr[-3000:]
    two, one = (torch.load(tmp_path / f"{name}.pt", weights_only=True)["model"] for name in ("two", "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-5)
