"""VAEs of every family, from files in each layout: recognised, the same as diffusers' in each way, or refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_helpers import assert_same
from products import crossed
from torch import Tensor
from vae_families import ALL, IMAGES, LTX, VIDEOS, Case, oobleck_names
from vae_helpers import assert_one_sentence, small_vae, write

from comfyui_patchconv.cli.vae import RunOptions, channels, decode, encode, scale
from comfyui_patchconv.files.packing import Statistics, packing_of
from comfyui_patchconv.files.vae import load_vae, medium_of, random_vae
from comfyui_patchconv.files.vaes import traits_of
from comfyui_patchconv.hosts.eager_needs import EagerNeeds

pytestmark = pytest.mark.filterwarnings("error:Nothing was streamed")

LAYOUTS = ("diffusers", "authors'")


@cache
def made(case: Case) -> Any:
    """The VAE of a case, which no test changes."""
    return case.make()


def stored(case: Case, layout: str, folder: Path) -> tuple[Any, Path]:
    """The VAE of a case, and a file that holds it in a layout."""
    theirs = made(case)
    state = theirs.state_dict()
    if layout != "diffusers":
        if case.authors is None:
            pytest.skip("its authors have diffusers' layout")
        state = case.authors(state)
    return theirs, write(folder / case.name, state)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


_decoded: dict[Any, Tensor] = {}


def decoded(theirs: Any, latent: Tensor) -> Tensor:
    """What diffusers makes of a latent, all frames at once, and of a decoder that wants a timestep at ComfyUI's. The
    same latent is decoded once."""
    key = theirs, latent.shape, latent.numpy().tobytes()
    if key not in _decoded:
        _decoded[key] = _decoded_anew(theirs, latent)
    return _decoded[key].clone()


def _decoded_anew(theirs: Any, latent: Tensor) -> Tensor:
    theirs.use_framewise_decoding = False
    if type(theirs).__name__ == "AutoencoderKLMochi":
        return decoded_by_mochi(theirs.decoder, latent)
    if not theirs.config.get("timestep_conditioning"):
        return theirs.decode(latent).sample
    torch.manual_seed(0)
    return theirs.decode(latent, torch.full((len(latent),), 0.05)).sample


def decoded_by_mochi(decoder: Any, latent: Tensor) -> Tensor:
    """As Mochi's authors drop the frames before the first: behind each level."""
    video, _ = decoder.block_in(decoder.conv_in(latent))
    for block in decoder.up_blocks:
        video = block(video)[0][:, :, block.temporal_expansion - 1 :]
    video, _ = decoder.block_out(video)
    return decoder.proj_out(torch.nn.functional.silu(video).movedim(1, -1)).movedim(-1, 1)


def with_time(latent: Tensor, vae: Any) -> Tensor:
    return latent[:, :, None] if traits_of(vae).medium == "video" else latent


@crossed(2, name=list(ALL), mode=["plain", "patch", "stream"], layout=LAYOUTS)
@torch.no_grad()
def test_a_family_decodes_as_diffusers_does(tmp_path: Path, name: str, layout: str, mode: str) -> None:
    case = ALL[name]
    theirs, path = stored(case, layout, tmp_path)
    vae, latent = load_vae(path), random(*case.shape)
    assert channels(vae) == latent.shape[1]
    packing = packing_of(vae)
    own = latent if packing is None else packing.unpack(latent)
    expected = decoded(theirs, with_time(own, theirs))
    expected = expected[:, :, 0] if expected.dim() == 5 else expected
    if name == "Stage A":  # which has pixels from 0 to 1
        expected = expected * 2 - 1
    assert expected.std() > 1e-3
    assert expected.shape[2:] == tuple(side * scale(vae) for side in latent.shape[2:])
    assert_same(decode(vae, latent, RunOptions(mode, splits=3, threshold=0)), expected, 1e-5)


