"""What the server tells the front end of a run behind Patch Conv, and what Patch Conv Report says."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from host_process import TIME
from safetensors.torch import save_file

from .conftest import Graph, Server, read_image
from .test_server import ALWAYS, DEFAULTS, MODEL, STREAM, assert_same_image, decoding, loader, node, sampling

REPORT = "PatchConv_Report"


def run_and_listen(server: Server, graph: Graph) -> tuple[Any, list[Any], float]:
    """History of a prompt that succeeds, what was told of Patch Conv meanwhile, and the seconds it took."""
    with server.messages() as messages:
        start = time.monotonic()
        history = server.result(server.queue(graph))
        seconds = time.monotonic() - start
    assert history["status"]["status_str"] == "success", history["status"]
    return history, [message["data"] for message in messages if message["type"] == "patchconv.report"], seconds


@pytest.mark.parametrize(
    ("settings", "size", "way"),
    [
        (ALWAYS, 128, "in up to 5 strips"),
        (STREAM, 384, r"streamed in \d+ strips"),
        (STREAM, 128, "eager, for strips would not help"),
    ],
    ids=["patch", "stream", "stream where it is no help"],
)
def test_decode(server: Server, checkpoint: str, settings: Graph, size: int, way: str) -> None:
    """One run, told with the figures of that run, and nothing of the branch without us."""
    server.run(decoding(checkpoint, server.latent("warm", 64), eager=True))
    graph = decoding(checkpoint, server.latent("report", size, seed=len(settings) + size), eager=True, patched=settings)
    history, told, seconds = run_and_listen(server, graph)
    assert {report["node"] for report in told} == {"patch"}
    assert {report["prompt"] for report in told} == {history["prompt"][1]}
    assert [report["state"] for report in told] == ["running"] * (len(told) - 1) + ["done"]
    last = told[-1]
    print(last["line"])
    assert re.fullmatch(
        rf"VAE decoder {way}, peak \d+ MiB \(without Patch Conv: (at least \d+ MiB, counted|not measured)\), {TIME}",
        last["line"],
    )
    assert last["strips"] == 0 if "eager" in way else last["strips"] > 1
    assert 0 < last["seconds"] < seconds
    assert last["eager"] >= last["peak"] > 1 << 20 if "at least" in last["line"] else last["eager"] == 0
    times, sizes = zip(*last["timeline"], strict=True)
    assert list(times) == sorted(times)
    assert times[-1] <= last["seconds"]
    assert 0 < max(sizes) <= last["peak"]


def test_decode_with_nothing_large_enough(server: Server, checkpoint: str) -> None:
    graph = decoding(checkpoint, server.latent("tiny", 64, seed=8), patched=DEFAULTS)
    _, told, _ = run_and_listen(server, graph)
    assert told[-1]["words"]["way"] == "whole (no convolution above the threshold)"
    assert told[-1]["eager"] == 0


def test_batch_is_one_run(server: Server, checkpoint: str) -> None:
    """Whether the host decodes a batch at once or in parts; and a tiled decode, which calls the VAE for each tile."""
    graph = loader(checkpoint) | {
        "latent": node("LoadLatent", latent=server.latent("batch", 64, seed=9)),
        "batch": node("RepeatLatentBatch", samples=["latent", 0], amount=3),
        "patch": node("PatchConv_VAE", vae=["load", 2], half="decoder", **ALWAYS),
        "decode": node("VAEDecode", samples=["batch", 0], vae=["patch", 0]),
        "save": node("PreviewImage", images=["decode", 0]),
    }
    _, told, _ = run_and_listen(server, graph)
    assert sum(report["state"] == "done" for report in told) >= 1
    whole = told[-1]
    graph["latent"]["inputs"]["latent"] = server.latent("tiles", 96, seed=10)
    graph["decode"] = node(
        "VAEDecodeTiled", samples=["latent", 0], vae=["patch", 0], tile_size=64, overlap=16, temporal_size=64,
        temporal_overlap=8,
    )  # fmt: skip
    _, told, seconds = run_and_listen(server, graph)
    tiled = told[-1]
    print(whole["line"], tiled["line"])
    assert tiled["prompt"] != whole["prompt"]
    assert tiled["seconds"] < seconds
    assert tiled["timeline"][-1][0] <= tiled["seconds"]


def test_a_node_that_a_loop_makes_again_is_told_as_the_one_that_is_seen(server: Server, checkpoint: str) -> None:
    graph = loader(checkpoint) | {"latent": node("LoadLatent", latent=server.latent("looped", 64, seed=11))}
    graph["loop"] = node("Test_Looped", vae=["load", 2], samples=["latent", 0], of="7")
    graph["save"] = node("PreviewImage", images=["loop", 0])
    _, told, _ = run_and_listen(server, graph)
    assert {report["node"] for report in told} == {"7"}


def test_sampling(server: Server, checkpoint: str) -> None:
    graph = loader(checkpoint) | {"patch": node(MODEL, model=["load", 0], **ALWAYS)}
    graph |= sampling(checkpoint, "strips", ["patch", 0])
    graph["report"] = node(REPORT, after=["strips_sample", 0], model=["patch", 0])
    history, told, seconds = run_and_listen(server, graph)
    last = told[-1]
    print(last["line"])
    assert (last["node"], last["part"], last["state"]) == ("patch", "Model", "done")
    assert last["strips"] == 4  # of 4 of 16 rows
    assert 0 < last["seconds"] < seconds
    assert last["peak"] > 0
    assert "without Patch Conv: " in last["line"]
    assert history["outputs"]["report"]["text"] == [f"Patch Conv: {last['line']}"]


def test_report_node(server: Server, checkpoint: str) -> None:
    """Text and plot of the run before it; that run's where ComfyUI has kept the result; the image passes through."""
    graph = decoding(checkpoint, server.latent("node", 64, seed=3), patched=ALWAYS)
    graph["report"] = node(REPORT, after=["patched_decode", 0], vae=["patch", 0])
    graph["plot"] = node("SaveImage", images=["report", 1], filename_prefix="plot")
    graph["passed"] = node("SaveImage", images=["report", 2], filename_prefix="passed")
    history, told, _ = run_and_listen(server, graph)
    assert history["outputs"]["report"]["text"] == [f"Patch Conv: {told[-1]['line']}"]
    files = server.run(graph | {"again": node(REPORT, after=["patched_decode", 0], vae=["patch", 0])})
    assert read_image(files["plot"]).shape == (480, 1024, 3)
    assert read_image(files["again"]).shape == (480, 1024, 3)
    assert_same_image(files["patched"], files["passed"])

    other = graph | {"other": node(REPORT, after=["latent", 0], vae=["patch", 0])}
    del other["report"], other["plot"], other["passed"]
    history, told, _ = run_and_listen(server, other)
    assert not told
    assert "measured in an earlier run" in history["outputs"]["other"]["text"][0]


