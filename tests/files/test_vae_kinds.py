"""VAEs of other kinds than Stable Diffusion's: Flux.2's is known, and what is not is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from vae_helpers import LEVELS, assert_one_sentence, ldm_state, random_latent, small_vae, write

from comfyui_patchconv.cli.vae import RunOptions, channels, decode, encode, scale
from comfyui_patchconv.files.latents import load_latent
from comfyui_patchconv.files.packing import Packing, packing_of
from comfyui_patchconv.files.vae import GROUPS_NAME, load_vae


def flux2_vae() -> Any:
    """A small AutoencoderKLFlux2 with statistics that change the latent."""
    kind = getattr(diffusers, "AutoencoderKLFlux2", None)
    if kind is None:
        pytest.skip("this diffusers has no VAE of Flux.2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = kind(
            block_out_channels=(32,) * LEVELS,
            down_block_types=("DownEncoderBlock2D",) * LEVELS,
            up_block_types=("UpDecoderBlock2D",) * LEVELS,
            layers_per_block=1,
            latent_channels=8,
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    return vae.requires_grad_(False).eval()


def in_layout(state: dict[str, Tensor], layout: str, vae: Any) -> dict[str, Tensor]:
    """The VAE's tensors as diffusers, ComfyUI (LDM), or the authors of Flux.2 have them."""
    if layout == "diffusers":
        return state
    own = {name: value for name, value in state.items() if not name.startswith("bn.")}
    vae.state_dict = lambda: own
    found = {**ldm_state(vae), **{name: value for name, value in state.items() if name.startswith("bn.")}}
    if layout == "ldm":
        return found
    inside = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    return {
        ".".join((inside.get(first := name.split(".")[0], first), *name.split(".")[1:])): found[name] for name in found
    }


