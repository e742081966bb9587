"""Looks at ComfyUI from inside, in its own Python: `probe.py CHECKOUT QUESTION [ARGUMENTS]` prints one line of JSON.

halves: per VAE family, the convolutions that decode or encode call and that `half_of` gives to the other half.
streamed: largest difference, of the output's range, between a VAE's eager decode and its decodes in strips, of
    convolutions and of the whole, while the host streams its weights in at every use.
cloned: the most that a decode by the host's clone for another device is off, eager and patched either way, and one by
    what it was cloned from; the weights of the two differ.
table [NAMES]: per VAE family, decode and encode as `table.py` has them: bytes of eager and streamed at the size that
    people use, counted, and the error of a narrow one that ran.
holes: per VAE family, encoding an image with a hole: whether the latent depends on what is in it, and the largest
    difference of strips to whole, of the output's range.
video METHOD WAY FILE: of a decode or an encode, eager or streamed, of nine frames by a VAE that has them in chunks: the
    estimate in bytes, the peak measured, how the progress bar moved; what came of it goes to the file.
newer: what hosts after 0.33 ask of a VAE, by mode: whether its estimate is still said to be reliable, which would have
    a decode begin in tiles; how often it was tiled; whether recording of allocations was paused while it ran; the
    largest difference to eager; whether another node takes this back.
upscaled: of an upscale model in half precision: the largest difference to single, the types computed in, and whether
    the loaded model is as it was.
sound FOLDER WIDTH SECONDS: of a sound's VAE, written to FOLDER and loaded from there: for each audio node, the largest
    difference of streamed to eager, of its range; of the decode, estimates in bytes, peaks measured, and lines of
    figures; and what was evaluated whole.
refused: per node and input, what is said of a value that is none of its choices, is out of its range, or is missing,
    which a link may bring.
memory CHECKPOINT SIZE: bytes for a decode: the host's estimate, ours, and the peaks measured.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, NotHereError, build, draw, family_of, tensor
from families import halves as halves_of
from launch import prepare
from safetensors.torch import save_file
from table import FLAGS, METHODS, row

PACK = Path(__file__).parents[2]
KL = FAMILIES[0]
"""Stable Diffusion's."""

WITH_HOLES = (
    KL.name, "TAESD", "TAEHV of Wan 2.1 and HunyuanVideo", "Stable Cascade, stage A", "Stable Cascade, stage C",
    "Wan 2.1", "Wan 2.2", "Mochi", "LTX-Video 0.9", "LTX-Video 0.9.5", "CogVideoX", "Cosmos", "Flux, SD 3, Z-Image",
    "Qwen-Image", "HunyuanImage 2.1", "HunyuanVideo", "HunyuanVideo 1.5",
)  # fmt: skip
"""Families whose encoders have encoded images with holes; others were not tried."""


def start_host(checkout: str, *flags: str) -> Any:
    """Make `comfy` importable and load this pack through ComfyUI's own loader; its package. flags: the host's."""
    sys.path[:0] = [checkout]
    prepare()
    sys.argv = ["probe", *([] if torch.cuda.is_available() else ["--cpu"]), *flags]
    options = importlib.import_module("comfy.options")
    options.enable_args_parsing()
    host_nodes = importlib.import_module("nodes")
    assert asyncio.run(host_nodes.load_custom_node(str(PACK)))
    assert {"PatchConv_VAE", "PatchConv_Model"} <= set(host_nodes.NODE_CLASS_MAPPINGS)
    return sys.modules[str(PACK).replace(".", "_x_")].__name__


def called(pack: str, model: torch.nn.Module, method: str, shape: tuple[int, ...]) -> tuple[set[str], int]:
    """Names of the convolutions that `model.method` calls, and the bytes that its activations need at once."""
    core = importlib.import_module(f"{pack}.comfyui_patchconv")
    streaming = importlib.import_module(f"{pack}.comfyui_patchconv.streaming")
    names: set[str] = set()

    def run(copy: Any, make: Any) -> None:
        for name, module in core.convolutions(copy, predicate=lambda name, module: True):
            module._conv_forward = noting(name, module._conv_forward)
        getattr(copy, method)(make(shape))

    def noting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (names.add(name), forward(*args, **kwargs))[1]

    return names, streaming.peak_activations(model, run, device=torch.device("cpu"), dtype=torch.float32)