def test_report_without_a_run(server: Server, checkpoint: str) -> None:
    graph = decoding(checkpoint, server.latent("unused", 64, seed=4), patched=ALWAYS | {"splits": 7})
    graph |= {"report": node(REPORT, after=["latent", 0], vae=["patch", 0])}
    del graph["patched_decode"], graph["patched"]
    history, told, _ = run_and_listen(server, graph)
    assert not told
    assert "nothing was measured" in history["outputs"]["report"]["text"][0]


@pytest.mark.parametrize("connected", [{"vae": ["load", 2]}, {}], ids=["bypassed", "muted"])
def test_report_on_nothing_of_ours(server: Server, checkpoint: str, connected: Graph) -> None:
    """As the front end sends a workflow whose Patch Conv is bypassed or muted: the job goes on."""
    graph = decoding(checkpoint, server.latent("bypassed", 64, seed=5), eager=True)
    graph["report"] = node(REPORT, after=["eager_decode", 0], **connected)
    graph["plot"] = node("SaveImage", images=["report", 1], filename_prefix="empty")
    history, _, _ = run_and_listen(server, graph)
    assert "Connect vae to Patch Conv (VAE)" in history["outputs"]["report"]["text"][0]
    assert history["outputs"]["plot"]["images"]


def test_a_decode_that_fails_is_told_as_stopped(server: Server, checkpoint: str) -> None:
    graph = decoding(checkpoint, server.latent("channels", 64, seed=6), patched=ALWAYS)
    noise = torch.randn(1, 5, 8, 8)
    save_file({"latent_tensor": noise, "latent_format_version_0": torch.tensor([])},
              server.folder / "input" / "channels.latent")  # fmt: skip
    with server.messages() as messages:
        server.error(graph)
    told = [message["data"] for message in messages if message["type"] == "patchconv.report"]
    assert told[-1]["state"] == "stopped"
    assert told[-1]["line"].endswith(", stopped")
