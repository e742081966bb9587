"""The setting that has a VAE streamed where memory runs out, instead of tiles or an error, in a running ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import Graph, Server, read_image
from .test_server import DEFAULTS, VAE, assert_same_image, assert_same_latent, decoding, loader, node

SETTING = "PatchConv.InsteadOfTiles"
TILED, STREAMED = "retrying with tiled VAE", "is streamed instead of tiled."


@pytest.fixture
def asked(server: Server) -> Iterator[Server]:
    server.set(**{SETTING: True})
    yield server
    server.set()


def short(graph: Graph) -> Graph:
    """The same graph with a VAE that runs out of memory once, as a graphics card does."""
    for one in graph.values():
        one["inputs"] = {name: ["short", 0] if name == "vae" else value for name, value in one["inputs"].items()}
    return graph | {"short": node("Test_ShortOfMemory", vae=["load", 2])}


def encoding(checkpoint: str, name: str) -> Graph:
    """Load a picture, encode it all at once, save the latent as `latent`."""
    return loader(checkpoint) | {
        "image": node("LoadImage", image=name),
        "encode": node("VAEEncode", pixels=["image", 0], vae=["load", 2]),
        "latent": node("SaveLatent", samples=["encode", 0], filename_prefix=name),
    }


def told(server: Server, graph: Graph) -> tuple[dict[str, Any], str]:
    """The files that a graph writes, and what the host logged meanwhile."""
    before = len(server.log())
    return server.run(graph), server.log()[before:]


def test_a_decode_is_streamed_instead_of_tiled(asked: Server, checkpoint: str) -> None:
    whole = asked.run(decoding(checkpoint, asked.latent("whole", 256), eager=True))
    streamed, log = told(asked, short(decoding(checkpoint, asked.latent("short", 256), eager=True)))
    assert TILED in log
    assert f"Patch Conv: decode {STREAMED}" in log
    assert_same_image(whole["eager"], streamed["eager"])


def test_an_encode_is_streamed_instead_of_tiled(asked: Server, checkpoint: str) -> None:
    picture = asked.run(decoding(checkpoint, asked.latent("picture", 256), eager=True))["eager"]
    (asked.folder / "input" / "picture.png").write_bytes(picture.read_bytes())
    whole = asked.run(encoding(checkpoint, "picture.png"))
    streamed, log = told(asked, short(encoding(checkpoint, "picture.png")))
    assert TILED in log
    assert f"Patch Conv: encode {STREAMED}" in log
    assert_same_latent(whole["latent"], streamed["latent"])


def test_the_other_half_may_be_streamed_by_a_node(asked: Server, checkpoint: str) -> None:
    graph = decoding(checkpoint, asked.latent("half", 192), eager=True)
    whole = asked.run(graph)
    graph["latent"]["inputs"]["latent"] = asked.latent("other half", 192)
    graph = short(graph)
    graph["node"] = node(VAE, vae=["short", 0], half="encoder", mode="stream", **DEFAULTS)
    graph["eager_decode"]["inputs"]["vae"] = ["node", 0]
    streamed, log = told(asked, graph)
    assert f"Patch Conv: decode {STREAMED}" in log
    assert_same_image(whole["eager"], streamed["eager"])


def test_while_it_is_off_the_host_tiles_as_before(server: Server, checkpoint: str) -> None:
    _, log = told(server, short(decoding(checkpoint, server.latent("off", 192), eager=True)))
    assert TILED in log
    assert STREAMED not in log


def test_what_asks_for_tiles_gets_them(asked: Server, checkpoint: str) -> None:
    graph = decoding(checkpoint, asked.latent("tiles", 192), eager=True)
    tiles: Graph = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    graph["eager_decode"] = node("VAEDecodeTiled", samples=["latent", 0], vae=["load", 2], **tiles)
    tiled, log = told(asked, graph)
    whole = asked.run(decoding(checkpoint, asked.latent("no tiles", 192), eager=True))
    assert abs(read_image(tiled["eager"]) - read_image(whole["eager"])).max() > 1
    assert STREAMED not in log


def test_where_the_host_has_no_tiles_to_turn_to(asked: Server, checkpoint: str) -> None:
    """On a CPU, where memory really runs out, the decode would end in an error."""
    whole = asked.run(decoding(checkpoint, asked.latent("much", 640), eager=True))
    with asked.limited(1000 << 20):  # eager takes 1.6 GB, streaming half of that
        streamed, log = told(asked, decoding(checkpoint, asked.latent("little", 640), eager=True))
    assert f"Patch Conv: decode {STREAMED}" in log
    assert_same_image(whole["eager"], streamed["eager"])
