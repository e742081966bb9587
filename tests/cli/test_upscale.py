"""`patchconv upscale`: pictures of any mode and depth, the same as the model makes of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import LAUNCH, LIMIT, ended
from safetensors.torch import save_file
from upscale_helpers import require_spandrel
from upscale_weights import compact, esrgan

from comfyui_patchconv import cli
from comfyui_patchconv.files import image_rows


@pytest.fixture(autouse=True)
def installed() -> None:
    require_spandrel()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "compact.safetensors"
    save_file(compact(scale=2), path)
    return path


def run(model: Path, out: Path, *images: Path, options: tuple[str, ...] = (), code: int = 0) -> None:
    given = ["--image", *map(str, images), "--out", str(out), "--device", "cpu", *options]
    assert cli.main(["upscale", "--model", str(model), *given]) == code


def noise(height: int, width: int, channels: int = 3, dtype: Any = np.uint8) -> np.ndarray:
    most = np.iinfo(dtype).max
    slope = np.linspace(0, 0.8, width)[None, :, None] * np.ones((height, 1, channels))
    return ((slope + 0.2 * np.random.default_rng(0).random((height, width, channels))) * most).astype(dtype)


def written(path: Path, levels: np.ndarray) -> Path:
    """A picture of these levels `[H, W, C]`, of 8 or 16 bits."""
    import pyvips  # pyright: ignore[reportMissingImports]

    pyvips.Image.new_from_array(levels).copy(
        interpretation="rgb16" if levels.dtype == np.uint16 else "srgb"
    ).write_to_file(str(path))
    return path


def levels(path: Path) -> np.ndarray:
    import pyvips  # pyright: ignore[reportMissingImports]

    image = pyvips.Image.new_from_file(str(path))
    return image.numpy().reshape(image.height, image.width, image.bands)


@torch.inference_mode()
def whole(model: Path, image: np.ndarray) -> np.ndarray:
    """What the model makes of levels `[H, W, 3]`, as such levels."""
    import spandrel  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    most = np.iinfo(image.dtype).max
    loaded = spandrel.ModelLoader().load_from_state_dict(load_file(model)).eval()
    made = loaded(torch.from_numpy(image.astype(np.float32) / most).movedim(-1, 0)[None])
    return made[0].movedim(0, -1).mul(most).round().numpy().astype(image.dtype)


def assert_same(found: np.ndarray, expected: np.ndarray, most: int = 1) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert expected.std() > 1
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= most
    assert (difference > 0).mean() < (1e-3 if most == 1 else 0.5)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_picture_is_that_of_the_whole(tmp_path: Path, model: Path, suffix: str, dtype: Any) -> None:
    image = noise(70, 50, dtype=dtype)
    run(model, tmp_path / f"out{suffix}", written(tmp_path / "in.png", image))
    assert_same(levels(tmp_path / f"out{suffix}"), whole(model, image), 1 if dtype == np.uint8 else 2)


def test_esrgan_from_a_pickle_of_its_authors_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"params_ema": esrgan()}, tmp_path / "esrgan.pth")
    save_file(esrgan(), tmp_path / "esrgan.safetensors")
    image = noise(24, 20)
    run(tmp_path / "esrgan.pth", tmp_path / "out.png", written(tmp_path / "in.png", image), options=("--trust",))
    assert_same(levels(tmp_path / "out.png"), whole(tmp_path / "esrgan.safetensors", image))
    assert "out.png: 80x96, " in capsys.readouterr().out


@pytest.mark.parametrize("budget", ["30MB", "8GiB"])
def test_what_lies_in_files_is_the_same(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    """As pictures that are larger than memory have it."""
    monkeypatch.setattr(image_rows, "_IN_MEMORY", 1000)
    monkeypatch.setattr(image_rows, "_ROWS_BYTES", 5000)
    monkeypatch.setattr(image_rows, "_BIG_TIFF", 1000)
    image = noise(300, 200)
    run(model, tmp_path / "out.tif", written(tmp_path / "in.png", image), options=("--budget", budget))
    assert_same(levels(tmp_path / "out.tif"), whole(model, image))
    assert (tmp_path / "out.tif").read_bytes()[:4] == b"II+\0"  # BigTIFF


def test_alpha_is_kept_or_dropped(tmp_path: Path, model: Path) -> None:
    image = noise(40, 30, 4)
    image[..., 3] = 255
    image[10:20, 10:20, 3] = 0
    source = written(tmp_path / "in.png", image)
    run(model, tmp_path / "kept.png", source)
    run(model, tmp_path / "dropped.png", source, options=("--alpha", "drop"))
    kept, dropped = levels(tmp_path / "kept.png"), levels(tmp_path / "dropped.png")
    assert_same(dropped, whole(model, image[..., :3]))
    assert np.array_equal(kept[..., :3], dropped)
    assert kept.shape == (80, 60, 4)
    assert (kept[:16, :, 3] == 255).all()
    assert (kept[24:36, 24:36, 3] == 0).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "I;16", "CMYK"])
def test_pictures_of_every_mode_are_upscaled(tmp_path: Path, model: Path, mode: str) -> None:
    grey = Image.fromarray(noise(20, 16, 1)[..., 0])
    image = Image.fromarray(noise(20, 16)) if mode in ("P", "CMYK") else grey
    if mode == "I;16":
        image = Image.fromarray(noise(20, 16, 1, np.uint16)[..., 0])
    source = tmp_path / f"in.{'tif' if mode == 'CMYK' else 'png'}"
    image.convert(mode).save(source)
    run(model, tmp_path / "out.png", source)
    found = levels(tmp_path / "out.png")
    assert found.shape == (40, 32, 4 if mode == "LA" else 3)
    assert found.dtype == (np.uint16 if mode == "I;16" else np.uint8)
    assert found.std() > 1


@pytest.mark.parametrize("most", [1, 255, np.nan])
def test_a_picture_of_floats(tmp_path: Path, model: Path, most: float, capsys: pytest.CaptureFixture[str]) -> None:
    """From 0 to 1, or nothing says what is white."""
    grey = noise(16, 16, 1, np.uint16)[:, :, 0]
    Image.fromarray((grey / 65535 * most).astype(np.float32)).save(tmp_path / "in.tif")
    run(model, tmp_path / "out.png", tmp_path / "in.tif", code=0 if most == 1 else 2)
    if most == 1:
        assert_same(levels(tmp_path / "out.png"), whole(model, np.repeat(grey[:, :, None], 3, 2)), most=300)
    else:
        assert "1 is white: export it with 8 or 16 bits" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["int", "uint", "short", "char"])
def test_whole_numbers_that_do_not_say_what_is_white(
    tmp_path: Path, model: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyvips  # pyright: ignore[reportMissingImports]

    pyvips.Image.new_from_array(noise(16, 16)).cast(kind).write_to_file(str(tmp_path / "in.tif"))
    run(model, tmp_path / "out.png", tmp_path / "in.tif", code=2)
    assert "which do not say what is white" in capsys.readouterr().err


def test_a_model_for_grey_pictures(tmp_path: Path) -> None:
    save_file(compact(channels=1), tmp_path / "grey.safetensors")
    run(tmp_path / "grey.safetensors", tmp_path / "out.png", written(tmp_path / "in.png", noise(20, 16)))
    assert levels(tmp_path / "out.png").shape == (80, 64, 1)


def test_turned_as_the_camera_says(tmp_path: Path, model: Path) -> None:
    image = Image.fromarray(noise(20, 12))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "in.jpg", exif=exif, quality=100)
    run(model, tmp_path / "out.png", tmp_path / "in.jpg")
    upright = np.asarray(Image.open(tmp_path / "in.jpg").transpose(Image.Transpose.ROTATE_270))
    assert levels(tmp_path / "out.png").shape == (24, 40, 3)
    assert np.abs(levels(tmp_path / "out.png").astype(int) - whole(model, upright).astype(int)).mean() < 3


def test_the_colour_profile_is_kept(tmp_path: Path, model: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise(20, 12)).save(tmp_path / "in.png", icc_profile=profile)
    run(model, tmp_path / "out.png", tmp_path / "in.png")
    assert Image.open(tmp_path / "out.png").info["icc_profile"] == profile


def test_several_of_which_one_fails(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [written(tmp_path / f"{name}.png", noise(16, 16)) for name in ("one", "two")]
    bad = written(tmp_path / "bad.png", noise(100, 100))
    bad.write_bytes(bad.read_bytes()[:-5000])
    run(model, tmp_path / "out", good[0], bad, good[1], code=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.png", "two.png"]
    told = capsys.readouterr().err
    assert "bad.png is damaged (" in told
    assert "1 of 3 failed" in told
    (tmp_path / "out" / "one.png").write_bytes(b"old")
    run(model, tmp_path / "out", *good)
    assert (tmp_path / "out" / "one.png").read_bytes() == b"old"
    run(model, tmp_path / "out", *good, options=("--overwrite",))
    assert (tmp_path / "out" / "one.png").read_bytes() != b"old"


def test_what_cannot_be_read_is_not_taken_from_a_folder(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    for suffix in ("png", "bmp"):
        Image.fromarray(noise(8, 8)).save(tmp_path / "in" / f"{suffix}.{suffix}")
    run(model, tmp_path / "out", tmp_path / "in")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["png.png"]


def test_a_disk_that_is_full_leaves_what_was_there(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_rows, "_write", full)
    (tmp_path / "out.png").write_bytes(b"old")
    run(model, tmp_path / "out.png", written(tmp_path / "in.png", noise(16, 16)), code=2)
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "out.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": torch.zeros(3)}, "is no model that spandrel knows: give an upscale model"),
        (compact(scale=2, channels=4), "takes 4 channels: choose one for 3 or 1"),
    ],
)
def test_models_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: dict[str, Any], words: str
) -> None:
    save_file(weights, tmp_path / "other.safetensors")
    run(tmp_path / "other.safetensors", tmp_path / "out.png", written(tmp_path / "in.png", noise(8, 8)), code=2)
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, model: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = compact(scale=2)
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name].view(-1)[3] = value
    save_file(weights, model)
    picture = written(tmp_path / "picture.png", noise(12, 10))
    run(model, tmp_path / "out.png", picture, code=2)
    assert f"{name} holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_what_is_no_picture_is_refused_in_a_sentence(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.png").write_text("hello")
    run(model, tmp_path / "out.png", tmp_path / "in.png", code=2)
    assert "in.png cannot be read as a picture" in capsys.readouterr().err
    run(model, tmp_path / "out.bmp", tmp_path / "in.png", code=2)
    assert "its name must end in .png or .tif or .tiff" in capsys.readouterr().err


def test_half_precision_is_near_to_single(tmp_path: Path, model: Path) -> None:
    image = noise(32, 24)
    run(model, tmp_path / "out.png", written(tmp_path / "in.png", image), options=("--dtype", "bfloat16"))
    assert np.abs(levels(tmp_path / "out.png").astype(int) - whole(model, image).astype(int)).mean() < 4


def test_one_picture_over_several_processes(tmp_path: Path, model: Path) -> None:
    """The first of them writes, and the picture is that of one."""
    picture = written(tmp_path / "in.png", noise(61, 24))
    run(model, tmp_path / "one.png", picture)
    script = f"from upscale_helpers import require_spandrel\nrequire_spandrel()\n{LAUNCH}"
    given = ["upscale", "--model", model, "--image", picture, "--device", "cpu", "--silent-seconds", int(LIMIT)]
    done = ended(["-c", script, *given, "--out", tmp_path / "other.png"], PYTHONPATH=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("other.png: 48x122") == 1
    assert_same(levels(tmp_path / "other.png"), levels(tmp_path / "one.png"))


def test_a_folder_over_several_processes(tmp_path: Path, model: Path) -> None:
    """A picture each; what is there is skipped, and one that fails is named."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for place in range(4):
        written(folder / f"{place}.png", noise(20 + place, 12))
    (folder / "bad.png").write_text("no picture")
    script = f"from upscale_helpers import require_spandrel\nrequire_spandrel()\n{LAUNCH}"
    given = ["upscale", "--model", model, "--image", folder, "--out", out, "--device", "cpu"]
    done = ended(["-c", script, *given], PYTHONPATH=Path(__file__).parents[1])
    assert done.returncode == 1
    assert f"1 of 5 failed: {folder / 'bad.png'}." in done.stderr
    assert sorted(path.name for path in out.iterdir()) == [f"{place}.png" for place in range(4)]
    assert levels(out / "3.png").shape == (46, 24, 3)
    again = ended(["-c", script, *given], PYTHONPATH=Path(__file__).parents[1])
    assert again.stdout.count("there already, skipped") == 4
