"""Patch Conv among the host's other nodes: what they merge, save and show is what it is without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from .conftest import Graph, Server, read_image
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