@crossed(2, name=VIDEOS, mode=["plain", "patch", "stream"], frames=[2, 5])
@torch.no_grad()
def test_a_video_decodes_as_diffusers_does_without_tiles(tmp_path: Path, name: str, mode: str, frames: int) -> None:
    case = ALL[name]
    theirs, path = stored(case, "diffusers", tmp_path)
    vae = load_vae(path)
    packing = packing_of(vae)
    batch, count, *size = case.shape
    latent = random(batch, count, frames, *size)
    found = decode(vae, latent, RunOptions(mode, splits=3, threshold=0))
    assert found.shape[2] == traits_of(vae).frames_of(frames)
    assert_same(found, decoded(theirs, latent if packing is None else packing.unpack(latent)), 1e-5)


@pytest.mark.parametrize("name", ALL)
def test_what_a_family_takes_is_known_before_it_runs(tmp_path: Path, name: str) -> None:
    _, path = stored(ALL[name], "diffusers", tmp_path)
    vae, latent = load_vae(path), random(*ALL[name].shape)
    given = with_time(latent, vae)
    needs = EagerNeeds(vae).of_call("decode", (given,), {}, latent.device, torch.float32)
    assert needs > given.nbytes


@pytest.mark.parametrize("name", ALL)
def test_a_family_decodes_in_half_precision(tmp_path: Path, name: str) -> None:
    _, path = stored(ALL[name], "diffusers", tmp_path)
    if name == "LTX-Video 0.9.1":  # whose layers add noise, which is another in each precision
        write(path, {key: value * ("per_channel" not in key) for key, value in load_state(path).items()})
    exact, vae = load_vae(path), load_vae(path, torch.bfloat16)
    latent = random(*ALL[name].shape)
    with torch.no_grad():
        expected = decode(exact, latent)
        errors = [
            (decode(vae, latent, RunOptions(mode)).float() - expected).square().mean() for mode in ("plain", "stream")
        ]
    assert errors[0] < 0.1 * expected.square().mean()
    assert errors[1] <= 1.2 * errors[0]


