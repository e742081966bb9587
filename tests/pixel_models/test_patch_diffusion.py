"""Patch Diffusion: the authors' models, files, and the way from noise to image."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conv_helpers import assert_same
from safetensors.torch import save_file
from torch import Tensor
from training_helpers import write_keras

from comfyui_patchconv.pixel_models.patch_diffusion import checkpoints
from comfyui_patchconv.pixel_models.patch_diffusion.checkpoints import import_keras, load, load_all, save
from comfyui_patchconv.pixel_models.patch_diffusion.config import PUBLISHED, Config
from comfyui_patchconv.pixel_models.patch_diffusion.diffusion import (
    denoise,
    dynamic_threshold,
    posterior,
    sample,
    signal_share,
    spaced,
)
from comfyui_patchconv.pixel_models.patch_diffusion.model import (
    PatchUNet,
    from_patches,
    position_table,
    timestep_table,
    to_patches,
)

import_torch = partial(checkpoints.import_torch, trust=True)
"""On any torch: it is known who made these files."""
DATA = Path(__file__).parents[1] / "data"
PORT = {
    "uncond_p4": Config(64, 4, 32, (1, 1), 1, head_channels=32, norm_eps=1e-5),
    "cond_p2": Config(32, 2, 32, (1, 2), 1, classes=1000, head_channels=32, norm_eps=1e-5),
}
KERAS = Config(64, 4, 64, (1, 1, 2), 1)
SMALL = Config(16, 2, 32, (1, 2), 1, classes=3, attention=(8,), head_channels=32)


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(DATA / f"patch_diffusion_{name}.npz") as found:
        return {key: torch.from_numpy(found[key]) for key in found}


def randomised(config: Config) -> PatchUNet:
    torch.manual_seed(0)
    model = PatchUNet(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", PORT)
def test_it_computes_what_the_ports_model_does(name: str) -> None:
    """Forward passes within 1e-5 of what the authors' PyTorch code gave."""
    model, given = import_torch(DATA / f"patch_diffusion_{name}.pt", PORT[name]), arrays(name)
    with torch.no_grad():
        output = model(given["x"], given["t"], given["y"] if PORT[name].classes else None)
    assert_same(output, given["out"], 1e-5)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_patches_go_back_to_the_image(patch: int) -> None:
    image = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    patches = to_patches(image, patch)
    assert patches.shape == (2, 3 * patch**2, 16 // patch, 24 // patch)
    assert torch.equal(from_patches(patches, patch), image)
    for row, column, colour in itertools.product(range(patch), range(patch), range(3)):
        place = (row * patch + column) * 3 + colour
        assert torch.equal(patches[:, place], image[:, colour, row::patch, column::patch])


def test_tables_of_sines_follow_their_formula() -> None:
    table, times = position_table(64, 16), timestep_table(torch.tensor([0, 1, 999]), 64)
    assert table.shape == (1, 64, 16, 16)
    for channel, at in itertools.product((0, 5, 31), (0, 3, 15)):
        frequency = math.exp(-math.log(10000) * channel / 31)
        wave = math.sin(at * frequency * 64 / 16)
        assert torch.allclose(table[0, channel, :, at], torch.tensor(wave), atol=1e-5)
        assert torch.allclose(table[0, 32 + channel, at], torch.tensor(wave), atol=1e-5)
        assert math.isclose(times[2, channel], math.sin(999 * frequency), abs_tol=1e-4)
        assert math.isclose(times[1, 32 + channel], math.cos(frequency), abs_tol=1e-5)
    assert timestep_table(torch.tensor([3]), 5).shape == (1, 5)


def test_patches_and_positions_are_those_of_the_tensorflow_version() -> None:
    given = arrays("tf_uncond_p4")
    image = given["x"].permute(0, 3, 1, 2)
    patches = to_patches(image, 4)
    assert torch.equal(patches.permute(0, 2, 3, 1), given["patches"])
    assert torch.equal(from_patches(patches, 4), image)
    assert_same(position_table(64, 16).permute(0, 2, 3, 1), given["pos"])


def test_it_computes_what_the_tensorflow_versions_model_does() -> None:
    """PATCHCONV_REFERENCE: a folder with patch_diffusion_tf_uncond_p4.h5, which is too large to lie here."""
    folder = os.environ.get("PATCHCONV_REFERENCE")
    if not folder:
        pytest.skip("PATCHCONV_REFERENCE is not set: it names the folder of patch_diffusion_tf_uncond_p4.h5")
    pytest.importorskip("h5py", reason="h5py is not installed: pip install h5py")
    given = arrays("tf_uncond_p4")
    model = import_keras(Path(folder) / "patch_diffusion_tf_uncond_p4.h5", KERAS)
    with torch.no_grad():
        mean, variance = model(given["x"].permute(0, 3, 1, 2), given["t"]).permute(0, 2, 3, 1).chunk(2, -1)
    assert_same(mean, given["mean"])
    assert_same(variance, given["var"])


def test_a_keras_file_is_read_by_the_order_of_its_weights(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install h5py")
    model = randomised(SMALL)
    state = model.state_dict()
    write_keras(h5py, tmp_path / "ema_weights.h5", model)
    loaded = import_keras(tmp_path / "ema_weights.h5", SMALL)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(ValueError, match="weights, and the configuration's model"):
        import_keras(tmp_path / "ema_weights.h5", KERAS)


@pytest.mark.parametrize(
    ("name", "millions", "keys"),
    [
        ("lsun_p2", 122.9, 344),
        ("lsun_p4", 121.4, 294),
        ("lsun_p8", 121.0, 322),
        ("imagenet", 202.1, 451),
        ("ffhq", 162.6, 394),
    ],
)
def test_published_configurations_have_their_sizes(name: str, millions: float, keys: int) -> None:
    with torch.device("meta"):
        model = PatchUNet(PUBLISHED[name])
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions
    assert len(model.state_dict()) == keys


def test_files_of_our_own_come_back(tmp_path: Path) -> None:
    models = [randomised(SMALL), PatchUNet(SMALL).eval()]
    save(models, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert [model.config for model in loaded] == [SMALL, SMALL]
    image, steps, labels = torch.randn(1, 3, 16, 16), torch.tensor([5]), torch.tensor([1])
    for one, other in zip(models, loaded):
        assert torch.equal(one(image, steps, labels), other(image, steps, labels))


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="has no Patch Diffusion configuration"):
        load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load(path)
    with pytest.raises(ValueError, match=r"is not a model of this configuration: time_embed.0.weight is \(128, 32\)"):
        import_torch(DATA / "patch_diffusion_uncond_p4.pt", KERAS)
    torch.save({"step": 3}, tmp_path / "training.pt")
    with pytest.raises(ValueError, match="holds no state dict of tensors alone"):
        import_torch(tmp_path / "training.pt", SMALL)
    for content in (b"nothing", pickle.dumps(Path("anything but weights"), protocol=2)):
        (tmp_path / "other.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"since torch 1.6, which alone is read safely"):
            import_torch(tmp_path / "other.pt", SMALL)
    with pytest.raises(FileNotFoundError):
        import_torch(tmp_path / "missing.pt", SMALL)


def test_keras_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install h5py")
    path = tmp_path / "weights.h5"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"weights.h5 is no file of Keras' save_weights \(OSError\)"):
        import_keras(path, SMALL)
    with h5py.File(path, "w") as file:
        file["weight"] = np.zeros(1)
    with pytest.raises(ValueError, match="is no file of Keras' save_weights"):
        import_keras(path, SMALL)
    with pytest.raises(FileNotFoundError):
        import_keras(tmp_path / "missing.h5", SMALL)


def test_models_of_several_files_have_to_belong_together(tmp_path: Path) -> None:
    split = replace(SMALL, snr_splits=(0.25,))
    for name, config in (("low", split), ("high", split), ("other", SMALL)):
        save([PatchUNet(config)], tmp_path / f"{name}.safetensors")
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("low", "high", "other")}
    low, high = load_all([paths["low"], paths["high"]])
    assert low.config == high.config == split
    with pytest.raises(ValueError, match="is a model of another configuration than"):
        load_all([paths["low"], paths["other"]])
    with pytest.raises(ValueError, match="does not say what model it is"):
        load_all([DATA / "patch_diffusion_uncond_p4.pt"])


def test_the_older_attention_order_is_kept() -> None:
    """Each head's q, k and v together: the same as the newer order with its weights' rows sorted so."""
    newer = randomised(Config(16, 2, 64, (1,), 1, attention=(8,), head_channels=32))
    older = PatchUNet(Config(16, 2, 64, (1,), 1, attention=(8,), head_channels=32, new_attention_order=False)).eval()
    state = dict(newer.state_dict())
    for name, value in state.items():
        if "qkv" in name:
            state[name] = value.unflatten(0, (3, 2, -1)).transpose(0, 1).flatten(0, 2)
    older.load_state_dict(state)
    image, steps = torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    with torch.no_grad():
        assert_same(older(image, steps), newer(image, steps), 1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"patch": 3}, "patch is 3: use a divisor"),
        ({"mults": (2, 1)}, "mults is"),
        ({"mults": ()}, "mults is"),
        ({"mults": (1,) * 5}, "cannot be halved 4 times"),
        ({"channels": 48}, "48 channels wide"),
        ({"channels": 64, "head_channels": 0, "heads": 3}, "multiples of 32 and of heads, 3"),
        ({"channels": 0}, "channels is 0: use 4 or more"),
        ({"channels": 8, "mults": (1, 4)}, "8 channels wide"),
        ({"image_size": 0}, "image_size is 0: use 1 or more"),
        ({"blocks": 0}, "blocks is 0: use 1 or more"),
        ({"beta_max": 1.5}, "beta_max is 1.5"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"snr_splits": (0.25, 0.0)}, "snr_splits is"),
        ({"head_channels": 0, "heads": 0}, "heads is 0: use 1 or more"),
        ({"channels": 2**20, "mults": (1, 32)}, "a level is 33554432 channels wide: .* or less"),
    ],
)
def test_configurations_that_do_not_fit_together_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**{"image_size": 16, "patch": 2, "channels": 64, "mults": (1, 2), "blocks": 1, **values})


