"""`mode: auto` in a running ComfyUI: as without the node where that fits, else streamed, and never in tiles."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from .conftest import Graph, Server, read_image
from .test_server import DEFAULTS, assert_same_image, decoding

AUTO: Graph = DEFAULTS | {"mode": "auto"}


def report(messages: list[Any]) -> dict[str, Any]:
    """What the node is told last."""
    return [message["data"] for message in messages if message["type"] == "patchconv.report"][-1]


def test_with_room_it_runs_as_without_the_node(server: Server, checkpoint: str) -> None:
    latent = server.latent("room", 192)
    with server.messages() as messages:
        images = server.run(decoding(checkpoint, latent, eager=True, patched=AUTO))
    assert np.array_equal(read_image(images["eager"]), read_image(images["patched"]))
    assert re.match(r"auto: eager \(eager needs .* are free\)", report(messages)["words"]["way"])


def test_a_budget_that_eager_exceeds_has_it_streamed(server: Server, checkpoint: str) -> None:
    latent = server.latent("tight", 512)
    server.run(decoding(checkpoint, server.latent("warm", 64), eager=True))
    with server.messages() as messages:
        images = server.run(decoding(checkpoint, latent, eager=True, patched=AUTO | {"budget": 0.5}))
    assert_same_image(images["eager"], images["patched"])
    way = report(messages)["words"]["way"]
    assert re.match(r"auto: streamed in \d+ strips \(eager needs .*, 512 MiB are allowed\)", way)


@pytest.mark.parametrize(("size", "more"), [(640, 1000), pytest.param(1024, 2000, marks=pytest.mark.slow)])
def test_where_memory_runs_out_streaming_takes_over_without_tiles(
    server: Server, checkpoint: str, size: int, more: int
) -> None:
    """Eager takes 1.6 GB for 640² and 4 GB for 1024², streaming half of that or less."""
    images = server.run(decoding(checkpoint, server.latent(f"whole {size}", size), eager=True))
    with server.limited(more << 20), server.messages() as messages:
        alone = server.error(decoding(checkpoint, server.latent(f"alone {size}", size), eager=True))
        streamed = server.run(decoding(checkpoint, server.latent(f"again {size}", size), patched=AUTO))
    assert "memory" in alone
    assert_same_image(images["eager"], streamed["patched"])
    assert "memory ran out eagerly" in report(messages)["words"]["way"]
    assert "tiled" not in server.log().rpartition("memory ran out eagerly")[2]
