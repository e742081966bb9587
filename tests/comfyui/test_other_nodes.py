"""Patch Conv among the host's other nodes: what they merge, save and show is what it is without it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import Graph, Server, read_image, read_latent
from .test_server import MODEL, VAE, assert_same_image, assert_same_latent, decode, loader, node, sampling

STRIPS: Graph = {"splits": 3, "threshold": 0.0}


def patched(checkpoint: str) -> Graph:
    """A checkpoint, and its model and VAE patched."""
    return loader(checkpoint) | {
        "model": node(MODEL, model=["load", 0], **STRIPS),
        "vae": node(VAE, vae=["load", 2], half="both", mode="patch", **STRIPS),
    }


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_merged_model(server: Server, checkpoint: str, place: str) -> None:
    merge = {"ratio": 0.25}
    graph = patched(checkpoint) | {
        "eager_merge": node("ModelMergeSimple", model1=["load", 0], model2=["load", 0], **merge)
    }
    if place == "before":
        graph["merge"] = node("ModelMergeSimple", model1=["model", 0], model2=["load", 0], **merge)
    else:
        graph["merge"] = node(MODEL, model=["eager_merge", 0], **STRIPS)
    graph |= sampling(checkpoint, "eager", ["eager_merge", 0]) | sampling(checkpoint, "merged", ["merge", 0])
    latents = server.run(graph)
    assert_same_latent(latents["eager"], latents["merged"])


@pytest.mark.parametrize("backend", ["cudagraphs", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_compiled_model(server: Server, checkpoint: str, backend: str, place: str) -> None:
    """Convolutions are whole in what is compiled, and in strips in what PyTorch's compiler gives up on, as it does on
    much of this host. A patched VAE beside it does not mind."""
    compiling: Graph = {"backend": backend}
    graph = patched(checkpoint) | {"eager_compiled": node("TorchCompileModel", model=["load", 0], **compiling)}
    if place == "before":
        graph["compiled"] = node("TorchCompileModel", model=["model", 0], **compiling)
    else:
        graph["compiled"] = node(MODEL, model=["eager_compiled", 0], **STRIPS)
    graph |= sampling(checkpoint, "eager", ["eager_compiled", 0]) | sampling(checkpoint, "strips", ["compiled", 0])
    graph |= decode("image", ["load", 2], ["eager_sample", 0])
    graph |= decode("image_strips", ["vae", 0], ["strips_sample", 0])
    with server.messages() as messages:
        files = server.run(graph)
    assert_same_latent(files["eager"], files["strips"])
    assert_same_image(files["image"], files["image_strips"])
    told = [message["data"] for message in messages if message["type"] == "patchconv.report"]
    ways = {one["part"]: one["words"]["way"] for one in told}
    assert ways["Model"] in ("in up to 3 strips", "whole (compiled by torch.compile, or left to another extension)")
    assert ways["VAE decoder"] == "in up to 3 strips"


def controlnet(checkpoint: Path, path: Path) -> None:
    """A ControlNet for SD 1.5 in the format of its authors: a copy of the U-Net's half, as they begin with, and random
    weights in what they add to it, large enough to see."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}

    def layer(name: str, *shape: int) -> None:
        drawn = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        tensors[f"control_model.{name}.weight"] = drawn.half()
        tensors[f"control_model.{name}.bias"] = torch.zeros(shape[0], dtype=torch.half)

    with safe_open(checkpoint, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = name.removeprefix("model.diffusion_model.")
            if part.startswith(("time_embed.", "input_blocks.", "middle_block.")):
                tensors[f"control_model.{part}"] = file.get_tensor(name).half()
    channels = [3, 16, 16, 32, 32, 96, 96, 256, 320]
    for i, count in enumerate(channels[1:]):
        layer(f"input_hint_block.{2 * i}", count, channels[i], 3, 3)
    for i, count in enumerate([320] * 4 + [640] * 3 + [1280] * 5):
        layer(f"zero_convs.{i}.0", count, count, 1, 1)
    layer("middle_block_out.0", 1280, 1280, 1, 1)
    save_file(tensors, path)


def test_a_control_net(server: Server, checkout: Path, checkpoint: str) -> None:
    """Its own convolutions are whole: the node patches the model that it steers."""
    from PIL import Image

    path = server.folder / "controlnet" / "random.safetensors"
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(server.folder / "input" / "control.png")
    controlnet(checkout / "models" / "checkpoints" / checkpoint, path)
    try:
        graph = patched(checkpoint)
        for name, model in (("none", "load"), ("eager", "load"), ("strips", "model")):
            graph |= sampling(checkpoint, name, [model, 0])
        graph["net"] = node("ControlNetLoader", control_net_name=path.name)
        graph["image"] = node("LoadImage", image="control.png")
        graph["steered"] = node(
            "ControlNetApplyAdvanced", positive=["text", 0], negative=["text", 0], control_net=["net", 0],
            image=["image", 0], strength=1.0, start_percent=0.0, end_percent=1.0,
        )  # fmt: skip
        for name in ("eager", "strips"):
            graph[f"{name}_sample"]["inputs"] |= {"positive": ["steered", 0], "negative": ["steered", 1]}
        latents = server.run(graph)
    finally:
        path.unlink()  # 700 MB
    assert_same_latent(latents["eager"], latents["strips"])
    assert not torch.allclose(read_latent(latents["none"]), read_latent(latents["eager"]), atol=1e-3)


def test_what_is_saved_is_saved_as_without_it(server: Server, checkpoint: str) -> None:
    graph = patched(checkpoint)
    for name, model, vae in (("eager", "load", "load"), ("strips", "model", "vae")):
        index = 0 if model == "model" else 2
        graph[f"{name}_vae"] = node("VAESave", vae=[vae, index], filename_prefix=f"saved/{name}_vae")
        graph[f"{name}_model"] = node("ModelSave", model=[model, 0], filename_prefix=f"saved/{name}_model")
    server.result(server.queue(graph))
    for kind in ("vae", "model"):
        eager, strips = (saved(server.folder / "output" / "saved", f"{name}_{kind}") for name in ("eager", "strips"))
        assert eager.keys() == strips.keys()
        assert len(eager) > 100
        assert all(torch.equal(eager[name], strips[name]) for name in eager)


def saved(folder: Path, name: str) -> dict[str, torch.Tensor]:
    (path,) = folder.glob(f"{name}*.safetensors")
    weights = load_file(path)
    path.unlink()
    return weights


@pytest.mark.parametrize("method", ["none", "latent2rgb"])
def test_previews_while_it_samples(server: Server, checkpoint: str, method: str) -> None:
    def run(model: list[Any], vae: list[Any], name: str) -> tuple[Graph, int]:
        graph = patched(checkpoint) | sampling(checkpoint, name, model)
        graph[f"{name}_sample"]["inputs"]["steps"] = 3
        graph |= {
            "decode": node("VAEDecode", samples=[f"{name}_sample", 0], vae=vae),
            "image": node("SaveImage", images=["decode", 0], filename_prefix=name),
        }
        with server.messages() as messages:
            files = server.run_batch(graph, preview=method)
        return files, sum(message["type"] == "preview" for message in messages)

    eager, shown = run(["load", 0], ["load", 2], "eager")
    strips, shown_too = run(["model", 0], ["vae", 0], "strips")
    assert (shown, shown_too) == ((0, 0) if method == "none" else (shown, shown))
    assert shown > 0 or method == "none"
    one, other = (read_image(files["image"][0]) for files in (eager, strips))
    assert np.abs(one - other).max() <= 1