def test_configurations_come_back_from_text() -> None:
    for config in PUBLISHED.values():
        assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{'patch': 2}", "is not JSON"),
        ("[2]", "is not a JSON object"),
        ('{"pacth": 2}', "pacth is not known: known are image_size, patch"),
        ("{}", "image_size is missing: give a whole number"),
        ('{"image_size": "64"}', "image_size is '64': use a whole number"),
        ('{"image_size": true}', "image_size is True: use a whole number"),
        ('{"image_size": 64, "patch": 4, "channels": 64, "mults": [1, null]}', "use a list of numbers"),
        ('{"image_size": 64, "patch": 4, "channels": 64, "mults": 1}', "mults is 1: use a list of numbers"),
    ],
)
def test_text_that_is_no_configuration_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Config.from_json(text)


@pytest.mark.parametrize("text", [json.dumps({"a" * 10_000: 1}), json.dumps({"image_size": "x\n" * 10_000})])
def test_whatever_a_text_says_it_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ValueError) as error:
        Config.from_json(text)
    assert len(str(error.value)) <= 300
    assert "\n" not in str(error.value)


def test_labels_have_to_fit_the_model() -> None:
    image, steps = torch.zeros(1, 3, 16, 16), torch.tensor([0])
    with pytest.raises(ValueError, match="needs labels"):
        PatchUNet(SMALL)(image, steps)
    with pytest.raises(ValueError, match="give \\[N, 3, 16, 16\\]"):
        PatchUNet(SMALL)(torch.zeros(1, 3, 16, 8), steps, steps)


