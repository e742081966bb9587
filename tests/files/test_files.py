"""VAEs, latents and images from files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from vae_helpers import assert_one_sentence, ldm_state, random_latent, small_vae, write

from comfyui_patchconv.files import vae as vae_file
from comfyui_patchconv.files.images import load_image, save_image
from comfyui_patchconv.files.latents import load_latent, save_latent
from comfyui_patchconv.files.tensors import read_header
from comfyui_patchconv.files.vae import load_vae, random_vae


@torch.no_grad()
def decoded(vae: AutoencoderKL, latent: Tensor) -> Tensor:
    return vae.decode(latent, return_dict=False)[0]  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def encoded(vae: AutoencoderKL, image: Tensor) -> Tensor:
    return vae.encode(image, return_dict=False)[0].mode()


def assert_same_vae(actual: AutoencoderKL, expected: AutoencoderKL) -> None:
    latent = random_latent(expected.config["latent_channels"])
    image = decoded(expected, latent)
    assert torch.equal(decoded(actual, latent), image)
    assert torch.equal(encoded(actual, image), encoded(expected, image))


# VAEs


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize(
    "kind",
    [{}, {"channels": 16, "quant_conv": False}, {"quant_conv": False}, {"channels": 16}, {"attention": False}],
    ids=str,
)
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_a_vae_of_either_layout_is_the_one_it_was_saved_from(
    tmp_path: Path, layout: str, kind: dict[str, Any], prefix: str
) -> None:
    vae = small_vae(**kind)
    state = ldm_state(vae) if layout == "ldm" else vae.state_dict()
    path = write(tmp_path / "vae.safetensors", {prefix + name: value for name, value in state.items()})
    assert_same_vae(load_vae(path), vae)


def test_attention_in_the_names_of_older_diffusers_is_read(tmp_path: Path) -> None:
    vae, old = small_vae(), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = vae.state_dict()
    for today, name in old.items():
        state = {key.replace(f"attentions.0.{today}.", f"attentions.0.{name}."): value for key, value in state.items()}
    assert any("proj_attn" in name for name in state)
    assert_same_vae(load_vae(write(tmp_path / "vae.safetensors", state)), vae)


def test_only_the_vae_of_a_checkpoint_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, read = small_vae(), []
    state = {f"first_stage_model.{name}": value for name, value in ldm_state(vae).items()}
    others = {"model.diffusion_model.out.2.weight": torch.zeros(3), "first_stage_model.loss.logvar": torch.zeros(1)}
    path = write(tmp_path / "sd.safetensors", {**state, **others})
    opened = vae_file.opened

    def watched(path: Path, trust: bool) -> Any:
        header, get = opened(path, trust)
        return header, lambda name: read.append(name) or get(name)

    monkeypatch.setattr(vae_file, "opened", watched)
    assert_same_vae(load_vae(path), vae)
    assert set(read) == set(state)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickled_checkpoint_is_read(tmp_path: Path, nested: bool) -> None:
    vae = small_vae()
    state = {f"first_stage_model.{name}": value for name, value in ldm_state(vae).items()}
    content = {"state_dict": state, "epoch": 3} if nested else state
    torch.save(content, tmp_path / "sd.ckpt")
    assert_same_vae(load_vae(tmp_path / "sd.ckpt", trust=True), vae)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_vae_is_cast_frozen_and_in_evaluation_mode(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: value.half() for name, value in small_vae().state_dict().items()}
    vae = load_vae(write(tmp_path / "vae.safetensors", state), dtype)
    assert {value.dtype for value in vae.state_dict().values()} == {dtype}
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_a_random_vae_is_the_same_each_time_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = random_vae(3), random_vae(3), random_vae(4)
    assert torch.equal(before, torch.get_rng_state())
    weight = "decoder.conv_in.weight"
    assert torch.equal(first.state_dict()[weight], second.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_a_random_vae_is_stable_diffusions_and_its_image_has_contrast() -> None:
    vae = random_vae()
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    image = decoded(vae, random_latent(height=8, width=8))[0]
    assert image.shape == (3, 64, 64)
    assert image.isfinite().all()
    low, high = image.aminmax()
    assert high - low > 0.25  # 32 of 255 levels


# Latents


@pytest.mark.parametrize("current", [True, False])
def test_comfyuis_latent_is_scaled_if_it_is_of_the_first_format(tmp_path: Path, current: bool) -> None:
    latent = random_latent()
    tensors = {"latent_tensor": latent}
    if current:
        tensors["latent_format_version_0"] = torch.tensor([])
    loaded = load_latent(write(tmp_path / "a.latent", tensors))
    assert torch.equal(loaded, latent if current else latent / 0.18215)


@pytest.mark.parametrize("name", ["samples", "latents", "latent", "anything"])
@pytest.mark.parametrize("shape", [(4, 6, 5), (2, 16, 6, 5)])
def test_any_one_tensor_is_a_latent_as_it_is(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    latent = torch.randn(shape)
    loaded = load_latent(write(tmp_path / "a.safetensors", {name: latent}))
    assert torch.equal(loaded, latent.reshape(-1, *shape[-3:]))


def test_a_known_name_is_chosen_among_several(tmp_path: Path) -> None:
    latent = random_latent()
    path = write(tmp_path / "a.safetensors", {"noise_mask": torch.ones(1, 6, 5), "samples": latent})
    assert torch.equal(load_latent(path), latent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_latent_of_any_float_type_comes_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    latent = random_latent().to(dtype)
    loaded = load_latent(write(tmp_path / "a.safetensors", {"samples": latent}))
    assert torch.equal(loaded, latent.float())


def test_a_saved_latent_comes_back_and_is_what_comfyui_reads(tmp_path: Path) -> None:
    latent = random_latent(16, batch=2)
    save_latent(tmp_path / "a.latent", latent.permute(0, 1, 3, 2))
    assert torch.equal(load_latent(tmp_path / "a.latent"), latent.permute(0, 1, 3, 2))
    assert load_file(tmp_path / "a.latent").keys() == {"latent_tensor", "latent_format_version_0"}


def test_a_latent_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        save_latent(tmp_path / "missing" / "a.latent", random_latent())
    assert_one_sentence(caught.value, tmp_path / "missing" / "a.latent")


# Images


def test_every_level_of_an_image_survives_both_ways(tmp_path: Path) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(16, 16)[:, :, None].expand(16, 16, 3).numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "in.png")
    image = load_image(tmp_path / "in.png")
    assert image.shape == (1, 3, 16, 16)
    assert image.aminmax() == (-1, 1)
    save_image(tmp_path / "out.png", image[0])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), pixels)


def test_an_image_is_cropped_evenly_to_the_multiple(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    save_image(tmp_path / "out.png", load_image(tmp_path / "in.png")[0])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), pixels[2:18, 3:27])


def test_values_outside_the_range_are_clipped(tmp_path: Path) -> None:
    image = torch.tensor([-3.0, 0.0, 3.0]).repeat_interleave(8).expand(3, 8, 24)
    save_image(tmp_path / "out.png", image)
    assert np.asarray(Image.open(tmp_path / "out.png"))[0, [0, 8, 16], 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("mode", "colour"), [("L", 200), ("RGBA", (200, 200, 200, 0)), ("I;16", 200 * 257)])
def test_an_image_of_another_mode_is_read_as_rgb(tmp_path: Path, mode: str, colour: Any) -> None:
    Image.new(mode, (8, 8), colour).save(tmp_path / "in.png")
    image = load_image(tmp_path / "in.png")
    assert image.shape == (1, 3, 8, 8)
    assert torch.allclose(image, torch.tensor(200 / 127.5 - 1), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_levels_of_a_deep_grey_image_are_scaled(tmp_path: Path, dtype: Any) -> None:
    slope = np.linspace(0, 1, 64).reshape(8, 8)
    Image.fromarray((slope * (1 if dtype is np.float32 else 65535)).astype(dtype)).save(tmp_path / "in.tif")
    expected = torch.from_numpy(slope).float() * 2 - 1
    assert torch.allclose(load_image(tmp_path / "in.tif")[0, 0], expected, atol=1 / 255)


@pytest.mark.parametrize("levels", [
    np.full((8, 8), 7, np.int32), np.full((8, 8), 200, np.float32), np.full((8, 8), np.nan, np.float32),
    np.full((8, 8), -0.5, np.float32),
])  # fmt: skip
def test_levels_that_do_not_say_what_is_white_are_refused(tmp_path: Path, levels: Any) -> None:
    path = tmp_path / "in.tif"
    Image.fromarray(levels).save(path)
    with pytest.raises(ValueError, match="white: export it with 8 or 16 bits") as caught:
        load_image(path)
    assert_one_sentence(caught.value, path)


def test_a_rotated_photo_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (24, 8)).save(tmp_path / "in.jpg", exif=exif)
    assert load_image(tmp_path / "in.jpg").shape == (1, 3, 24, 8)


def test_an_image_with_nan_is_not_written(tmp_path: Path) -> None:
    image = torch.zeros(3, 8, 8)
    image[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN") as caught:
        save_image(tmp_path / "out.png", image)
    assert_one_sentence(caught.value, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_a_header_is_read_without_the_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int8)}, tmp_path / "x.safetensors", {"k": "v"})
    assert read_header(tmp_path / "x.safetensors") == {"a": ("F32", (2, 3)), "b": ("I8", (4,))}
