"""Patch Conv with ComfyUI-seamless-tiling (spinagon's), which puts a forward of its own on each convolution of a model.

COMFYUI_PACKS: a folder in which the pack's checkout lies; without it these tests are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .conftest import Graph, Server, read_image, read_latent, serve
from .test_server import MODEL, VAE, assert_same_image, assert_same_latent, decode, loader, node, sampling

PACK = "ComfyUI-seamless-tiling"
STRIPS: Graph = {"splits": 3, "threshold": 0.0}


@pytest.fixture(scope="module")
def tiling(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own: what the pack does to a model stays for as long as the host has it in memory."""
    folder = os.environ.get("COMFYUI_PACKS")
    if not folder:
        pytest.skip(f"COMFYUI_PACKS is not set: it names a folder in which {PACK} lies")
    if not (Path(folder) / PACK / "__init__.py").is_file():
        pytest.skip(f"COMFYUI_PACKS is {folder}, where there is no {PACK}")
    yield from serve(checkout, tmp_path_factory.mktemp("seamless"), packs=(Path(folder).resolve() / PACK,))


def seamless_vae(vae: list[Any], tiling: str) -> Graph:
    return node("MakeCircularVAE", vae=vae, tiling=tiling, copy_vae="Make a copy")


def seamless_model(model: list[Any]) -> Graph:
    return node("SeamlessTile", model=model, tiling="enable", copy_model="Make a copy")


@pytest.mark.parametrize("sides", ["enable", "y_only"])
@pytest.mark.parametrize("mode", ["auto", "patch", "stream"])
def test_a_vae(tiling: Server, checkpoint: str, mode: str, sides: str) -> None:
    """Whichever of the two nodes comes first."""
    graph = loader(checkpoint) | {"latent": node("LoadLatent", latent=tiling.latent(f"{mode} {sides}", 128))}
    graph["seamless"] = seamless_vae(["load", 2], sides)
    graph["before"] = node(VAE, vae=["seamless", 0], half="both", mode=mode, budget=0.05, **STRIPS)
    graph["first"] = node(VAE, vae=["load", 2], half="both", mode=mode, budget=0.05, **STRIPS)
    graph["after"] = seamless_vae(["first", 0], sides)
    for name, vae in (("plain", "load"), ("pack", "seamless"), ("pack_first", "before"), ("ours_first", "after")):
        graph |= decode(name, [vae, 2 if vae == "load" else 0], ["latent", 0])
    images = tiling.run(graph)
    assert np.abs(read_image(images["plain"]) - read_image(images["pack"])).max() > 1
    assert_same_image(images["pack"], images["pack_first"])
    assert_same_image(images["pack"], images["ours_first"])


def test_a_model(tiling: Server, checkpoint: str) -> None:
    """As a user works: first a run with Patch Conv, whose model stays loaded; then the pack is added, on either
    side."""
    graph = loader(checkpoint) | {"ours": node(MODEL, model=["load", 0], **STRIPS)}
    plain = tiling.run(graph | sampling(checkpoint, "plain", ["ours", 0]))["plain"]
    graph["ours_first"] = seamless_model(["ours", 0])
    last = tiling.run(graph | sampling(checkpoint, "last", ["ours_first", 0]))["last"]
    graph["seamless"] = seamless_model(["load", 0])
    pack = tiling.run(graph | sampling(checkpoint, "pack", ["seamless", 0]))["pack"]
    graph["pack_first"] = node(MODEL, model=["seamless", 0], **STRIPS)
    first = tiling.run(graph | sampling(checkpoint, "first", ["pack_first", 0]))["first"]
    assert not torch.allclose(read_latent(plain), read_latent(pack), atol=1e-3)
    assert_same_latent(pack, first)
    assert_same_latent(pack, last)