def guided_spacing(size: int, count: int) -> list[int]:
    """`space_timesteps` of guided diffusion for one section, whose stride adds up."""
    found, position = [], 0.0
    for _ in range(count):
        found.append(round(position))
        position += (size - 1) / (count - 1) if count > 1 else 1
    return found


def test_timesteps_are_spaced_as_the_authors_do() -> None:
    assert all(spaced(str(count)) == guided_spacing(1000, count) for count in range(1, 1001))
    for counts in ([90, 60, 60, 20, 20], [13, 15, 37, 1, 200]):
        sections = [[200 * number + step for step in guided_spacing(200, count)] for number, count in enumerate(counts)]
        assert spaced(",".join(map(str, counts))) == [step for section in sections for step in section]
    assert spaced("250")[:3] == [0, 4, 8]
    assert spaced("250")[-1] == 999
    assert spaced("ddim50") == list(range(0, 1000, 20))
    assert len(spaced("90,60,60,20,20")) == 250
    assert spaced("1000") == list(range(1000))
    for wrong in ("", "0", "1001", "ddim7000", "many", "10,900"):
        with pytest.raises(ValueError, match="steps"):
            spaced(wrong)


@pytest.mark.parametrize("beta_max", [0.02, 0.025])
def test_the_schedule_is_linear(beta_max: float) -> None:
    share = signal_share(beta_max)
    for step in (0, 1, 499, 999):
        betas = [1e-4 + (beta_max - 1e-4) * number / 999 for number in range(step + 1)]
        assert math.isclose(share[step].item(), math.prod(1 - beta for beta in betas), rel_tol=1e-12)


