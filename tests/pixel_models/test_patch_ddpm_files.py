"""Patch-based DDPM: configurations and weights, the authors' and our own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from patch_ddpm_helpers import CELEBA, CHECKPOINT, DATA, FEW, TALL, inputs, randomised, reference
from torch import Tensor

from comfyui_patchconv.pixel_models.patch_ddpm import checkpoints
from comfyui_patchconv.pixel_models.patch_ddpm.checkpoints import PREFIX, load, save
from comfyui_patchconv.pixel_models.patch_ddpm.config import Config, DiffusionConfig, ModelConfig, TrainerConfig
from comfyui_patchconv.pixel_models.patch_ddpm.diffusion import schedule_buffers

import_torch = partial(checkpoints.import_torch, trust=True)
"""On any torch: it is known who made these files."""


def test_configurations_as_text() -> None:
    config = Config(TALL, FEW, TrainerConfig("data", "log", wandb_name="run"))
    assert Config.from_json(config.to_json()) == config
    assert list(json.loads(Config(TALL).to_json())) == ["model", "diffusion"]
    assert Config.from_json('{"model": {"dim": 128}}') == Config(CELEBA)
    published, _ = reference()
    assert published == Config(
        ModelConfig(16, dim_mults=(1, 2), patch_divider=2, image_size=16),
        DiffusionConfig(20),
        TrainerConfig("data", "log"),
    )


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("model", {"dimm": 8}, "model.dimm is not known: known are dim, init_dim, "),
        ("model", {"dim": "128"}, "model.dim is '128': use a whole number"),
        ("model", {"dim": True}, "model.dim is True: use a whole number"),
        ("model", {"dim": 2}, "model.dim is 2: use 4 or more"),
        ("model", {"init_dim": 0}, "model.init_dim is 0: use 1 or more"),
        ("model", {"init_dim": 1.5}, "model.init_dim is 1.5: use a whole number or null"),
        ("model", {"out_dim": 6}, "model.out_dim is 6: use null or the image's channels, 3"),
        ("model", {"dim_mults": 2}, "model.dim_mults is 2: use a list of whole numbers"),
        ("model", {"dim_mults": []}, r"model.dim_mults is \[\]: use whole numbers above 0"),
        (
            "model",
            {"dim_mults": [2, 4]},
            r"model.dim_mults is \[2, 4\]: use whole numbers above 0, the first of them 1",
        ),
        ("model", {"dim_mults": [1, 0]}, r"model.dim_mults is \[1, 0\]: use whole numbers above 0"),
        ("model", {"channels": 0}, "model.channels is 0: use 1 for grey, 3 for RGB or 4 for RGBA"),
        ("model", {"resnet_block_groups": 3}, "a level is 16 channels wide: .* multiples of resnet_block_groups, 3"),
        ("model", {"learned_variance": True}, "model.learned_variance is true.*: use false"),
        ("model", {"patch_divider": 0}, "model.patch_divider is 0: use 1 or more"),
        ("model", {"image_size": 0}, "model.image_size is 0: use a multiple of 32"),
        ("model", {"image_size": 2**40}, "model.image_size is 1099511627776: use 1048576 or less"),
        ("model", {"dim": 2**40}, "model.dim is 1099511627776: use 1048576 or less"),
        ("model", {"dim": 2**15, "dim_mults": [1, 64]}, "a level is 2097152 channels wide: .* or less"),
        ("model", {"init_dim": 2**62}, "model.init_dim is 4611686018427387904: use 1048576 or less"),
        ("diffusion", {"timesteps": 2**40}, "diffusion.timesteps is 1099511627776: use 1048576 or less"),
        ("model", {"image_size": 130}, "model.image_size is 130: use a multiple of 32, which is 4 patches that are "),
        ("model", {"image_size": 48}, "model.image_size is 48: use a multiple of 32, .* halved 3 times"),
        ("model", {"image_size": [64, 65]}, r"model.image_size is \(64, 65\): use a multiple of 32"),
        ("model", {"image_size": [64]}, r"model.image_size is \[64\]: use a whole number or \[height, width\]"),
        ("diffusion", {"timesteps": 0}, "diffusion.timesteps is 0: use 1 or more"),
        ("diffusion", {"loss_type": "huber"}, "diffusion.loss_type is 'huber': use l1 or l2"),
        ("diffusion", {"objective": "pred_v"}, "diffusion.objective is 'pred_v': use pred_noise or pred_x0"),
        ("trainer", {"log_dir": 3}, "trainer.log_dir is 3: use a text"),
        ("trainer", {"wandb_name": 3}, "trainer.wandb_name is 3: use a text or null"),
        ("trainer", {"use_amp": 1}, "trainer.use_amp is 1: use true or false"),
        ("trainer", {"ema_decay": 1}, "trainer.ema_decay is 1: use 0 to below 1"),
        ("trainer", {"train_lr": "fast"}, "trainer.train_lr is 'fast': use a number"),
        ("trainer", {"train_lr": 0}, "trainer.train_lr is 0: use a number above 0"),
        ("trainer", {"train_batch_size": 0}, "trainer.train_batch_size is 0: use 1 or more"),
        ("trainer", {"num_workers": -1}, "trainer.num_workers is -1: use 0 or more"),
    ],
)
def test_configurations_that_are_wrong(section: str, values: dict[str, Any], words: str) -> None:
    text = {"model": {"dim": 16}, "diffusion": {}, "trainer": {"train_dataset_dir": "data", "log_dir": "log"}}
    text[section] |= values
    with pytest.raises(ValueError, match=words):
        Config.from_json(json.dumps(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "the configuration is not JSON"),
        ("[]", "the configuration is not a JSON object"),
        ("{}", "model is missing: give an object"),
        ('{"modell": {}}', "modell is not known: known are model, diffusion, trainer"),
        ('{"model": 3}', "model is 3: use an object"),
        ('{"model": {}}', "model.dim is missing: give a whole number"),
        ('{"model": {"dim": 16}, "trainer": {"log_dir": ""}}', "trainer.train_dataset_dir is missing: give a text"),
    ],
)
def test_texts_that_are_no_configuration(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config.from_json(text)


def test_files_of_our_own(tmp_path: Path) -> None:
    model, (image, steps) = randomised(TALL), inputs(TALL)
    diffusion = DiffusionConfig(objective="pred_x0")
    save(model, diffusion, tmp_path / "model.safetensors")
    loaded, of_file = load(tmp_path / "model.safetensors")
    assert (loaded.config, of_file) == (TALL, diffusion)
    with torch.no_grad():
        assert torch.equal(loaded(image, steps, 9), model(image, steps, 9))


def test_the_authors_file_without_its_configuration() -> None:
    """Shapes tell all of it but the size of the image."""
    config, _ = reference()
    model, diffusion = import_torch(CHECKPOINT)
    assert model.config == replace(config.model, init_dim=10, image_size=128)
    assert diffusion == config.diffusion
    expected, _ = import_torch(CHECKPOINT, config)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


def test_the_trained_weights_instead_of_the_averaged(tmp_path: Path) -> None:
    config, _ = reference()
    held = torch.load(CHECKPOINT, weights_only=True)
    held["model"] = {name: value + 1 if PREFIX in name else value for name, value in held["model"].items()}
    torch.save(held, tmp_path / "model-last.pt")
    trained, averaged = (import_torch(tmp_path / "model-last.pt", config, entry)[0] for entry in ("model", "ema"))
    for one, other in zip(trained.parameters(), averaged.parameters()):
        assert torch.equal(one, other + 1)


def test_what_differs_between_two_configurations() -> None:
    """What a value that is left out stands for is no difference."""
    config = Config(ModelConfig(24, patch_divider=1, image_size=32))
    for other, words in (
        (config, None),
        (Config(replace(config.model, init_dim=16, out_dim=3, image_size=(32, 32))), None),
        (Config(config.model, trainer=TrainerConfig("a", "b")), None),
        (Config(replace(config.model, dim_mults=(1, 2, 4, 4))), "model.dim_mults, (1, 2, 4, 8) and (1, 2, 4, 4)"),
        (Config(config.model, FEW), "diffusion.timesteps, 1000 and 8"),
    ):
        assert config.difference(other) == words


def test_files_of_our_trainings_hold_their_configuration(tmp_path: Path) -> None:
    """Groups and objective, which no shape tells, are not taken from the defaults."""
    config = Config(TALL, DiffusionConfig(objective="pred_x0"))
    model = randomised(TALL)
    weights = {**schedule_buffers(config.diffusion), **{PREFIX + name: v for name, v in model.state_dict().items()}}
    torch.save({"ema": weights, "config": config.to_json()}, tmp_path / "model-1.pt")
    save(model, config.diffusion, tmp_path / "model.safetensors")
    for read, path in ((import_torch, "model-1.pt"), (load, "model.safetensors")):
        for given in (None, config):
            found, diffusion = read(tmp_path / path, given)
            assert (found.config, diffusion) == (TALL, config.diffusion)
        with pytest.raises(ValueError, match=r"holds another configuration than the one given: diffusion\.objective, "):
            read(tmp_path / path, Config(TALL))


def test_files_that_are_something_else(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="has no patch-based DDPM configuration"):
        load(path)
    save_file({"weight": torch.zeros(1)}, path, {"patch_ddpm": Config(TALL).to_json()})
    with pytest.raises(
        ValueError, match=r"_init_conv.weight is missing there, and \(4, 6, 7, 7\) in the configuration"
    ):
        load(path)
    state = {**randomised(TALL).state_dict(), "more": torch.zeros(1)}
    save_file(state, path, {"patch_ddpm": Config(TALL).to_json()})
    with pytest.raises(ValueError, match=r"more is \(1,\) there, and nothing in the configuration"):
        load(path)
    path.write_bytes(CHECKPOINT.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load(path)
    with pytest.raises(ValueError, match=r"since torch 1.6, which alone is read safely"):
        import_torch(path)
    with pytest.raises(ValueError, match="has no weights called 'ema': use ema or model of a training's model-"):
        import_torch(DATA / "patch_diffusion_uncond_p4.pt")
    with pytest.raises(ValueError, match="has no weights called 'opt'"):
        import_torch(CHECKPOINT, entry="opt")


def test_the_authors_files_of_another_configuration(tmp_path: Path) -> None:
    config, _ = reference()
    state = torch.load(CHECKPOINT, weights_only=True)["ema"]
    path = tmp_path / "model-last.pt"

    def changed(**values: Any) -> Path:
        kept = {name: value for name, value in {**state, **values}.items() if value is not None}
        torch.save({"ema": kept}, path)
        return path

    with pytest.raises(ValueError, match="trained with 20 timesteps and the configuration has 1000"):
        import_torch(CHECKPOINT, replace(config, diffusion=DiffusionConfig()))
    with pytest.raises(ValueError, match=r"_init_conv.weight is \(10, 6, 7, 7\) there, and \(84, 6, 7, 7\)"):
        import_torch(CHECKPOINT, Config(CELEBA, config.diffusion))
    with pytest.raises(ValueError, match="trained with another schedule"):
        import_torch(changed(betas=torch.linspace(1e-4, 0.02, 20)), config)
    with pytest.raises(ValueError, match="has no betas"):
        import_torch(changed(betas=None), config)
    with pytest.raises(ValueError, match="its weights have other names"):
        import_torch(changed(**{f"{PREFIX}_embedding._pos_embedding_layer.0.weight": None}))
    with pytest.raises(ValueError, match=r"so give that too: model\.image_size is 128"):
        import_torch(changed(**{f"{PREFIX}_embedding._pos_embedding_layer.0.weight": torch.zeros(16, 9)}))


@pytest.mark.parametrize(("name", "value", "words"), [
    ("betas", torch.zeros(()), "has no betas"), ("betas", torch.zeros(0), "timesteps is 0: use 1 or more"),
    ("betas", torch.zeros(4).to_sparse(), "has no weights called 'ema'"),
    ("betas", torch.zeros(4, device="meta"), "has no weights called 'ema'"), (3, torch.zeros(4), "has no weights"),
    (f"{PREFIX}_embedding._pos_embedding_layer.0.weight", torch.zeros(0, 4), "its weights have other names"),
    (f"{PREFIX}_patched_encoder._downsLayers.0.1.block2.proj.bias", torch.zeros(()), "its weights have other names"),
], ids=str)  # fmt: skip
def test_files_that_only_look_like_the_authors(tmp_path: Path, name: Any, value: Tensor, words: str) -> None:
    path = tmp_path / "model-last.pt"
    torch.save({"ema": {**torch.load(CHECKPOINT, weights_only=True)["ema"], name: value}}, path)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}.*{words}"):
        import_torch(path)


def test_levels_that_no_image_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.dim_mults has 20000 numbers: use 21 or less"):
        Config.from_json(json.dumps({"model": {"dim": 8, "dim_mults": [1] * 20000}}))


@pytest.mark.parametrize("text", [
    '{"model": {"dim": 8000000000000000000000}}', '{"model": {"dim": Infinity}}',
    '{"model": {"dim": 8}, "trainer": {"train_dataset_dir": "a", "log_dir": "b", "train_lr": Infinity}}',
    '{"model": {"dim": 8}, "trainer": {"train_dataset_dir": "a", "log_dir": "b", "seed": 100000000000000000000}}',
    '{"model": {"dim": 8}, "trainer": {"train_dataset_dir": "a", "log_dir": "b", "ema_decay": NaN}}',
])  # fmt: skip
def test_numbers_that_torch_cannot_hold_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r": use a (whole )?number"):
        Config.from_json(text)