@pytest.mark.parametrize("mode", ["plain", "patch", "stream"])
@pytest.mark.parametrize("name", IMAGES)
@torch.no_grad()
def test_a_family_encodes_as_diffusers_does(tmp_path: Path, name: str, mode: str) -> None:
    case = IMAGES[name]
    theirs, path = stored(case, "diffusers", tmp_path)
    vae = load_vae(path)
    image = random(1, 3, 5 * scale(vae), 4 * scale(vae)).clamp(-1, 1)
    given = (image + 1) / 2 if name == "Stage A" else image
    found = theirs.encode(with_time(given, theirs), return_dict=False)[0]
    expected = found if isinstance(found, Tensor) else found.mode()
    packing = packing_of(vae)
    latent = encode(vae, image, RunOptions(mode, splits=3, threshold=0))
    assert latent.shape[1] == channels(vae)
    assert_same(latent, expected if packing is None else packing.pack(expected), 1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_medium_is_known_from_the_names_alone(tmp_path: Path, name: str) -> None:
    _, path = stored(ALL[name], "diffusers", tmp_path)
    wanted = "sound" if name == "Oobleck" else "video" if name in VIDEOS else "image"
    assert medium_of(path) == wanted


@pytest.mark.parametrize("prefix", ["first_stage_model.", "pretransform.model."])
@pytest.mark.parametrize("name", ["Wan 2.1", "Oobleck"])
def test_a_checkpoint_has_a_vae_built_in(tmp_path: Path, name: str, prefix: str) -> None:
    case = ALL[name]
    assert case.authors is not None
    theirs = case.make()
    state = {prefix + key: value for key, value in case.authors(theirs.state_dict()).items()}
    vae = load_vae(write(tmp_path / "all.safetensors", {**state, "model.layer.weight": torch.zeros(3)}))
    latent = random(*case.shape)
    with torch.no_grad():
        expected = theirs.decode(with_time(latent, theirs)).sample.reshape(decode(vae, latent).shape)
    assert_same(decode(vae, latent), expected, 1e-5)


def test_weight_norm_of_either_kind_is_made_once(tmp_path: Path) -> None:
    theirs = ALL["Oobleck"].make()
    vae = load_vae(write(tmp_path / "sound.safetensors", oobleck_names(theirs.state_dict(), "new")))
    latent = random(1, 8, 21)
    assert not [name for name, _ in vae.named_parameters() if name.endswith(("weight_g", "weight_v"))]
    with torch.no_grad():
        assert_same(decode(vae, latent), theirs.decode(latent).sample, 1e-5)


# What is refused


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_vae(path)
    assert_one_sentence(caught.value, path)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_one_that_lacks_a_tensor_is_refused_whichever_it_is(tmp_path: Path, name: str, layout: str) -> None:
    _, path = stored(ALL[name], layout, tmp_path)
    state = {key: value.clone() for key, value in load_state(path).items()}  # the file is written over
    optional = ("vae_scale", "vae_shift", "num_batches_tracked")
    for lacking in [key for key in state if not key.endswith(optional)][:: max(len(state) // 4, 1)]:
        write(path, {key: value for key, value in state.items() if key != lacking})
        refused(path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_one_with_a_wrong_tensor_is_refused_whichever_it_is(tmp_path: Path, name: str, layout: str) -> None:
    _, path = stored(ALL[name], layout, tmp_path)
    state = {key: value.clone() for key, value in load_state(path).items() if not key.endswith("num_batches_tracked")}
    changes = cycle(
        [lambda v: v[:1].repeat(2, *[1] * (v.dim() - 1)), lambda v: v[None], lambda v: v.int(), lambda v: v[:0]]
    )
    for key, change in list(zip(state, changes))[:: max(len(state) // 4, 1)]:
        changed = change(state[key])
        same = changed.shape == state[key].shape and changed.dtype == state[key].dtype
        if same or (changed.dim() == 5 and key.endswith((".qkv.conv.weight", ".proj.conv.weight"))):
            continue  # diffusers' conversion takes sides of 1 away
        write(path, {**state, key: changed})
        refused(path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_one_with_a_tensor_too_many_is_refused_by_its_name(tmp_path: Path, name: str, layout: str) -> None:
    _, path = stored(ALL[name], layout, tmp_path)
    write(path, {**load_state(path), "adapter.weight": torch.zeros(4)})
    refused(path, "adapter.weight")
    inside = "up_blocks.adapter.weight" if name == "Stage A" else "decoder.adapter.weight"
    if name not in ("TAESD", "TAEF1"):
        write(path, {**load_state(path), inside: torch.zeros(4)})
    refused(path, "adapter.weight")


@pytest.mark.parametrize("name", ALL)
def test_one_that_is_not_finite_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    _, path = stored(ALL[name], "diffusers", tmp_path)
    state = load_state(path)
    key = next(key for key in state if re.search(r"(conv_in(\.conv)?\.weight|conv1\.bias|0\.weight)$", key))
    state[key].view(-1)[0] = torch.nan
    write(path, state)
    refused(path, f"{key} holds NaN")


PARTS: dict[str, tuple[str, ...]] = {
    name: ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.") for name in VIDEOS
}
PARTS |= {name: ("encoder.", "decoder.") for name in ("CogVideoX", *LTX)}
PARTS["Mochi"] = ("decoder.",)


@pytest.mark.parametrize(("name", "missing"), [(name, part) for name in PARTS for part in PARTS[name]])
def test_one_of_two_parts_is_refused_by_the_others_name(tmp_path: Path, name: str, missing: str) -> None:
    _, path = stored(ALL[name], "diffusers", tmp_path)
    write(path, {key: value for key, value in load_state(path).items() if not key.startswith(missing)})
    refused(path, f"no {missing}")


def test_a_tensor_in_two_layouts_is_refused(tmp_path: Path) -> None:
    _, path = stored(ALL["Wan 2.1"], "diffusers", tmp_path)
    state = load_state(path)
    write(path, {**state, "decoder.conv1.weight": state["decoder.conv_in.weight"].clone()})
    refused(path, "decoder.conv1.weight", "decoder.conv_in.weight", "one layout")


def load_state(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


CLASSES = {
    "TAESD": "diffusers.models.autoencoders.autoencoder_tiny",
    "Wan 2.1": "diffusers.models.autoencoders.autoencoder_kl_wan",
    "DC-AE, by pixels": "diffusers.models.autoencoders.autoencoder_dc",
    "HunyuanImage": "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage",
    "HunyuanVideo": "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video",
    "CogVideoX": "diffusers.models.autoencoders.autoencoder_kl_cogvideox",
    "LTX-Video 0.9": "diffusers.models.autoencoders.autoencoder_kl_ltx",
    "Mochi": "diffusers.models.autoencoders.autoencoder_kl_mochi",
    "Oobleck": "diffusers.models.autoencoders.autoencoder_oobleck",
}


@pytest.mark.parametrize("name", CLASSES)
def test_an_older_diffusers_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = stored(ALL[name], "diffusers", tmp_path)
    monkeypatch.setitem(sys.modules, CLASSES[name], None)
    refused(path, "diffusers has since 0.", "pip install -U diffusers")


def test_an_older_diffusers_that_lacks_an_argument_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.autoencoders import autoencoder_kl_wan

    _, path = stored(ALL["Wan 2.2"], "diffusers", tmp_path)
    kind = autoencoder_kl_wan.AutoencoderKLWan

    def older(base_dim: int, z_dim: int, dim_mult: list[int], num_res_blocks: int, temperal_downsample: Any) -> Any:
        return kind(base_dim=base_dim, z_dim=z_dim)

    monkeypatch.setattr(autoencoder_kl_wan, "AutoencoderKLWan", older)
    refused(path, "since 0.35")


@pytest.mark.parametrize(
    "names",
    [
        ["decoder.conv_in.conv.weight", "encoder.conv_in.conv.weight"],  # HunyuanVideo 1.5
        ["decoder.1.weight", "decoder.22.bias", "encoder.0.weight"],  # TAEHV
    ],
    ids=["HunyuanVideo 1.5", "TAEHV"],
)
def test_one_of_a_family_that_is_not_known_is_refused(tmp_path: Path, names: list[str]) -> None:
    path = write(tmp_path / "vae.safetensors", {name: torch.zeros(8, 4, 3, 3, 3) for name in names})
    refused(path, "no VAE that is known", names[0])


def test_a_diffusers_that_is_too_new_for_this_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = stored(ALL["TAESD"], "diffusers", tmp_path)
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "__init__.py").write_text("import torch\ntorch.what_a_newer_one_has\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    for make in (lambda: load_vae(path), random_vae):
        with pytest.raises(ValueError, match=r"cannot be imported with torch .*what_a_newer_one_has") as caught:
            make()
        assert str(caught.value).endswith("newer torch.")
        assert "pip install 'diffusers<0.36'" in str(caught.value)


def test_a_library_that_diffusers_lacks_is_not_taken_for_its_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = stored(ALL["TAESD"], "diffusers", tmp_path)
    monkeypatch.delitem(sys.modules, CLASSES["TAESD"], raising=False)
    monkeypatch.setitem(sys.modules, "dataclasses", None)
    with pytest.raises(ModuleNotFoundError, match="dataclasses"):
        load_vae(path)


# LTX-Video


def ltx_state(name: str) -> dict[str, Tensor]:
    case = ALL[name]
    assert case.authors is not None
    return case.authors(case.make().state_dict())


def test_one_like_ltx_2s_is_refused_which_pads_otherwise(tmp_path: Path) -> None:
    state = {
        key: value
        for key, value in ltx_state("LTX-Video 0.9.5").items()
        if not re.search(r"time_embedder|scale_shift_table|timestep", key)
    }
    refused(write(tmp_path / "vae.safetensors", state), "decoder.conv_in.conv.weight", "0.9.5 to 0.9.8 is needed")


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ({"spatial_padding_mode": "reflect"}, "spatial_padding_mode is reflect"),
        ({"causal_decoder": True}, "causal_decoder is True"),
    ],
    ids=str,
)
def test_one_whose_metadata_say_that_it_is_unusual_is_refused(tmp_path: Path, said: dict[str, Any], word: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "vae.safetensors"
    save_file(ltx_state("LTX-Video 0.9"), path, {"config": json.dumps({"vae": said})})
    refused(path, word)
    for usual in ({"vae": {"causal_decoder": False}}, {"transformer": {}}, []):
        save_file(ltx_state("LTX-Video 0.9"), path, {"config": json.dumps(usual)})
        assert load_vae(path) is not None


def test_statistics_of_other_channels_are_refused_by_their_name(tmp_path: Path) -> None:
    state = ltx_state("LTX-Video 0.9")
    assert load_vae(write(tmp_path / "vae.safetensors", {**state, "per_channel_statistics.channel": torch.arange(16)}))
    for key in ("per_channel_statistics.mean-of-means", "per_channel_statistics.std-of-means"):
        others = {name: value for name, value in state.items() if name != key}
        for tensors in (others, {**state, key: torch.ones(8)}):
            refused(write(tmp_path / "vae.safetensors", tensors), key)


def test_the_noise_that_a_latent_gets_is_always_the_same(tmp_path: Path) -> None:
    _, path = stored(ALL["LTX-Video 0.9.1"], "diffusers", tmp_path)
    latent = random(1, 16, 2, 6, 5)
    first, second = (decode(load_vae(path), latent, RunOptions("stream")) for _ in range(2))
    assert torch.equal(first, second)
    packing = packing_of(load_vae(path))
    assert isinstance(packing, Statistics)
    own = packing.pack(packing.unpack(latent)) - latent
    assert 0.02 < own.std() < 0.05


# Mochi


@pytest.mark.parametrize("before", ["decoder.", ""])
@torch.no_grad()
def test_mochis_decoder_alone_does_what_it_can(tmp_path: Path, before: str) -> None:
    case = ALL["Mochi"]
    assert case.authors is not None
    theirs = case.make()
    state = {
        before + name.removeprefix("decoder."): value
        for name, value in case.authors(theirs.state_dict()).items()
        if name.startswith("decoder.")
    }
    path = write(tmp_path / "decoder.safetensors", state)
    assert medium_of(path) == "video"
    vae, latent = load_vae(path), random(1, 12, 2, 6, 5)
    for mode in ("plain", "patch", "stream", "auto"):
        assert_same(decode(vae, latent, RunOptions(mode, 3, 0)), decoded(theirs, latent), 1e-5)
    with pytest.raises(ValueError, match="decoder alone") as caught:
        encode(vae, random(1, 3, 24, 20))
    assert_one_sentence(caught.value, path)
    for lacking in list(state)[:: max(len(state) // 9, 1)]:
        refused(write(path, {name: value for name, value in state.items() if name != lacking}))


# TAESD's names and halves


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_taesds_name_says_of_which_model_it_is(tmp_path: Path, layout: str) -> None:
    theirs, path = stored(ALL["TAESD"], layout, tmp_path)
    latent = random(1, 4, 6, 5)
    copies = tmp_path / "copies"
    copies.mkdir()
    for name, factor in (("taesd.safetensors", 0.18215), ("taesdxl_v1.safetensors", 0.13025)):
        path = Path(shutil.copy(path, copies / name))  # a VAE may still read its file: that keeps its name
        vae = load_vae(path)
        with torch.no_grad():
            assert_same(decode(vae, latent), theirs.decode(latent * factor).sample, 1e-5)
    for name in ("other.safetensors", "taesdxyz.safetensors", "taesd3.safetensors"):
        path = path.rename(tmp_path / name)
        refused(path, "taesd", "name")
    (tmp_path / "taesdxl").mkdir()
    assert load_vae(path.rename(tmp_path / "taesdxl" / "diffusion_pytorch_model.safetensors")) is not None


def test_a_scale_in_the_file_goes_before_its_name(tmp_path: Path) -> None:
    theirs, _ = stored(ALL["TAESD"], "diffusers", tmp_path)
    case, latent = ALL["TAESD"], random(1, 4, 6, 5)
    assert case.authors is not None
    state = {**case.authors(theirs.state_dict()), "vae_scale": torch.tensor(0.5), "vae_shift": torch.tensor(0.25)}
    vae = load_vae(write(tmp_path / "any.safetensors", state))
    with torch.no_grad():
        assert_same(decode(vae, latent), theirs.decode((latent - 0.25) * 0.5).sample, 1e-5)
    for scale_of_it, word in ((torch.tensor(0.0), "0"), (torch.ones(2), "one number")):
        refused(write(tmp_path / "any.safetensors", {**state, "vae_scale": scale_of_it}), "vae_scale", word)


def halves(folder: Path, suffix: str = ".safetensors") -> tuple[Any, Path, Path]:
    """A TAESD, and the authors' files of its encoder and decoder."""
    case = ALL["TAESD"]
    assert case.authors is not None
    theirs = case.make()
    state, paths = case.authors(theirs.state_dict()), []
    for part in ("encoder", "decoder"):
        before = f"taesd_{part}."
        own = {name[len(before) :]: value for name, value in state.items() if name.startswith(before)}
        path = folder / f"taesd_{part}{suffix}"
        if suffix == ".safetensors":
            write(path, own)
        else:
            torch.save(own, path)
        paths.append(path)
    return theirs, paths[0], paths[1]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@torch.no_grad()
def test_a_taesds_two_files_are_read_as_one(tmp_path: Path, suffix: str) -> None:
    theirs, encoder, decoder = halves(tmp_path, suffix)
    latent, image = random(1, 4, 6, 5), random(1, 3, 48, 40).clamp(-1, 1)
    for path in (encoder, decoder):
        vae = load_vae(path)
        assert_same(decode(vae, latent), theirs.decode(latent * 0.18215).sample, 1e-5)
        assert_same(encode(vae, image), theirs.encode(image).latents / 0.18215, 1e-5)


@torch.no_grad()
def test_half_of_a_taesd_does_what_it_can(tmp_path: Path) -> None:
    theirs, encoder, decoder = halves(tmp_path)
    encoder.unlink()
    vae, latent = load_vae(decoder), random(1, 4, 6, 5)
    assert scale(vae) == 8
    for mode in ("plain", "patch", "stream", "auto"):
        assert_same(decode(vae, latent, RunOptions(mode, 3, 0)), theirs.decode(latent * 0.18215).sample, 1e-5)
    for mode in ("plain", "patch", "stream", "auto"):
        with pytest.raises(ValueError, match="encoder beside it") as caught:
            encode(vae, random(1, 3, 16, 16), RunOptions(mode, 3, 0))
        assert_one_sentence(caught.value, decoder)


def test_another_file_in_the_place_of_a_half_is_named(tmp_path: Path) -> None:
    _, encoder, decoder = halves(tmp_path)
    write(encoder, small_vae().state_dict())
    with pytest.raises(ValueError, match="no TAESD's encoder") as caught:
        load_vae(decoder)
    assert_one_sentence(caught.value, encoder)