def test_the_posterior_is_that_of_bayes() -> None:
    """One step back is a product of two normals: what the image says, and what the noisy image says."""
    share = signal_share(0.02)
    for now, before in ((share[999], share[998]), (share[500], share[300]), (share[4], share[0])):
        kept = now / before
        precisions = 1 / (1 - before), kept / (1 - kept)
        variance = 1 / (precisions[0] + precisions[1])
        found = posterior(now, before)
        assert math.isclose(found.of_clean, variance * precisions[0] * before.sqrt(), rel_tol=1e-9)
        assert math.isclose(found.of_noisy, variance * precisions[1] / kept.sqrt(), rel_tol=1e-9)
        assert math.isclose(found.log_smallest, math.log(variance), rel_tol=1e-9)
        assert math.isclose(found.log_largest, math.log(1 - kept), rel_tol=1e-9)


@pytest.mark.parametrize("place", [0.0, 0.25, 1.0])
def test_one_ancestral_step_follows_its_formula(place: float) -> None:
    """From step 600 to 300 with a variance of the model's."""
    share, image = signal_share(0.02), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    shown: list[Tensor] = []

    def model(given: Tensor, at: Tensor, labels: Any) -> Tensor:
        shown.append(given)
        return torch.cat([torch.full_like(given, 0.3), torch.full_like(given, place)], 1)

    generator = torch.Generator().manual_seed(1)
    options: Any = dict(share=share, splits=(), learn_sigma=True, ddim=False, on_step=None)
    last = denoise([model], image, None, steps=[300, 600], generator=generator, **options)
    assert torch.equal(last, torch.full_like(image, 0.3))
    found = posterior(share[600], share[300])
    fresh = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    deviation = math.exp(0.5 * (place * found.log_smallest + (1 - place) * found.log_largest))
    assert_same(shown[1], (found.of_clean * 0.3 + found.of_noisy * image.double() + deviation * fresh).float())


def test_where_one_model_takes_over_from_the_other() -> None:
    """ImageNet's split: the model for less noise has the timesteps to 395."""
    share = signal_share(0.02)
    assert [step for step in range(1000) if share[step] / (1 - share[step]) > 0.25][-1] == 395
    used: list[tuple[int, int]] = []

    def model(number: int) -> Any:
        return lambda image, steps, labels: used.append((int(steps[0]), number)) or image.clamp(-1, 1)

    options: Any = dict(steps=spaced("1000"), learn_sigma=False, ddim=True, generator=None, on_step=None)
    denoise([model(0), model(1)], torch.zeros(1, 3, 2, 2), None, share=share, splits=(0.25,), **options)
    assert used == [(step, int(step > 395)) for step in reversed(range(1000))]


@pytest.mark.parametrize("ddim", [False, True])
@pytest.mark.parametrize("steps", ["1000", "250"])
def test_samples_are_spread_as_the_data(ddim: bool, steps: str) -> None:
    """For pixels of mean 0.2 and deviation 0.3 the best prediction is a formula."""
    share, mean, deviation = signal_share(0.02), 0.2, 0.3

    def best(image: Tensor, at: Tensor, labels: Any) -> Tensor:
        signal = share[at].float().view(-1, 1, 1, 1)
        spread = signal * deviation**2 + 1 - signal
        return mean + signal.sqrt() * deviation**2 / spread * (image - signal.sqrt() * mean)

    generator = torch.Generator().manual_seed(0)
    images = denoise(
        [best],
        torch.randn(4, 3, 64, 64, generator=generator),
        None,
        share=share,
        splits=(),
        steps=spaced(steps),
        learn_sigma=False,
        ddim=ddim,
        generator=generator,
        on_step=None,
    )
    assert abs(float(images.mean()) - mean) < 0.02
    assert abs(float(images.std()) - deviation) < 0.03


