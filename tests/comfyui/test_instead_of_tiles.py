"""The setting that has a VAE streamed where the host would go on in tiles, in a running ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import Graph, Server, read_image
from .test_server import assert_same_image, assert_same_latent, decoding, loader, node

SETTING = "PatchConv.InsteadOfTiles"
TILED = "retrying with tiled VAE"


@pytest.fixture
def asked(server: Server) -> Iterator[Server]:
    server.set(**{SETTING: True})
    yield server
    server.set()


def encoding(checkpoint: str, seed: int) -> Graph:
    """Load an image, encode it whole, save the latent as `latent`."""
    image = node("EmptyImage", width=768, height=768, batch_size=1, color=seed)
    return loader(checkpoint) | {
        "image": image,
        "encode": node("VAEEncode", pixels=["image", 0], vae=["load", 2]),
        "latent": node("SaveLatent", samples=["encode", 0], filename_prefix=f"latent{seed}"),
    }


def in_little_memory(server: Server, graph: Graph, more: int) -> tuple[dict[str, Any], str]:
    """What a graph gives in so many bytes more than the server has, and what it logged meanwhile."""
    before = len(server.log())
    with server.limited(more):
        files = server.run(graph)
    return files, server.log()[before:]


def test_a_decode_that_runs_out_of_memory_is_streamed(asked: Server, checkpoint: str) -> None:
    whole = asked.run(decoding(checkpoint, asked.latent("whole", 640), eager=True))
    graph = decoding(checkpoint, asked.latent("streamed", 640), eager=True)
    streamed, told = in_little_memory(asked, graph, 1000 << 20)
    assert TILED in told
    assert "Patch Conv: decode is streamed instead of tiled." in told
    assert_same_image(whole["eager"], streamed["eager"])


def test_an_encode_that_runs_out_of_memory_is_streamed(asked: Server, checkpoint: str) -> None:
    whole = asked.run(encoding(checkpoint, 0x4060A0))
    graph = encoding(checkpoint, 0x4060A0) | {"latent": node("SaveLatent", samples=["encode", 0], filename_prefix="b")}
    graph["encode"] = node("VAEEncode", pixels=["again", 0], vae=["load", 2])
    graph["again"] = graph.pop("image")
    streamed, told = in_little_memory(asked, graph, 800 << 20)
    assert TILED in told
    assert "Patch Conv: encode is streamed instead of tiled." in told
    assert_same_latent(whole["latent"], streamed["latent"])


def test_what_asks_for_tiles_gets_them(asked: Server, checkpoint: str) -> None:
    before = len(asked.log())
    graph = decoding(checkpoint, asked.latent("tiles", 192), eager=True)
    name = next(name for name, one in graph.items() if one["class_type"] == "VAEDecode")
    graph[name] = node(
        "VAEDecodeTiled", samples=["latent", 0], vae=["load", 2], tile_size=64, overlap=32, temporal_size=64,
        temporal_overlap=8,
    )  # fmt: skip
    tiled = asked.run(graph)
    whole = asked.run(decoding(checkpoint, asked.latent("no tiles", 192), eager=True))
    assert abs(read_image(tiled["eager"]) - read_image(whole["eager"])).max() > 1
    assert "instead of tiled" not in asked.log()[before:]


def test_while_it_is_off_the_host_tiles_as_before(server: Server, checkpoint: str) -> None:
    graph = decoding(checkpoint, server.latent("off", 640), eager=True)
    _, told = in_little_memory(server, graph, 1000 << 20)
    assert TILED in told
    assert "Patch Conv" not in told