def halves(pack: str) -> dict[str, Any]:
    half_of = importlib.import_module(f"{pack}.comfyui_patchconv.hosts.halves").half_of
    answer: dict[str, Any] = {}
    for family in FAMILIES:
        wrong: list[str] = []
        try:
            model = build(family, narrow=True)
        except NotHereError as error:
            answer[family.name] = f"not here ({error})"
            continue
        core = importlib.import_module(f"{pack}.comfyui_patchconv")
        there = {half_of(name) for name, _ in core.convolutions(model, predicate=lambda *_: True)}
        for method in halves_of(family):
            shape = family.shape(method, small=True)
            assert shape is not None
            if METHODS[method] not in there:  # a transformer, which the node leaves alone
                continue
            try:
                names, _ = called(pack, model, method, shape)
                wrong += [f"{method}: {name}" for name in names if half_of(name) != METHODS[method]]
                wrong += [] if names else [f"{method} calls no convolution"]
            except Exception as error:
                wrong.append(f"{method}: {type(error).__name__}: {str(error)[:300]}")
        answer[family.name] = wrong
    return answer


def vaes(pack: str, vae: Any, **settings: Any) -> Iterator[Any]:
    """`vae` and, by the node, a patched and a streaming copy of it."""
    node = importlib.import_module(f"{pack}.nodes.patch_conv").PatchConvVAE
    yield vae
    yield node.execute(vae=vae, half="both", **settings).result[0]
    yield node.execute(vae=vae, half="both", mode="stream", **settings).result[0]


def load_vae(model: torch.nn.Module | None = None, checkpoint: str = "") -> Any:
    sd = importlib.import_module("comfy.sd")
    if model is None:
        return sd.load_checkpoint_guess_config(checkpoint, output_model=False, output_clip=False)[2]
    state = {key: torch.randn(t.shape, generator=torch.Generator().manual_seed(len(key))) * 0.1
             for key, t in model.state_dict().items()}  # fmt: skip
    return sd.VAE(sd=state)


@torch.inference_mode()
def streamed(pack: str) -> dict[str, float]:
    model = build(KL)
    latent = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    results, streaming = [], 0
    for vae in vaes(pack, load_vae(model), splits=3, threshold=0.0):
        patcher = vae.patcher
        patcher.patch_model(patcher.load_device, lowvram_model_memory=1)
        streaming += sum(getattr(module, "comfy_cast_weights", False) for module in vae.first_stage_model.modules())
        results.append(vae.first_stage_model.decode(latent.to(patcher.load_device, vae.vae_dtype)).float())
        patcher.unpatch_model(patcher.offload_device)
    eager, *others = results
    return {
        "difference": max(float((eager - other).abs().max() / (eager.max() - eager.min())) for other in others),
        "streaming": streaming,
    }


@torch.inference_mode()
def cloned(pack: str) -> dict[str, float]:
    model = build(KL)
    latent = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    other, answer = load_other(model), {}
    expected, first = other.decode(latent), load_vae(model).decode(latent)
    for way, vae in zip(("eager", "patch", "stream"), vaes(pack, load_vae(model), splits=3, threshold=0.0)):
        if not hasattr(vae.patcher, "deepclone_multigpu"):
            break  # an older host
        vae.decode(latent)
        vae.patcher.cached_patcher_init = (lambda: load_other(model).patcher, ())
        clone = copy.copy(vae)
        clone.patcher = vae.patcher.deepclone_multigpu(new_load_device=vae.patcher.load_device)
        clone.first_stage_model = clone.patcher.model
        pairs = [(clone.decode(latent), expected), (vae.decode(latent), first), (clone.decode(latent), expected)]
        answer[way] = max(float((result - wanted).abs().max()) for result, wanted in pairs)
    return answer


def load_other(model: torch.nn.Module) -> Any:
    """A VAE like that of `load_vae`, of other weights."""
    vae = load_vae(model)
    draw(vae.first_stage_model)
    return vae


def table(pack: str, *names: str) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for family in FAMILIES:
        if names and family.name not in names:
            continue
        for method in halves_of(family):
            try:
                answer[f"{family.name} {method}"] = row(partial(load, pack), family, method)
            except NotHereError as error:
                answer[f"{family.name} {method}"] = f"not here ({error})"
            except Exception as error:
                answer[f"{family.name} {method}"] = f"{type(error).__name__}: {str(error)[:300]}"
    return answer


