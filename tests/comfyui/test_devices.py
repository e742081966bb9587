"""One picture over several devices in a running ComfyUI: here its own process and two workers, on the CPU."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_process import is_there
from PIL import Image
from processes import until
from safetensors.torch import save_file
from upscale_weights import esrgan

from .conftest import Graph, Server, serve
from .test_server import DEFAULTS, STREAM, VAE, assert_same_image, assert_same_latent, decode, decoding, loader, node
from .test_upscale import loading, upscaling

ALL: Graph = STREAM | {"devices": "all"}


@pytest.fixture(scope="module")
def spread_server(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHCONV_CPU_WORKERS", "2")
        patch.setenv("PYTHONPATH", str(Path(__file__).with_name("in_workers")), prepend=os.pathsep)
        yield from serve(checkout, tmp_path_factory.mktemp("spread"))


def told(messages: list[Any]) -> str:
    """The last that was said of what ran."""
    return [m["data"]["line"] for m in messages if m["type"] == "patchconv.report"][-1]


def test_the_same_picture(spread_server: Server, checkpoint: str) -> None:
    server, latent = spread_server, spread_server.latent("devices", 256)
    with server.messages() as messages:
        one = server.run(decoding(checkpoint, latent, patched=STREAM))
    assert "over" not in told(messages)
    assert not server.workers()
    with server.messages() as messages:
        many = server.run(decoding(checkpoint, latent, patched=ALL))
    assert "over 3 processes" in told(messages)
    assert_same_image(one["patched"], many["patched"])
    before = server.workers()
    assert len(before) == 2
    settings = DEFAULTS | {"mode": "auto", "budget": 0.01, "devices": "2"}
    with server.messages() as messages:
        two = server.run(decoding(checkpoint, latent, patched=settings))
    assert "over 2 processes" in told(messages)
    assert_same_image(one["patched"], two["patched"])
    assert server.workers() == before


def test_encode(spread_server: Server, checkpoint: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 192, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(spread_server.folder / "input" / "noise.png")
    graph = loader(checkpoint) | {"image": node("LoadImage", image="noise.png")}
    graph["patch"] = node(VAE, vae=["load", 2], half="encoder", **ALL)
    for name, vae in (("eager", ["load", 2]), ("over", ["patch", 0])):
        graph[f"{name}_encode"] = node("VAEEncode", pixels=["image", 0], vae=vae)
        graph[name] = node("SaveLatent", samples=[f"{name}_encode", 0], filename_prefix=name)
    with spread_server.messages() as messages:
        latents = spread_server.run(graph)
    assert "over 3 processes" in told(messages)
    assert_same_latent(latents["eager"], latents["over"])


def test_interrupt(spread_server: Server, checkpoint: str) -> None:
    server = spread_server
    server.run(decoding(checkpoint, server.latent("warm", 128), patched=ALL))
    before = server.workers()
    graph = decoding(checkpoint, server.latent("long", 1024), patched=ALL)
    shown = server.interrupted(graph, "patched_decode")
    assert shown[-1] < 900  # of a thousand: it does not go on to the end
    latent = server.latent("next", 256, seed=4)
    with server.messages() as messages:
        images = server.run(decoding(checkpoint, latent, eager=True, patched=ALL))
    assert "over 3 processes" in told(messages)
    assert_same_image(images["eager"], images["patched"])
    assert server.workers() == before


def test_a_worker_that_is_killed(spread_server: Server, checkpoint: str) -> None:
    server = spread_server
    server.run(decoding(checkpoint, server.latent("warm", 128, seed=1), patched=ALL))
    first, second = server.workers()
    latent = server.latent("killed", 320)
    graph = decoding(checkpoint, latent, patched=ALL)
    with server.messages() as messages:
        prompt = server.queue(graph)
        while not any(m["type"] == "progress" and m["data"]["node"] == "patched_decode" for m in messages):
            server.check()
            time.sleep(0.05)
        os.kill(first, signal.SIGKILL)
        history = server.result(prompt)
    assert history["status"]["status_str"] == "success", history["status"]
    line = told(messages)
    assert f"on one device: rank 1 (cpu, process {first}) was ended by signal 9" in line
    killed = {name: [server._file(one) for one in out["images"]] for name, out in history["outputs"].items()}
    graph = loader(checkpoint) | {"latent": node("LoadLatent", latent=latent)}
    graph |= decode("eager", ["load", 2], ["latent", 0])
    assert_same_image(server.run(graph)["eager"], killed["patched"][0])
    with server.messages() as messages:
        server.run(decoding(checkpoint, server.latent("again", 256, seed=2), patched=ALL))
    assert "over 3 processes" in told(messages)
    assert second in server.workers()
    assert len(server.workers()) == 2


def test_upscaling(spread_server: Server) -> None:
    save_file(esrgan(32), spread_server.folder / "upscale_models" / "esrgan.safetensors")
    graph = loading(spread_server, 96, 128) | upscaling("one") | upscaling("over", devices="all")
    with spread_server.messages() as messages:
        files = spread_server.run(graph)
    lines = {m["data"]["node"]: m["data"]["line"] for m in messages if m["type"] == "patchconv.report"}
    assert "over 3 processes" in lines["over_scale"]
    assert "over" not in lines["one_scale"]
    assert_same_image(files["one"], files["over"])


def test_no_process_is_left(spread_server: Server) -> None:
    """Whatever ends the host."""
    before = spread_server.workers()
    assert before
    spread_server.kill()
    until(lambda: not any(is_there(pid) for pid in before))
