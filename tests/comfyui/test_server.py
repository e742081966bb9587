"""The nodes in a running ComfyUI: same results, less memory, other branches untouched."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_process import assert_same_picture
from safetensors.torch import save_file

from .conftest import Graph, Server, read_image, read_latent

VAE, MODEL = "PatchConv_VAE", "PatchConv_Model"
ALWAYS: Graph = {"splits": 5, "threshold": 0.0}
DEFAULTS: Graph = {"splits": 0, "threshold": 16.0}
STREAM: Graph = DEFAULTS | {"mode": "stream"}


def node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def loader(checkpoint: str) -> Graph:
    return {"load": node("CheckpointLoaderSimple", ckpt_name=checkpoint)}


def decode(name: str, vae: list[Any], latent: list[Any]) -> Graph:
    return {
        f"{name}_decode": node("VAEDecode", samples=latent, vae=vae),
        name: node("SaveImage", images=[f"{name}_decode", 0], filename_prefix=name),
    }


def decoding(checkpoint: str, latent: str, *, eager: bool = False, patched: Graph | None = None) -> Graph:
    """Loader -> (Patch Conv ->) decode -> save as `eager` and `patched`, one or both."""
    graph = loader(checkpoint) | {"latent": node("LoadLatent", latent=latent)}
    if eager:
        graph |= decode("eager", ["load", 2], ["latent", 0])
    if patched is not None:
        graph["patch"] = node(VAE, vae=["load", 2], half="both", **patched)
        graph |= decode("patched", ["patch", 0], ["latent", 0])
    return graph


def sampling(checkpoint: str, name: str, model: list[Any]) -> Graph:
    """One step of the sampler at 128 pixels, saved as a latent under `name`."""
    return {
        "text": node("CLIPTextEncode", text="a cat", clip=["load", 1]),
        "empty": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        f"{name}_sample": node(
            "KSampler", model=model, positive=["text", 0], negative=["text", 0], latent_image=["empty", 0],
            seed=1, steps=1, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0,
        ),
        name: node("SaveLatent", samples=[f"{name}_sample", 0], filename_prefix=name),
    }  # fmt: skip


def assert_same_image(one: Path, other: Path) -> None:
    assert_same_picture(read_image(one), read_image(other))


def assert_same_latent(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    first, second = read_latent(one), read_latent(other)
    assert float(first.std()) > 0
    error = float((first - second).abs().max() / (first.max() - first.min()))
    print(f"largest difference {error:.2e} of the range")
    assert error <= tolerance


def test_object_info(server: Server) -> None:
    info = server.get("/object_info")
    for kind, title in ((VAE, "Patch Conv (VAE)"), (MODEL, "Patch Conv (Model)")):
        shown = info[kind]
        assert shown["display_name"] == title
        assert shown["description"]
        assert shown["category"] == info["VAEDecode" if kind == VAE else "HyperTile"]["category"]
        assert all(shown["output_tooltips"])
        inputs = shown["input"]["required"]
        assert (
            list(inputs)
            == ["vae" if kind == VAE else "model", "splits", "threshold", "half"][: 4 if kind == VAE else 3]
        )
        assert all(options["tooltip"] for _, options in inputs.values())
        assert inputs["splits"][1]["default"] == 0
        assert inputs["threshold"][1]["default"] == DEFAULTS["threshold"]
        if "search_aliases" in info["VAEDecode"]:
            assert "patchconv" in shown["search_aliases"]
        later = shown["input"].get("optional", {})
        assert list(later) == (["mode", "budget", "padding", "devices"] if kind == VAE else ["padding"])
        assert all(options["tooltip"] for _, options in later.values())


@pytest.mark.parametrize("kind", [VAE, MODEL])
def test_help_page(server: Server, kind: str) -> None:
    page = server.get(f"/extensions/comfyui_patchconv/docs/{kind}/en.md").decode()
    assert page.startswith("# Patch Conv")


def test_two_branches(server: Server, checkpoint: str) -> None:
    latent = server.latent("branches", 192)
    alone = server.run(decoding(checkpoint, latent, eager=True))
    both = decoding(checkpoint, server.latent("again", 192), eager=True, patched=ALWAYS)
    images = server.run(both)
    assert np.array_equal(read_image(alone["eager"]), read_image(images["eager"]))
    assert_same_image(images["eager"], images["patched"])


def test_patching_twice_takes_the_last_settings(server: Server, checkpoint: str) -> None:
    graph = decoding(checkpoint, server.latent("twice", 128), eager=True, patched=ALWAYS)
    graph["first"] = node(VAE, vae=["load", 2], half="decoder", splits=2, threshold=0.0)
    graph["patch"]["inputs"]["vae"] = ["first", 0]
    images = server.run(graph)
    assert_same_image(images["eager"], images["patched"])


def test_decode_in_less_memory(server: Server, checkpoint: str) -> None:
    server.run(decoding(checkpoint, server.latent("warm", 64), eager=True))  # the weights are in memory from here on
    latent = server.latent("small", 512)
    eager, eager_peak = server.peak_of(lambda: server.run(decoding(checkpoint, latent, eager=True)))
    small = {"splits": 0, "threshold": 0.1}
    patched, peak = server.peak_of(lambda: server.run(decoding(checkpoint, latent, patched=small)))
    print(f"512: eager {eager_peak / 2**20:.0f} MiB, patched {peak / 2**20:.0f} MiB")
    assert_same_image(eager["eager"], patched["patched"])
    assert peak < eager_peak


@pytest.mark.parametrize("budget", [0.0, 0.1], ids=["free memory", "0.1 GiB"])
def test_stream(server: Server, checkpoint: str, budget: float) -> None:
    server.run(decoding(checkpoint, server.latent("warm", 64), eager=True))
    latent = server.latent("small", 512)
    eager, eager_peak = server.peak_of(lambda: server.run(decoding(checkpoint, latent, eager=True)))
    graph = decoding(checkpoint, latent, patched=STREAM | {"budget": budget})
    with server.messages() as messages:
        streamed, peak = server.peak_of(lambda: server.run(graph))
    print(f"512: eager {eager_peak / 2**20:.0f} MiB, streamed {peak / 2**20:.0f} MiB")
    assert_same_image(eager["eager"], streamed["patched"])
    assert peak < 0.7 * eager_peak
    shown = [m["data"] for m in messages if m["type"] == "progress" and m["data"]["node"] == "patched_decode"]
    values = [entry["value"] / entry["max"] for entry in shown]
    assert len(values) > 5
    assert values == sorted(values)


@pytest.mark.parametrize(("first", "last"), [(STREAM, ALWAYS), (ALWAYS, STREAM), (STREAM, STREAM)])
def test_the_last_mode_counts(server: Server, checkpoint: str, first: Graph, last: Graph) -> None:
    graph = decoding(checkpoint, server.latent("modes", 128), eager=True, patched=last)
    graph["first"] = node(VAE, vae=["load", 2], half="both", **first)
    graph["patch"]["inputs"]["vae"] = ["first", 0]
    graph |= decode("between", ["first", 0], ["latent", 0])
    images = server.run(graph)
    assert_same_image(images["eager"], images["patched"])
    assert_same_image(images["eager"], images["between"])


@pytest.mark.slow
def test_decode_with_defaults(server: Server, checkpoint: str) -> None:
    server.run(decoding(checkpoint, server.latent("warm", 64), eager=True))
    latent = server.latent("large", 1024)
    eager, eager_peak = server.peak_of(lambda: server.run(decoding(checkpoint, latent, eager=True)))
    with server.messages() as messages:
        patched, peak = server.peak_of(lambda: server.run(decoding(checkpoint, latent, patched=DEFAULTS)))
    print(f"1024: eager {eager_peak / 2**20:.0f} MiB, patched {peak / 2**20:.0f} MiB")
    assert_same_image(eager["eager"], patched["patched"])
    assert peak < eager_peak
    shown = [m["data"] for m in messages if m["type"] == "progress" and m["data"]["node"] == "patched_decode"]
    values = [entry["value"] / entry["max"] for entry in shown]
    print(f"progress shown {len(values)} times, from {values[0]:.2f} to {values[-1]:.2f}")
    assert len(values) > 5
    assert values == sorted(values)
    assert values[-1] > 0.9


def test_short_decode_shows_no_progress(server: Server, checkpoint: str) -> None:
    server.run(decoding(checkpoint, server.latent("warm", 64), patched=ALWAYS))
    with server.messages() as messages:
        start = time.monotonic()
        server.run(decoding(checkpoint, server.latent("short", 32, seed=1), patched=ALWAYS))
        seconds = time.monotonic() - start
    shown = [m for m in messages if m["type"] == "progress" and m["data"]["node"] == "patched_decode"]
    assert not shown or seconds > 1  # a machine that does other work meanwhile


@pytest.mark.parametrize("settings", [DEFAULTS | {"threshold": 1.0}, STREAM], ids=["patch", "stream"])
def test_interrupt(server: Server, checkpoint: str, settings: Graph) -> None:
    graph = decoding(checkpoint, server.latent("long", 1024, seed=len(settings)), patched=settings)
    with server.messages() as messages:
        prompt = server.queue(graph)
        while not any(m["type"] == "progress" and m["data"]["node"] == "patched_decode" for m in messages):
            time.sleep(0.05)
        asked = time.monotonic()
        server.get("/interrupt", {})
        history = server.result(prompt)
    print(f"stopped after {time.monotonic() - asked:.2f} s")
    assert history["status"]["messages"][-1][0] == "execution_interrupted"
    shown = [m["data"] for m in messages if m["type"] == "progress" and m["data"]["node"] == "patched_decode"]
    assert shown[-1]["value"] < 0.9 * shown[-1]["max"]  # it does not go on to the end
    assert [m["data"]["state"] for m in messages if m["type"] == "patchconv.report"][-1] == "stopped"
    images = server.run(decoding(checkpoint, server.latent("next", 256, seed=4), eager=True, patched=settings))
    assert_same_image(images["eager"], images["patched"])


def test_encode(server: Server, checkpoint: str) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (256, 192, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(server.folder / "input" / "noise.png")
    graph = loader(checkpoint) | {"image": node("LoadImage", image="noise.png")}
    graph["patch"] = node(VAE, vae=["load", 2], half="encoder", **ALWAYS)
    graph["stream"] = node(VAE, vae=["load", 2], half="encoder", **STREAM)
    for name, vae in (("eager", ["load", 2]), ("patched", ["patch", 0]), ("streamed", ["stream", 0])):
        graph[f"{name}_encode"] = node("VAEEncode", pixels=["image", 0], vae=vae)
        graph[name] = node("SaveLatent", samples=[f"{name}_encode", 0], filename_prefix=name)
    latents = server.run(graph)
    assert_same_latent(latents["eager"], latents["patched"])
    assert_same_latent(latents["eager"], latents["streamed"])


def lora(path: Path) -> None:
    """Random low-rank changes to two convolutions and an attention layer of SD 1.5's U-Net, large enough to see."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    shapes = {
        "down_blocks_0_resnets_0_conv1": ((4, 320, 3, 3), (320, 4, 1, 1)),
        "up_blocks_3_resnets_2_conv2": ((4, 320, 3, 3), (320, 4, 1, 1)),
        "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": ((4, 320), (320, 4)),
    }
    for name, (down, up) in shapes.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(down, generator=generator) * 0.05
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.05
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path)


