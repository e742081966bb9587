"""The nodes of partial convolution in a running ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from .conftest import Graph, Server, assert_described, read_image, read_latent
from .test_inside import probe
from .test_server import ALWAYS, STREAM, VAE, assert_same_image, assert_same_latent, decoding, loader, node

ENCODE, FILL = "PatchConv_PartialVAEEncode", "PatchConv_FillMaskedArea"
SIZE = 192
HOLE = (slice(64, 128), slice(80, 150))


def pictures(server: Server) -> None:
    """Two images that differ in the hole only, and masks: the hole, nothing, everything."""
    random = np.random.default_rng(0)
    one = random.integers(0, 256, (SIZE // 16, SIZE // 16, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    other = one.copy()
    other[HOLE] = random.integers(0, 256, other[HOLE].shape)
    hole = np.zeros_like(one)
    hole[HOLE] = 255
    files = {"one": one, "other": other, "hole": hole, "nothing": hole * 0, "everything": hole * 0 + 255}
    for name, pixels in files.items():
        Image.fromarray(pixels).save(server.folder / "input" / f"{name}.png")


def images(*names: str) -> Graph:
    return {name: node("LoadImage", image=f"{name}.png") for name in names}


def masks(*names: str) -> Graph:
    return {name: node("LoadImageMask", image=f"{name}.png", channel="red") for name in names}


def encoding(name: str, image: str, mask: str, vae: list[Any] | None = None) -> Graph:
    encoder = node(ENCODE, pixels=[image, 0], vae=vae or ["load", 2], mask=[mask, 0], grow_mask_by=6)
    return {f"{name}_encode": encoder, name: node("SaveLatent", samples=[f"{name}_encode", 0], filename_prefix=name)}


def eager_encoding(name: str, image: str) -> Graph:
    encoder = node("VAEEncode", pixels=[image, 0], vae=["load", 2])
    return {f"{name}_encode": encoder, name: node("SaveLatent", samples=[f"{name}_encode", 0], filename_prefix=name)}


def filling(name: str, image: str, mask: str, edge_aware: bool = False) -> Graph:
    return {
        f"{name}_fill": node(FILL, image=[image, 0], mask=[mask, 0], edge_aware=edge_aware),
        name: node("SaveImage", images=[f"{name}_fill", 0], filename_prefix=name),
    }


@pytest.fixture(autouse=True)
def _pictures(server: Server) -> None:
    pictures(server)


@pytest.mark.parametrize("kind", [ENCODE, FILL])
def test_object_info_and_help(server: Server, kind: str) -> None:
    beside = "VAEEncodeForInpaint" if kind == ENCODE else "ImagePadForOutpaint"
    assert_described(server, kind, "(Partial Conv)", beside)


def test_the_latent_does_not_change_with_the_pixels_under_the_mask(server: Server, checkpoint: str) -> None:
    graph = loader(checkpoint) | images("one", "other") | masks("hole")
    for image in ("one", "other"):
        graph |= encoding(f"{image}_ours", image, "hole") | eager_encoding(f"{image}_host", image)
    found = {name: read_latent(path) for name, path in server.run(graph).items()}
    assert torch.equal(found["one_ours"], found["other_ours"])
    change = float((found["one_host"] - found["other_host"]).abs().max())
    print(f"largest change of the host's own latent: {change:.3f}")
    assert change > 0.01
    assert not torch.allclose(found["one_ours"], found["one_host"], atol=0.01)


def test_an_empty_mask_gives_what_vae_encode_gives(server: Server, checkpoint: str) -> None:
    graph = loader(checkpoint) | images("one") | masks("nothing")
    found = server.run(graph | encoding("ours", "one", "nothing") | eager_encoding("host", "one"))
    assert torch.equal(read_latent(found["ours"]), read_latent(found["host"]))


@pytest.mark.parametrize("patch", [ALWAYS, STREAM], ids=["patch", "stream"])
def test_after_patch_conv(server: Server, checkpoint: str, patch: Graph) -> None:
    graph = (
        loader(checkpoint) | images("one") | masks("hole") | {"patch": node(VAE, vae=["load", 2], half="both", **patch)}
    )
    found = server.run(graph | encoding("alone", "one", "hole") | encoding("patched", "one", "hole", ["patch", 0]))
    assert_same_latent(found["alone"], found["patched"])


def test_batches_are_encoded_image_by_image(server: Server, checkpoint: str) -> None:
    graph = loader(checkpoint) | images("one", "other") | masks("hole")
    graph["both"] = node("ImageBatch", image1=["one", 0], image2=["other", 0])
    found = server.run(graph | encoding("alone", "one", "hole") | encoding("batch", "both", "hole"))
    alone, batch = read_latent(found["alone"]), read_latent(found["batch"])
    assert torch.equal(batch, torch.cat([alone, alone]))


def test_inpainting(server: Server, checkpoint: str) -> None:
    """Encode, sample the hole, decode: what is far from it stays as an eager encode and decode has it."""
    graph = loader(checkpoint) | images("one") | masks("hole")
    graph["encode"] = node(ENCODE, pixels=["one", 0], vae=["load", 2], mask=["hole", 0], grow_mask_by=0)
    graph |= {
        "text": node("CLIPTextEncode", text="a cat", clip=["load", 1]),
        "sample": node(
            "KSampler", model=["load", 0], positive=["text", 0], negative=["text", 0], latent_image=["encode", 0],
            seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0,
        ),
        "sampled": node("SaveLatent", samples=["sample", 0], filename_prefix="sampled"),
        "encoded": node("SaveLatent", samples=["encode", 0], filename_prefix="encoded"),
    }  # fmt: skip
    found = server.run(graph)
    sampled, encoded = read_latent(found["sampled"]), read_latent(found["encoded"])
    inside = (slice(None), slice(None), slice(9, 15), slice(11, 18))
    changed = (sampled - encoded).abs()
    assert changed[inside].min() > 0
    changed[..., 7:17, 9:20] = 0
    assert changed.max() < 1e-4


@pytest.mark.parametrize("edge_aware", [False, True])
def test_fill(server: Server, edge_aware: bool) -> None:
    found = server.run(
        images("one", "other")
        | masks("hole")
        | filling("ours", "one", "hole", edge_aware)
        | filling("again", "other", "hole", edge_aware)
    )
    filled, before = read_image(found["ours"]), read_image(server.folder / "input" / "one.png")
    outside = np.ones((SIZE, SIZE), dtype=bool)
    outside[HOLE] = False
    assert np.array_equal(filled[outside], before[outside])
    assert np.array_equal(filled, read_image(found["again"]))
    assert not np.array_equal(filled[HOLE], before[HOLE])


def test_fill_refuses_a_mask_of_everything(server: Server) -> None:
    graph = images("one") | masks("everything") | filling("ours", "one", "everything")
    assert "covers a whole image" in server.error(graph)


def test_partial_padding_in_both_modes(server: Server, checkpoint: str) -> None:
    latent = server.latent("padding", 128)
    found: dict[str, Path] = {}
    for name, settings in (("patch", ALWAYS), ("stream", STREAM)):
        graph = decoding(checkpoint, latent, eager=True, patched=settings | {"padding": "partial"})
        result = server.run(graph)
        found |= {name: result["patched"], "eager": result["eager"]}
    assert_same_image(found["patch"], found["stream"])
    difference = np.abs(read_image(found["patch"]) - read_image(found["eager"]))
    assert difference.max() > 1


def test_holes_in_all_families(checkout: Path) -> None:
    """Every VAE that this ComfyUI can build: no bit of the latent depends on what is masked; strips change nothing."""
    answer = probe(checkout, "holes")
    for family, found in answer.items():
        print(family, found)
    there = [found for found in answer.values() if "not here" not in found]
    assert all(isinstance(found, dict) and found["same"] and found["strips"] <= 1e-5 for found in there)
    assert len(there) >= 10
