"""Upscale Image (Patch Conv) in a running ComfyUI: the same picture, less memory, frame by frame, and what is refused.

The host's own node cuts tiles of 512: a smaller picture is a single one, and so the model run on the whole.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from host_process import assert_same_picture
from PIL import Image
from safetensors.torch import save_file
from upscale_weights import NO_REAL_WEIGHTS, compact, esrgan, real_esrgan, scene

from .conftest import Graph, Server, assert_described, read_image
from .test_server import node

UPSCALE = "PatchConv_UpscaleImage"


@pytest.fixture(scope="module", autouse=True)
def models(server: Server) -> None:
    folder = server.folder / "upscale_models"
    save_file(esrgan(32), folder / "esrgan.safetensors")
    save_file(compact(), folder / "compact.safetensors")
    save_file(compact(channels=1), folder / "grey.safetensors")


def loading(server: Server, width: int, height: int, model: str = "esrgan", seed: int = 0) -> Graph:
    """A model, and a smooth picture with noise."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.3, 1, height)[:, None, None]
    pixels = (slope + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)
    name = f"{width}x{height}-{seed}.png"
    Image.fromarray(pixels).save(server.folder / "input" / name)
    return {
        "model": node("UpscaleModelLoader", model_name=f"{model}.safetensors"),
        "load": node("LoadImage", image=name),
    }


def upscaling(name: str, kind: str = UPSCALE, image: tuple[str, int] = ("load", 0), **inputs: Any) -> Graph:
    inputs = {"budget": 0.0, **inputs} if kind == UPSCALE else inputs
    return {
        f"{name}_scale": node(kind, upscale_model=["model", 0], image=[*image], **inputs),
        name: node("SaveImage", images=[f"{name}_scale", 0], filename_prefix=name),
    }


def whole(name: str = "whole") -> Graph:
    return upscaling(name, "ImageUpscaleWithModel")


def test_object_info_and_help(server: Server) -> None:
    assert_described(server, UPSCALE, "Upscale Image (Patch Conv)", "ImageUpscaleWithModel")
    shown = server.get("/object_info")[UPSCALE]
    if "search_aliases" in shown:
        assert {"patchconv", "upscaler", "esrgan"} <= set(shown["search_aliases"])


@pytest.mark.parametrize("model", ["esrgan", "compact"])
def test_the_same_picture(server: Server, model: str) -> None:
    graph = loading(server, 120, 176, model) | whole() | upscaling("ours") | upscaling("small", budget=0.1)
    files = server.run(graph)
    expected = read_image(files["whole"])
    assert expected.shape == (4 * 176, 4 * 120, 3)
    for name in ("ours", "small"):
        assert_same_picture(read_image(files[name]), expected)


def test_in_less_memory_with_progress_and_figures(server: Server) -> None:
    server.run(loading(server, 16, 16, seed=1) | whole() | upscaling("ours"))  # the weights are in memory from here on
    expected, whole_peak = server.peak_of(lambda: server.run(loading(server, 288, 320, seed=2) | whole()))
    with server.messages() as messages:
        files, peak = server.peak_of(lambda: server.run(loading(server, 288, 320, seed=2) | upscaling("ours")))
    print(f"whole {whole_peak / 2**20:.0f} MiB, streamed {peak / 2**20:.0f} MiB")
    assert_same_picture(read_image(files["ours"]), read_image(expected["whole"]))
    assert peak < 0.6 * whole_peak
    shown = [m["data"] for m in messages if m["type"] == "progress" and m["data"]["node"] == "ours_scale"]
    values = [entry["value"] / entry["max"] for entry in shown]
    assert len(values) > 3
    assert values == sorted(values)
    told = [m["data"] for m in messages if m["type"] == "patchconv.report"]
    assert {report["node"] for report in told} == {"ours_scale"}
    last = told[-1]
    print(last["line"])
    assert last["state"] == "done"
    assert last["line"].startswith("upscaling streamed in ")
    assert last["strips"] > 3
    assert last["eager"] > last["peak"] > 1 << 20
    assert last["timeline"]