def test_dynamic_threshold_divides_by_the_percentile() -> None:
    image = torch.linspace(-0.9, 0.9, 3 * 100).view(1, 3, 10, 10)
    assert torch.equal(dynamic_threshold(image), image)
    bright = torch.cat([image, 4 * image])
    found = dynamic_threshold(bright)
    assert torch.equal(found[0], image[0])
    bound = float(np.percentile(np.abs(bright[1].numpy()), 99.5, method="nearest"))
    assert_same(found[1], bright[1].clamp(-bound, bound) / bound)


def test_sampling_with_a_class_is_guided() -> None:
    model, noise = randomised(SMALL), torch.randn(2, 3, 16, 16)
    seen: list[tuple[int, int]] = []
    labels = torch.tensor([0, 2])

    def run(**options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return sample([model], noise, labels, steps="5", generator=generator, **options)

    images = run(on_step=lambda done, steps, image: seen.append((done, steps)))
    assert images.shape == noise.shape
    assert images.abs().max() <= 1
    assert seen == [(done, 5) for done in range(5)]
    assert torch.equal(run(), images)
    assert not torch.equal(run(guidance=4.0), images)
    assert not torch.equal(run(ddim=True), images)
    with pytest.raises(ValueError, match="2 models for 0 splits"):
        sample([model, model], noise, labels)


@pytest.mark.parametrize("values", [
    {"mults": (1.0, 1e308)}, {"mults": (1.0, float("inf"))}, {"mults": (float("nan"),)}, {"image_size": 2**70},
    {"classes": -5}, {"classes": 2**62}, {"channels": 2**50}, {"head_channels": -32}, {"heads": -1}, {"blocks": 2**20},
    {"patch": 2**19, "image_size": 2**20},
], ids=str)  # fmt: skip
def test_numbers_out_of_bounds_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(values))} is .*: use .*(or more|or less)") as caught:
        replace(SMALL, **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("names", "words"), [
    (["x.weight"], "holds weights of 'x'"), (["weight"], "holds weights of 'weight'"),
    (["1.weight"], "holds weights of '1'"), (["0.weight", "00.weight"], "holds weights of '00'"),
    ([], "holds no weights"),
], ids=str)  # fmt: skip
def test_files_whose_weights_belong_to_no_model_are_refused(tmp_path: Path, names: list[str], words: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path, {"patch_diffusion": SMALL.to_json()})
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} {words}"):
        load(path)


def test_a_file_is_named_whose_configuration_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"0.weight": torch.zeros(1)}, path, {"patch_diffusion": json.dumps({"blocks": 0})})
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: image_size is missing"):
        load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_a_text_that_is_nested_deeply_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not JSON: maximum recursion depth"):
        Config.from_json(text)


@pytest.mark.parametrize("name", ["mults", "attention", "snr_splits"])
def test_lists_that_no_model_has_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} has 2000 numbers: use (21|1024) or less"):
        replace(SMALL, **{name: (1,) * 2000})


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_of_types_that_none_have_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    path, state = tmp_path / "model.safetensors", PatchUNet(SMALL).state_dict()
    first = next(iter(state))
    tensors = {f"0.{name}": value.to(dtype) if name == first else value for name, value in state.items()}
    save_file(tensors, path, {"patch_diffusion": SMALL.to_json()})
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: {first} is no ordinary tensor of float32"):
        load(path)


@pytest.mark.parametrize("change", [
    lambda value: value.to_sparse(), lambda value: value.to("meta"),
], ids=["sparse", "meta"])  # fmt: skip
def test_tensors_without_values_in_rows_are_refused(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    path, state = tmp_path / "model.pt", PatchUNet(SMALL).state_dict()
    first = next(iter(state))
    torch.save({**state, first: change(state[first])}, path)
    with pytest.raises(ValueError, match=r"is no ordinary tensor of float32|cannot be read safely"):
        import_torch(path, SMALL)


def test_values_that_the_model_cannot_hold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({name: torch.full_like(value, 1e300, dtype=torch.float64) for name, value in
                PatchUNet(SMALL).state_dict().items()}, path)  # fmt: skip
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        import_torch(path, SMALL)
