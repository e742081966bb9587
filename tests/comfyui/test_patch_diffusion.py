"""The nodes of Patch Diffusion in a running ComfyUI."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_patchconv.pixel_models.patch_diffusion.checkpoints import save
from comfyui_patchconv.pixel_models.patch_diffusion.config import Config
from comfyui_patchconv.pixel_models.patch_diffusion.model import PatchUNet

from .conftest import Graph, Server, assert_described, read_image
from .test_server import ALWAYS, MODEL, assert_same_image, node

LOADER, SAMPLER = "PatchConv_PatchDiffusionLoader", "PatchConv_PatchDiffusionSampler"
EXAMPLE = "landscapes.safetensors"
SETTINGS: Graph = {
    "seed": 1, "steps": 10, "sampler": "ddim", "guidance": 1.5, "class_label": -1, "batch_size": 1
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _models(server: Server) -> None:
    """Random ones where the host looks for them: of classes, and of two networks that share the noise."""
    classes = Config(16, 2, 32, (1, 2), 1, classes=3, attention=(8,), head_channels=32)
    split = replace(classes, classes=0, snr_splits=(0.25,))
    for file, config, count in (("classes", classes, 1), ("split", split, 2)):
        torch.manual_seed(0)
        models = [PatchUNet(config) for _ in range(count)]
        for name, parameter in (named for model in models for named in model.named_parameters()):
            parameter.data.normal_(std=1.0 if name.startswith("label_embs") else 0.05)
        save(models, server.folder / "patch_diffusion" / f"{file}.safetensors")
    (server.folder / "patch_diffusion" / "loss.csv").write_text("step,loss\n")


def loading(model: str = EXAMPLE, weight_dtype: str = "default") -> Graph:
    return {"load": node(LOADER, model_name=model, weight_dtype=weight_dtype)}


def sampling(name: str, model: list[Any] | None = None, **settings: Any) -> Graph:
    return {
        f"{name}_sample": node(SAMPLER, model=model or ["load", 0], **SETTINGS | settings),
        name: node("SaveImage", images=[f"{name}_sample", 0], filename_prefix=name),
    }


def pixels(files: dict[str, Path]) -> dict[str, np.ndarray]:
    return {name: read_image(path) for name, path in files.items()}


@pytest.mark.parametrize("kind", [LOADER, SAMPLER])
def test_object_info_and_help(server: Server, kind: str) -> None:
    assert_described(server, kind, "Patch Diffusion", "UNETLoader" if kind == LOADER else "KSampler")


def test_the_loader_lists_models(server: Server) -> None:
    """The example's and those in the host's folders; nothing else that lies there."""
    kind, options = server.get("/object_info")[LOADER]["input"]["required"]["model_name"]
    listed = options["options"] if kind == "COMBO" else kind
    assert sorted(listed) == ["classes.safetensors", EXAMPLE, "split.safetensors"]


def test_a_seed_is_an_image(server: Server) -> None:
    """`class_label` says nothing to this model, but has the host run the node again."""
    graph = loading() | sampling("first") | sampling("again", class_label=7) | sampling("other", seed=2)
    graph |= sampling("ancestral", sampler="ancestral")
    found = pixels(server.run(graph))
    assert found["first"].shape == (64, 64, 3)
    assert found["first"].std() > 10
    assert np.array_equal(found["first"], found["again"])
    assert np.abs(found["first"] - found["other"]).mean() > 5
    assert not np.array_equal(found["first"], found["ancestral"])


def test_a_landscape(server: Server) -> None:
    """What the example model has learned: sky above, and hills below that are greener than blue."""
    found = server.run_batch(loading() | sampling("images", steps=50, batch_size=8))["images"]
    images = np.stack([read_image(path) for path in found])
    above, below = images[:, :12].mean((0, 1, 2)), images[:, -8:].mean((0, 1, 2))
    assert above[2] > above[1]
    assert below[1] > below[2] + 20


def test_a_batch(server: Server) -> None:
    found = server.run_batch(loading() | sampling("images", batch_size=3))["images"]
    images = [read_image(path) for path in found]
    assert len(images) == 3
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])


def test_patch_conv_between_them(server: Server) -> None:
    graph = loading() | {"patch": node(MODEL, model=["load", 0], **ALWAYS)}
    files = server.run(graph | sampling("eager") | sampling("patched", ["patch", 0]) | sampling("after", class_label=7))
    assert_same_image(files["eager"], files["patched"])
    assert np.array_equal(read_image(files["eager"]), read_image(files["after"]))


def test_half_precision(server: Server) -> None:
    graph = loading() | {"load_half": node(LOADER, model_name=EXAMPLE, weight_dtype="bf16")}
    found = pixels(server.run(graph | sampling("eager") | sampling("half", ["load_half", 0])))
    assert 0 < np.abs(found["eager"] - found["half"]).mean() < 6


def test_classes(server: Server) -> None:
    graph = loading("classes.safetensors")
    variants: dict[str, Graph] = {
        "zero": {"class_label": 0},
        "two": {"class_label": 2},
        "guided": {"class_label": 2, "guidance": 4.0},
        "free": {"class_label": 2, "guidance": 1.0},
    }
    for name, settings in variants.items():
        graph |= sampling(name, **settings)
    found = list(pixels(server.run(graph)).values())
    assert not any(np.array_equal(one, other) for number, one in enumerate(found) for other in found[:number])
    message = server.error(loading("classes.safetensors") | sampling("wrong", class_label=3))
    assert message.strip() == "class_label is 3 and the model has 3 classes: use 0 to 2, or -1."


def test_two_networks(server: Server) -> None:
    image = read_image(server.run(loading("split.safetensors") | sampling("split"))["split"])
    assert image.shape == (16, 16, 3)
    assert image.std() > 0


def test_progress_and_preview(server: Server) -> None:
    with server.messages() as messages:
        server.run_batch(loading() | sampling("shown", seed=3, steps=12), preview="latent2rgb")
    shown = [m["data"] for m in messages if m["type"] == "progress" and m["data"]["node"] == "shown_sample"]
    assert [(entry["value"], entry["max"]) for entry in shown] == [(step, 12) for step in range(1, 13)]
    previews = [Image.open(io.BytesIO(base64.b64decode(m["data"]))) for m in messages if m["type"] == "preview"]
    assert len(previews) == 12
    assert previews[-1].width == previews[-1].height >= 64  # some hosts enlarge it
    assert np.asarray(previews[-1]).std() > 10


def test_no_preview_where_none_is_wanted(server: Server) -> None:
    with server.messages() as messages:
        server.run_batch(loading() | sampling("unseen", seed=4))
    assert any(m["type"] == "progress" for m in messages)
    assert not any(m["type"] == "preview" for m in messages)


def test_interrupt(server: Server) -> None:
    done = server.interrupted(loading() | sampling("long", steps=1000, seed=5), "long_sample")
    assert done[-1] < 1000
    found = pixels(server.run(loading() | sampling("next", seed=6) | sampling("again", seed=6, class_label=7)))
    assert np.array_equal(found["next"], found["again"])


def test_other_kinds_of_models(server: Server, checkpoint: str) -> None:
    """Theirs in our sampler, ours in theirs."""
    other = {"other": node("CheckpointLoaderSimple", ckpt_name=checkpoint)}
    message = server.error(other | sampling("wrong", ["other", 0]))
    assert message.startswith("This is a model of another kind (BaseModel): connect Patch Diffusion Loader.")
    graph = other | loading()
    graph |= {
        "text": node("CLIPTextEncode", text="a hill", clip=["other", 1]),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sample": node(
            "KSampler", model=["load", 0], positive=["text", 0], negative=["text", 0], latent_image=["empty", 0],
            seed=1, steps=1, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0,
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="wrong"),
    }  # fmt: skip
    message = server.error(graph)
    assert message.startswith("This is a Patch Diffusion model and works on pixels, without a latent")