def test_a_batch_goes_frame_by_frame(server: Server) -> None:
    graph = loading(server, 40, 48, seed=3)
    other = loading(server, 40, 48, seed=4)
    graph["other"] = other["load"]
    graph["both"] = node("ImageBatch", image1=["load", 0], image2=["other", 0])
    graph |= upscaling("ours", image=("both", 0)) | upscaling("alone", image=("other", 0))
    files = server.run_batch(graph)
    assert len(files["ours"]) == 2
    assert_same_picture(read_image(files["ours"][1]), read_image(files["alone"][0]))
    first, second = (read_image(file) for file in files["ours"])
    assert np.abs(first - second).mean() > 1


def test_interrupt(server: Server) -> None:
    graph = loading(server, 640, 1024, seed=5) | upscaling("ours")
    with server.messages() as messages:
        prompt = server.queue(graph)
        while not any(m["type"] == "progress" and m["data"]["node"] == "ours_scale" for m in messages):
            server.check()
            time.sleep(0.05)
        asked = time.monotonic()
        server.get("/interrupt", {})
        history = server.result(prompt)
    print(f"stopped after {time.monotonic() - asked:.2f} s")
    assert history["status"]["messages"][-1][0] == "execution_interrupted"
    assert [m["data"]["state"] for m in messages if m["type"] == "patchconv.report"][-1] == "stopped"
    files = server.run(loading(server, 40, 40, seed=6) | whole() | upscaling("ours"))
    assert_same_picture(read_image(files["ours"]), read_image(files["whole"]))


def test_alpha_is_refused_in_a_sentence(server: Server) -> None:
    graph = loading(server, 16, 16, seed=7)
    graph["joined"] = node("JoinImageWithAlpha", image=["load", 0], alpha=["load", 1])
    error = server.error(graph | upscaling("ours", image=("joined", 0)))
    assert "The image has 4 channels and this upscale model (ESRGAN) takes 3: take the alpha off first" in error


def test_a_model_for_grey_pictures_is_refused_in_a_sentence(server: Server) -> None:
    error = server.error(loading(server, 16, 16, "grey", seed=8) | upscaling("ours"))
    assert "takes 1: choose a model for 3" in error


def test_the_loaded_model_is_as_it_was(server: Server) -> None:
    graph = loading(server, 64, 64, seed=9)
    before = read_image(server.run(graph | whole())["whole"])
    server.run(graph | upscaling("ours", budget=0.5))
    graph["load"] = loading(server, 64, 64, seed=10)["load"]
    server.run(graph | whole())
    graph["load"] = loading(server, 64, 64, seed=9)["load"]
    assert np.array_equal(read_image(server.run(graph | whole("again"))["again"]), before)


@pytest.mark.slow
def test_real_weights_at_512(server: Server) -> None:
    """RealESRGAN x4plus: the picture of the model run on the whole, in less than two fifths of its memory."""
    weights = real_esrgan()
    if weights is None:
        pytest.skip(NO_REAL_WEIGHTS)
    save_file(weights, server.folder / "upscale_models" / "real.safetensors")
    small = loading(server, 16, 16, "real", seed=11)
    server.run(small | whole() | upscaling("ours"))
    Image.fromarray(scene(512).numpy()).save(server.folder / "input" / "scene.png")
    graph = small | {"load": node("LoadImage", image="scene.png")}
    expected, whole_peak = server.peak_of(lambda: server.run(graph | whole("larger")))
    files, peak = server.peak_of(lambda: server.run(graph | upscaling("larger_too")))
    print(f"whole {whole_peak / 2**20:.0f} MiB, streamed {peak / 2**20:.0f} MiB")
    assert_same_picture(read_image(files["larger_too"]), read_image(expected["larger"]))
    assert peak < 0.4 * whole_peak
