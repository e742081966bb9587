"""The nodes of patch-based DDPM in a running ComfyUI."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_patchconv.pixel_models.patch_ddpm.checkpoints import save
from comfyui_patchconv.pixel_models.patch_ddpm.config import DiffusionConfig, ModelConfig
from comfyui_patchconv.pixel_models.patch_ddpm.model import PatchDenoiser

from .conftest import Graph, Server, read_image
from .test_server import ALWAYS, MODEL, assert_same_image, node

LOADER, SAMPLER = "PatchConv_PatchDDPMLoader", "PatchConv_PatchDDPMSampler"
EXAMPLE, SIZE = "landscapes.safetensors", 32
SETTINGS: Graph = {"seed": 1, "steps": 10, "sampler": "ddim", "batch_size": 1, "patches_at_once": 4}


@pytest.fixture(scope="module", autouse=True)
def _models(server: Server) -> None:
    """Random ones where the host looks for them: odd patches that are not square, grey and with transparency."""
    grey = ModelConfig(8, dim_mults=(1, 2), channels=1, resnet_block_groups=4, patch_divider=3, image_size=(12, 24))
    folder = server.folder / "patch_ddpm"
    for name, config in (("grey", grey), ("clear", replace(grey, channels=4))):
        torch.manual_seed(0)
        model = PatchDenoiser(config)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.1)
        save(model, DiffusionConfig(20), folder / f"{name}.safetensors")
    theirs = Path(__file__).parents[1] / "data" / "patch_ddpm.pt"
    (folder / "model-last.pt").write_bytes(theirs.read_bytes())
    (folder / "loss.csv").write_text("step,loss\n")


def loading(model: str = EXAMPLE, weight_dtype: str = "default") -> Graph:
    return {"load": node(LOADER, model_name=model, weight_dtype=weight_dtype)}


def sampling(name: str, model: list[Any] | None = None, **settings: Any) -> Graph:
    return {
        f"{name}_sample": node(SAMPLER, model=model or ["load", 0], **SETTINGS | settings),
        name: node("SaveImage", images=[f"{name}_sample", 0], filename_prefix=name),
    }


def pixels(server: Server, graph: Graph) -> dict[str, np.ndarray]:
    return {name: read_image(path) for name, path in server.run(graph).items()}


@pytest.mark.parametrize("kind", [LOADER, SAMPLER])
def test_object_info_and_help(server: Server, kind: str) -> None:
    info = server.get("/object_info")
    shown = info[kind]
    assert shown["display_name"].startswith("Patch-based DDPM")
    assert shown["description"]
    assert shown["category"] == info["UNETLoader" if kind == LOADER else "KSampler"]["category"]
    assert all(options["tooltip"] for _, options in shown["input"]["required"].values())
    assert all(shown["output_tooltips"])
    page = server.get(f"/extensions/comfyui_patchconv/docs/{kind}/en.md").decode()
    assert page.startswith(f"# {shown['display_name']}")
    assert all(f"- `{name}`: " in page for name in shown["input"]["required"])


def test_the_loader_lists_models(server: Server) -> None:
    """The example's and those in the host's folders; nothing else that lies there."""
    kind, options = server.get("/object_info")[LOADER]["input"]["required"]["model_name"]
    listed = options["options"] if kind == "COMBO" else kind
    assert sorted(listed) == ["clear.safetensors", "grey.safetensors", EXAMPLE, "model-last.pt"]


def test_a_seed_is_an_image_however_many_patches_at_once(server: Server) -> None:
    graph = loading() | sampling("four") | sampling("other", seed=2)
    for name, count in (("one", 1), ("three", 3), ("free", 0), ("many", 100)):
        graph |= sampling(name, patches_at_once=count)
    files = server.run(graph)
    for name in ("one", "three", "free", "many"):
        assert_same_image(files["four"], files[name])
    image = read_image(files["four"])
    assert image.shape == (SIZE, SIZE, 3)
    assert image.std() > 10
    assert np.abs(image - read_image(files["other"])).mean() > 5


def test_samplers(server: Server) -> None:
    """Each its own image, and the same again; of the two without fresh noise, nearly the same from many steps on."""
    graph = loading()
    for sampler in ("ancestral", "ddim", "dpm++"):
        graph |= sampling(sampler, sampler=sampler, steps=100)
        graph |= sampling(f"{sampler} again", sampler=sampler, steps=100, patches_at_once=5)  # all, but not cached
    found = pixels(server, graph)
    for sampler in ("ancestral", "ddim", "dpm++"):
        assert np.abs(found[sampler] - found[f"{sampler} again"]).max() <= 1
    near = float(np.abs(found["ddim"] - found["dpm++"]).mean())
    far = float(np.abs(found["ddim"] - found["ancestral"]).mean())
    print(f"levels between ddim and dpm++ {near:.2f}, ddim and ancestral {far:.2f}")
    assert 0 < near < far / 3


def test_landscapes(server: Server) -> None:
    """What the example model has learned: sky above, and hills below that are greener than blue."""
    found = server.run_batch(loading() | sampling("images", steps=50, batch_size=8))["images"]
    images = np.stack([read_image(path) for path in found])
    assert len(images) == 8
    assert not any(np.array_equal(one, other) for one, other in pairwise(images))
    above, below = images[:, :6].mean((0, 1, 2)), images[:, -4:].mean((0, 1, 2))
    assert above[2] > above[1]
    assert below[1] > below[2] + 20


@pytest.mark.parametrize(("name", "channels"), [("grey", 3), ("clear", 4)])
def test_other_channels_and_sizes(server: Server, name: str, channels: int) -> None:
    file = server.run(loading(f"{name}.safetensors") | sampling("image"))["image"]
    image = np.asarray(Image.open(file))
    assert image.shape == (12, 24, channels)
    assert image.std() > 0
    assert (np.ptp(image, 2) == 0).all() == (name == "grey")


def test_the_authors_file_as_it_is(server: Server) -> None:
    image = read_image(server.run(loading("model-last.pt") | sampling("theirs", steps=2))["theirs"])
    assert image.shape == (128, 128, 3)
    assert image.std() > 0


def test_patch_conv_between_them(server: Server) -> None:
    graph = loading() | {"patch": node(MODEL, model=["load", 0], **ALWAYS)}
    graph |= sampling("eager") | sampling("patched", ["patch", 0]) | sampling("after", patches_at_once=5)
    files = server.run(graph)
    assert_same_image(files["eager"], files["patched"])
    assert_same_image(files["eager"], files["after"])


def test_half_precision(server: Server) -> None:
    graph = loading() | {"bf16": node(LOADER, model_name=EXAMPLE, weight_dtype="bf16")}
    found = pixels(server, graph | sampling("eager") | sampling("half", ["bf16", 0]))
    assert 0 < np.abs(found["eager"] - found["half"]).mean() < 6


def test_progress_and_preview(server: Server) -> None:
    with server.messages() as messages:
        server.run_batch(loading() | sampling("shown", seed=3, steps=12), preview="latent2rgb")
    shown = [m["data"] for m in messages if m["type"] == "progress" and m["data"]["node"] == "shown_sample"]
    assert [(entry["value"], entry["max"]) for entry in shown] == [(step, 12) for step in range(1, 13)]
    previews = [Image.open(io.BytesIO(base64.b64decode(m["data"]))) for m in messages if m["type"] == "preview"]
    assert len(previews) == 12
    assert previews[-1].width == previews[-1].height >= SIZE  # the host enlarges it
    assert np.asarray(previews[-1]).std() > 10


def test_interrupt(server: Server) -> None:
    done = server.interrupted(loading() | sampling("long", steps=1000, batch_size=16, seed=5), "long_sample")
    assert done[-1] < 1000
    files = server.run(loading() | sampling("next", seed=6) | sampling("again", seed=6, patches_at_once=5))
    assert_same_image(files["next"], files["again"])


def test_what_cannot_be(server: Server, checkpoint: str) -> None:
    """Their models in our sampler, ours in theirs; more steps than the model knows."""
    other = {"other": node("CheckpointLoaderSimple", ckpt_name=checkpoint)}
    message = server.error(other | sampling("wrong", ["other", 0]))
    assert message.startswith("This is a model of another kind (BaseModel): connect Patch-based DDPM Loader.")
    family = {"other": node("PatchConv_PatchDiffusionSampler", model=["load", 0], seed=1, steps=2, sampler="ddim",
                            guidance=1.0, class_label=-1, batch_size=1)}  # fmt: skip
    family["save"] = node("SaveImage", images=["other", 0], filename_prefix="wrong")
    message = server.error(loading() | family)
    assert message.startswith("This is a model of another kind (Patch-based DDPM): connect Patch Diffusion Loader.")
    message = server.error(loading() | sampling("many", steps=1001))
    assert message.startswith("steps is 1001: use 1 to 1000")