def patchified(latent: Tensor) -> Tensor:
    """As diffusers' Flux2Pipeline does it."""
    batch, count, height, width = latent.shape
    blocks = latent.view(batch, count, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return blocks.reshape(batch, count * 4, height // 2, width // 2)


@pytest.mark.parametrize("mode", ["plain", "patch", "stream"])
@pytest.mark.parametrize("layout", ["diffusers", "ldm", "authors'"])
@torch.no_grad()
def test_flux2s_latents_are_packed_and_normalised(tmp_path: Path, layout: str, mode: str) -> None:
    theirs = flux2_vae()
    vae = load_vae(write(tmp_path / "flux2.safetensors", in_layout(theirs.state_dict(), layout, theirs)))
    assert (scale(vae), channels(vae)) == (16, 32)
    image = torch.randn(1, 3, 64, 32).clamp(-1, 1)
    mean, deviation = theirs.bn.running_mean.view(1, -1, 1, 1), (theirs.bn.running_var + 1e-4).sqrt().view(1, -1, 1, 1)
    expected = (patchified(theirs.encode(image).latent_dist.mode()) - mean) / deviation
    latent = encode(vae, image, RunOptions(mode, splits=3, threshold=0))
    assert latent.shape == (1, 32, 4, 2)
    assert torch.allclose(latent, expected, atol=1e-5)
    inner = torch.nn.functional.pixel_shuffle(latent * deviation + mean, 2)
    assert torch.allclose(patchified(inner), latent * deviation + mean)
    assert torch.allclose(decode(vae, latent, RunOptions(mode, 3, 0)), theirs.decode(inner).sample, atol=1e-5)


def test_the_statistics_stay_in_float32(tmp_path: Path) -> None:
    theirs = flux2_vae()
    vae = load_vae(write(tmp_path / "flux2.safetensors", theirs.state_dict()), torch.bfloat16)
    packing = packing_of(vae)
    assert isinstance(packing, Packing)
    assert torch.equal(packing.mean.flatten(), theirs.bn.running_mean)
    assert vae.dtype == torch.bfloat16
    assert load_latent(write(tmp_path / "x.latent", {"samples": packing.pack(random_latent(8, 1, 4, 4))})).shape == (
        1,
        32,
        2,
        2,
    )


def refused(path: Path, tensors: dict[str, Tensor], word: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        load_vae(write(path, tensors), **options)
    assert_one_sentence(caught.value, path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bn.running_var": None}, "bn.running_mean"),
        ({"bn.running_mean": None}, "bn.running_var"),
        ({"bn.running_mean": torch.zeros(8)}, "32 channels"),
        ({"bn.weight": torch.zeros(32)}, "another way"),
        ({"bn.running_var": torch.full((32,), -1.0)}, "negative"),
        ({"bn.running_var": torch.full((32,), torch.nan)}, "bn.running_var holds NaN"),
    ],
    ids=str,
)
def test_another_norm_of_the_latent_is_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    state = {**flux2_vae().state_dict(), **change}
    refused(tmp_path / "x.safetensors", {name: value for name, value in state.items() if value is not None}, word)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_tensors_that_no_vae_has_are_named(tmp_path: Path, prefix: str) -> None:
    state = {prefix + name: value for name, value in ldm_state(small_vae()).items()}
    unknown = {f"{prefix}{name}": torch.zeros(4) for name in ("latent_mean", "adapter.weight", "scale", "shift")}
    refused(tmp_path / "x.safetensors", {**state, **unknown}, f"{prefix}adapter.weight")
    ours = {f"{prefix}{name}": torch.zeros(4) for name in ("loss.logvar", "model_ema.decay")}
    load_vae(write(tmp_path / "x.safetensors", {**state, **ours}))


@pytest.mark.parametrize("missing", ["quant_conv", "post_quant_conv"])
def test_one_quant_convolution_without_the_other_is_refused(tmp_path: Path, missing: str) -> None:
    state = {name: value for name, value in small_vae().state_dict().items() if not name.startswith(f"{missing}.")}
    refused(tmp_path / "x.safetensors", state, f"no {missing}.weight")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["decoder.conv_out.bias", "encoder.down_blocks.0.resnets.0.conv1.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    state = small_vae().state_dict()
    state[name].view(-1)[1] = value
    refused(tmp_path / "x.safetensors", state, f"{name} holds NaN or infinity")


def test_weights_beyond_float16_are_refused_by_name(tmp_path: Path) -> None:
    state = small_vae().state_dict()
    state["decoder.conv_out.bias"][0] = 1e6
    refused(tmp_path / "x.safetensors", state, "decoder.conv_out.bias has values that", dtype=torch.float16)
    load_vae(tmp_path / "x.safetensors", torch.bfloat16)


NAMES = ("\n\x1b[2J", "a" * 5000, "ä" * 300, "decoder." + "x" * 400, "", "\U0001f600" * 200)


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_and_shapes_without_end_are_cut(tmp_path: Path, name: str) -> None:
    path, long = tmp_path / "x.safetensors", torch.zeros((1,) * 60)
    others = {f"{name}{number}": torch.zeros(1) for number in range(5)}
    refused(path, others, "no VAE")
    refused(path, {**small_vae().state_dict(), **others}, "x.safetensors")
    refused(path, {**small_vae().state_dict(), "decoder.conv_in.bias": long}, "decoder.conv_in.bias")
    refused(path, {**small_vae().state_dict(), "decoder.conv_out.weight": long}, "decoder.conv_out.weight")
    for tensors in (others, {name + "0": long}, {name + "0": torch.zeros(1, dtype=torch.int8)}):
        with pytest.raises(ValueError) as caught:
            load_latent(write(path, tensors))
        assert_one_sentence(caught.value, path)


def test_the_metadata_says_how_many_groups_norms_have(tmp_path: Path) -> None:
    vae = small_vae(groups=8)
    state = {name: value.contiguous() for name, value in vae.state_dict().items()}
    save_file(state, tmp_path / "vae.safetensors", {GROUPS_NAME: "8"})
    loaded, latent = load_vae(tmp_path / "vae.safetensors"), random_latent()
    assert loaded.config["norm_num_groups"] == 8
    assert torch.equal(decode(loaded, latent), decode(vae, latent))
    assert not torch.equal(decode(load_vae(write(tmp_path / "other.safetensors", state)), latent), decode(vae, latent))


@pytest.mark.parametrize("said", ["0", "-1", "many", "1.5", ""])
def test_groups_that_are_no_number_are_refused(tmp_path: Path, said: str) -> None:
    path = tmp_path / "vae.safetensors"
    save_file({name: value.contiguous() for name, value in small_vae().state_dict().items()}, path, {GROUPS_NAME: said})
    with pytest.raises(ValueError, match="groups") as raised:
        load_vae(path)
    assert_one_sentence(raised.value, path)


def test_widths_that_the_groups_do_not_divide_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file({name: value.contiguous() for name, value in small_vae().state_dict().items()}, path, {GROUPS_NAME: "48"})
    with pytest.raises(ValueError, match="multiples of 48"):
        load_vae(path)