def test_lora(server: Server, checkpoint: str) -> None:
    """The same on a patched model as on a eager one, before the node and behind it; and not nothing."""
    lora(server.folder / "loras" / "random.safetensors")
    change: Graph = {"lora_name": "random.safetensors", "strength_model": 1.0}
    graph = loader(checkpoint) | {
        "lora": node("LoraLoaderModelOnly", model=["load", 0], **change),
        "lora_patch": node(MODEL, model=["lora", 0], **ALWAYS),
        "patch": node(MODEL, model=["load", 0], **ALWAYS),
        "patch_lora": node("LoraLoaderModelOnly", model=["patch", 0], **change),
    }
    for name, source in (("none", "load"), ("eager", "lora"), ("after", "lora_patch"), ("before", "patch_lora")):
        graph |= sampling(checkpoint, name, [source, 0])
    latents = server.run(graph)
    assert_same_latent(latents["eager"], latents["after"])
    assert_same_latent(latents["eager"], latents["before"])
    assert not torch.allclose(read_latent(latents["none"]), read_latent(latents["eager"]), atol=1e-3)


def test_weights_cast_at_every_use(server: Server, frugal_server: Server, checkpoint: str) -> None:
    """fp8 U-Net and bfloat16 VAE: in strips no farther from float32 than whole."""
    if not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16: torch convolves in it 170 times as slowly as in float32")
    graph = decoding(checkpoint, server.latent("cast", 192), eager=True)
    exact = read_image(server.run(graph)["eager"])
    graph = decoding(checkpoint, frugal_server.latent("cast", 192), eager=True, patched=ALWAYS)
    graph["model"] = node(MODEL, model=["load", 0], **ALWAYS)
    graph |= sampling(checkpoint, "whole", ["load", 0]) | sampling(checkpoint, "strips", ["model", 0])
    files = frugal_server.run(graph)
    assert_same_latent(files["whole"], files["strips"], tolerance=1e-5)
    eager, patched = (float(np.square(read_image(files[name]) - exact).mean() ** 0.5) for name in ("eager", "patched"))
    print(f"bfloat16, levels from float32: eager {eager:.3f}, patched {patched:.3f}")
    assert 0 < patched <= eager * 1.05


@pytest.mark.parametrize("name", ["budget", "threshold"])
def test_no_number(server: Server, checkpoint: str, name: str) -> None:
    graph = decoding(checkpoint, server.latent("numbers", 64), patched=STREAM | {name: float("nan")})
    assert f"{name} is nan: use a number from 0 to " in server.error(graph)


def test_nothing_to_patch(server: Server, checkpoint: str) -> None:
    graph = {"load": node("VAELoader", vae_name="pixel_space")}
    graph["latent"] = node("LoadLatent", latent=server.latent("pixels", 64))
    graph["patch"] = node(VAE, vae=["load", 0], half="both", **DEFAULTS)
    graph |= decode("patched", ["patch", 0], ["latent", 0])
    message = server.error(graph)
    assert "PixelspaceConversionVAE" in message
    assert "no convolution" in message
    assert len(message.strip().splitlines()) == 1