def load(pack: str, name: str) -> Any:
    """A module of the package that the pack brings."""
    return importlib.import_module(f"{pack}.comfyui_patchconv.{name}")


@torch.inference_mode()
def holes(pack: str) -> dict[str, Any]:
    with_holes = importlib.import_module(f"{pack}.comfyui_patchconv.conv.holes").with_holes
    tiling = importlib.import_module(f"{pack}.comfyui_patchconv").Tiling
    answer: dict[str, Any] = {}
    for family in map(family_of, WITH_HOLES):
        pixels = family.small_pixels
        assert pixels is not None
        try:
            model: Any = build(family, narrow=True, device="cpu").float()
        except NotHereError as error:
            answer[family.name] = f"not here ({error})"
            continue
        draw(model)
        image = torch.randn(pixels, generator=torch.Generator().manual_seed(0))
        mask = torch.ones(pixels[-2:])
        mask[pixels[-2] // 4 : pixels[-2] // 2, pixels[-1] // 4 :] = 0
        other = torch.where(mask > 0, image, torch.full_like(image, 7.0))
        try:
            first, second, strips = (
                tensor(with_holes(model, model.encode, one, mask, tiling(splits, threshold=0)))
                for one, splits in ((image, 1), (other, 1), (image, 3))
            )
            error = float((first - strips).abs().max() / (first.max() - first.min()))
            same = torch.equal(first, second) and bool(first.isfinite().all())
            answer[family.name] = {"same": same, "strips": error}
        except Exception as error:
            answer[family.name] = f"{type(error).__name__}: {str(error)[:300]}"
    return answer


@torch.inference_mode()
def memory(pack: str, checkpoint: str, size: str) -> dict[str, int]:
    recorder = importlib.import_module(f"{pack}.comfyui_patchconv.memory.recorder").Recorder
    every = vaes(pack, load_vae(checkpoint=checkpoint), splits=0, threshold=16.0)
    latent = torch.randn(1, 4, int(size) // 8, int(size) // 8)
    answer = {}
    for name, vae in zip(("eager", "patched", "streamed"), every):
        vae.decode(latent[..., :8, :8])
        answer[f"{name} estimate"] = int(vae.memory_used_decode(latent.shape, vae.vae_dtype))
        with recorder(vae.device) as recorded:
            vae.decode(latent)
        answer[f"{name} measured"] = recorded.peak
        answer[f"{name} seconds"] = round(recorded.seconds, 1)
    return answer


@torch.inference_mode()
def video(pack: str, method: str, way: str, file: str) -> dict[str, Any]:
    recorder = importlib.import_module(f"{pack}.comfyui_patchconv.memory.recorder").Recorder
    utils = importlib.import_module("comfy.utils")
    moves: list[float] = []
    utils.set_progress_bar_global_hook(lambda value, total, *_, **__: moves.append(value / total))
    model = build(replace(family_of("Wan 2.1"), narrow={"dim": 32}), narrow=True)
    eager, _, streamed = vaes(pack, load_vae(model), splits=0, threshold=16.0)
    vae = streamed if way == "streamed" else eager
    generator = torch.Generator().manual_seed(0)
    if method == "decode":
        input = torch.randn(1, 16, 3, 48, 48, generator=generator)
        shape, warm = tuple(input.shape), input[..., :8, :8]
    else:
        input = torch.rand(9, 384, 384, 3, generator=generator)
        shape, warm = (1, 3, 9, 384, 384), input[:, :64, :64]
    getattr(vae, method)(warm)
    estimate = int(getattr(vae, f"memory_used_{method}")(shape, vae.vae_dtype))
    moves.clear()
    with recorder(vae.device) as recorded:
        result = getattr(vae, method)(input)
    torch.save(result.float(), file)
    return {"estimate": estimate, "measured": recorded.peak, "moves": moves}


@torch.inference_mode()
def batch(pack: str) -> list[float]:
    progress = importlib.import_module(f"{pack}.nodes.progress").StreamProgress
    progress.__init__.__defaults__ = (0.0, 0.0)  # a bar from the first strip on
    moves: list[float] = []
    importlib.import_module("comfy.utils").set_progress_bar_global_hook(
        lambda value, total, *_, **__: moves.append(value / total)
    )
    model = build(KL)
    *_, vae = vaes(pack, load_vae(model), splits=0, threshold=0.0)
    vae.patcher.get_free_memory = lambda *_: 1  # one image a call
    vae.decode(torch.randn(3, 4, 40, 32, generator=torch.Generator().manual_seed(0)))
    return moves


@torch.inference_mode()
def newer(pack: str) -> dict[str, Any]:
    node = importlib.import_module(f"{pack}.nodes.patch_conv").PatchConvVAE
    eager = load_vae(build(KL))
    eager.first_stage_model.comfy_decode_estimate_is_reliable = True
    latent = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    expected, answer = eager.decode(latent), {}
    paused = recorded_pauses()
    seen: list[bool] = []
    eager.first_stage_model.decoder.conv_in.register_forward_hook(lambda *_: seen.append(bool(paused)))
    for mode in ("stream", "auto", "patch"):
        options: dict[str, Any] = dict(splits=0, threshold=0.0, half="both", mode=mode, devices=1)  # by a link
        vae = node.execute(vae=eager, **options).result[0]
        tiled: list[int] = []
        vae.decode_tiled_ = lambda *_, tiled=tiled, **__: tiled.append(1)
        if mode != "patch":
            vae.patcher.get_free_memory = lambda *_: 1
        seen.clear()
        result = vae.decode(latent)
        answer[mode] = {
            "reliable": vae.first_stage_model.comfy_decode_estimate_is_reliable, "tiled": len(tiled), "paused": [*seen],
            "difference": float((result - expected).abs().max()),
        }  # fmt: skip
        again = node.execute(vae=vae, **options | {"mode": "patch"}).result[0]
        answer[mode]["left"] = "comfy_decode_estimate_is_reliable" not in again.patcher.object_patches
    eager.decode(latent)
    answer["eager"] = {"reliable": eager.first_stage_model.comfy_decode_estimate_is_reliable, "paused": seen[-1:]}
    return answer


def recorded_pauses() -> list[int]:
    """A list that has an entry while the host's recording of allocations is paused, as far as its name goes: the
    recorder itself runs on GPUs alone."""
    paused: list[int] = []
    module: Any = importlib.import_module("comfy.model_prefetch")
    before = getattr(module, "pause_malloc_graph", nullcontext)

    @contextmanager
    def pause(*args: Any, **kwargs: Any) -> Iterator[None]:
        paused.append(1)
        try:
            with before(*args, **kwargs):
                yield
        finally:
            paused.pop()

    module.pause_malloc_graph = pause
    return paused


@torch.inference_mode()
def upscaled(pack: str) -> dict[str, Any]:
    sys.path.append(str(Path(__file__).parents[1]))
    weights = importlib.import_module("upscale_weights").esrgan()
    spandrel = importlib.import_module("spandrel")
    management: Any = importlib.import_module("comfy.model_management")
    upscale = importlib.import_module(f"{pack}.nodes.upscale").UpscaleImage
    model = spandrel.ModelLoader().load_from_state_dict(weights).eval()
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    types: list[str] = []
    model._call_fn = lambda network, image: (types.append(str(image.dtype)), network(image))[1]
    image = torch.rand(2, 24, 20, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for half in (False, True):
        management.should_use_bf16 = lambda *_, half=half, **__: half
        results.append(upscale.execute(model, image).args[0])
    kept = all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())
    difference = float((results[0] - results[1]).abs().max())
    shapes = [list(result.shape) for result in results]
    return {"difference": difference, "types": sorted(set(types)), "kept": kept, "shapes": shapes}


def load_oobleck(folder: str, width: int) -> Any:
    """A sound's VAE as the host loads it from a file. width: channels next to the waveform; those that people have are
    of 128, and the host's class can be narrower."""
    sd: Any = importlib.import_module("comfy.sd")
    paths, host_nodes = (importlib.import_module(name) for name in ("folder_paths", "nodes"))
    sd.AudioOobleckVAE = functools.partial(sd.AudioOobleckVAE, channels=width)
    model, generator = sd.AudioOobleckVAE(), torch.Generator().manual_seed(0)
    state = {key: torch.randn(value.shape, generator=generator) / 10 for key, value in model.state_dict().items()}
    state = {key: value / 10 + 0.7 if "original0" in key else value for key, value in state.items()}
    save_file(state, str(Path(folder) / "oobleck.safetensors"))
    paths.add_model_folder_path("vae", folder)
    return host_nodes.VAELoader().load_vae("oobleck.safetensors")[0]


@torch.inference_mode()
def sound(pack: str, folder: str, width: str, seconds: str) -> dict[str, Any]:
    audio: Any = importlib.import_module("comfy_extras.nodes_audio")
    node = importlib.import_module(f"{pack}.nodes.patch_conv").PatchConvVAE
    recorder = importlib.import_module(f"{pack}.comfyui_patchconv.memory.recorder").Recorder
    meters_of = importlib.import_module(f"{pack}.nodes.meter").meters_of
    eager = load_oobleck(folder, int(width))
    latent = torch.randn(1, 64, int(float(seconds) * 44100 / 2048), generator=torch.Generator().manual_seed(1))
    settings = {"splits": 0, "threshold": 16.0, "half": "both"}
    ways = {
        "eager": eager,
        "stream": node.execute(vae=eager, mode="stream", **settings).result[0],
        "auto": node.execute(vae=eager, mode="auto", budget=float(seconds) * int(width) / 1600, **settings).result[0],
    }
    answer: dict[str, Any] = {"class": type(eager.first_stage_model).__name__, "way": {}}
    first: dict[str, torch.Tensor] = {}
    for way, vae in ways.items():
        vae.decode(latent[..., :8])
        found: dict[str, Any] = {"estimate": int(vae.memory_used_decode(latent.shape, vae.vae_dtype))}
        answer["way"][way] = found
        with recorder(vae.device) as recorded:
            decoded = audio.VAEDecodeAudio.execute(vae, {"samples": latent}).result[0]
        found["measured"] = recorded.peak
        found["lines"] = [meter.figures.line() for meter in meters_of(vae, None) if meter.figures is not None]
        torch.manual_seed(0)
        tiled = audio.VAEDecodeAudioTiled.execute(vae, {"samples": latent[..., :96]}, 64, 16).result[0]
        encoded = audio.VAEEncodeAudio.execute(vae, {"waveform": decoded["waveform"] / 10, "sample_rate": 44100})
        results = {"decode": decoded["waveform"], "tiled": tiled["waveform"], "encode": encoded.result[0]["samples"]}
        for name, result in results.items():
            wanted = first.setdefault(name, result)
            found[name] = float((result - wanted).abs().max() / (wanted.max() - wanted.min()))
    return answer


def wrong_for(one: Any) -> list[Any]:
    """Values that the input `one` of a schema does not take."""
    if hasattr(one, "min"):
        return [one.min - 1, one.max * 2, float("nan"), "3"]
    if one.id == "model_name":  # a file, which the host looks for
        return []
    missing: list[Any] = [] if one.optional or one.io_type == "*" else [None]
    missing += [torch.zeros(0, 8, 8, 3)] if one.io_type in ("IMAGE", "MASK") else []
    missing += [torch.zeros(1, 2, 8, 8, 3)] if one.io_type == "IMAGE" else []
    return ["Other"] if getattr(one, "options", None) else missing


def refused(pack: str) -> dict[str, str]:
    host_nodes: Any = importlib.import_module("nodes")
    said: dict[str, str] = {}
    for kind in host_nodes.NODE_CLASS_MAPPINGS.values():
        if not kind.__module__.startswith(pack):
            continue
        inputs = kind.define_schema().inputs
        defaults = {each.id: getattr(each, "default", None) for each in inputs}
        given = {name: object() if value is None else value for name, value in defaults.items()}
        for one in inputs:
            for wrong in wrong_for(one):
                try:
                    kind.execute(**{**given, one.id: wrong})
                    error = None
                except Exception as raised:
                    error = raised
                shown = "x".join(map(str, wrong.shape)) if isinstance(wrong, torch.Tensor) else wrong
                said[f"{kind.__name__}.{one.id}={shown}"] = f"{type(error).__name__}: {error}"
    return said


if __name__ == "__main__":
    path, question, *arguments = sys.argv[1:]
    package = start_host(path, *(FLAGS if question == "table" else ()))
    questions = {
        "halves": halves, "streamed": streamed, "cloned": cloned, "table": table, "holes": holes, "video": video,
        "batch": batch, "newer": newer, "upscaled": upscaled, "sound": sound, "refused": refused,
        "memory": memory,
    }  # fmt: skip
    print(json.dumps(questions[question](package, *arguments)))
