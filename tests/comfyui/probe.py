"""Looks at ComfyUI from inside, in its own Python: `probe.py CHECKOUT QUESTION [ARGUMENTS]` prints one line of JSON.

halves: per VAE family, the convolutions that decode or encode call and that `half_of` gives to the other half.
streamed: largest difference, of the output's range, between a VAE's eager decode and its decodes in strips, of
    convolutions and of the whole, while the host streams its weights in at every use.
cloned: the most that a decode by the host's clone for another device is off, eager and patched either way, and one by
    what it was cloned from; the weights of the two differ.
whole: per VAE family, decode and encode in stream mode: the largest difference to eager, of the output's range, and
    what was evaluated whole.
holes: per VAE family, encoding an image with a hole: whether the latent depends on what is in it, and the largest
    difference of strips to whole, of the output's range.
video METHOD WAY FILE: of a decode or an encode, eager or streamed, of nine frames by a VAE that has them in chunks: the
    estimate in bytes, the peak measured, how the progress bar moved; what came of it goes to the file.
upscaled: of an upscale model in half precision: the largest difference to single, the types computed in, and whether
    the loaded model is as it was.
sound FOLDER WIDTH SECONDS: of a sound's VAE, written to FOLDER and loaded from there: for each audio node, the largest
    difference of streamed to eager, of its range; of the decode, estimates in bytes, peaks measured, and lines of
    figures; and what was evaluated whole.
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
from pathlib import Path
from typing import Any

import torch
from launch import prepare
from safetensors.torch import save_file

PACK = Path(__file__).parents[2]
KL = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
      "ch_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
WAN = {"dim": 32, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_scales": [],
       "temperal_downsample": [False, True, True], "dropout": 0.0}  # fmt: skip
HUNYUAN = {"block_out_channels": [64, 128, 128], "in_channels": 3, "out_channels": 3, "num_res_blocks": 1,
           "ffactor_spatial": 4, "downsample_match_channel": True, "upsample_match_channel": True,
           "z_channels": 32}  # fmt: skip
COSMOS = {"z_channels": 16, "latent_channels": 16, "z_factor": 1, "resolution": 1024, "in_channels": 3,
          "out_channels": 3, "channels": 32, "channels_mult": [2, 4, 4], "num_res_blocks": 1, "attn_resolutions": [32],
          "dropout": 0.0, "patch_size": 4, "num_groups": 1, "temporal_compression": 8,
          "spacial_compression": 8}  # fmt: skip
FAMILIES: list[tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ("comfy.ldm.models.autoencoder.AutoencoderKL", {"ddconfig": KL, "embed_dim": 4}, (1, 4, 8, 8), (1, 3, 64, 64)),
    ("comfy.taesd.taesd.TAESD", {}, (1, 4, 8, 8), (1, 3, 64, 64)),
    ("comfy.taesd.taehv.TAEHV", {"latent_channels": 16}, (1, 16, 2, 8, 8), (1, 3, 8, 64, 64)),
    ("comfy.ldm.cascade.stage_a.StageA", {}, (1, 4, 8, 8), (1, 3, 32, 32)),
    ("comfy.ldm.cascade.stage_c_coder.StageC_coder", {}, (1, 16, 8, 8), (1, 3, 256, 256)),
    ("comfy.ldm.wan.vae.WanVAE", WAN, (1, 16, 2, 8, 8), (1, 3, 5, 64, 64)),
    ("comfy.ldm.wan.vae2_2.WanVAE", WAN, (1, 16, 2, 8, 8), (1, 3, 5, 64, 64)),
    ("comfy.ldm.genmo.vae.model.VideoVAE", {}, (1, 12, 2, 8, 8), (1, 3, 7, 64, 64)),
    ("comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE", {}, (1, 128, 2, 4, 4), (1, 3, 9, 128, 128)),
    ("comfy.ldm.cogvideo.vae.AutoencoderKLCogVideoX", {"latent_channels": 16}, (1, 16, 2, 8, 8), (1, 3, 5, 64, 64)),
    ("comfy.ldm.audio.autoencoder.AudioOobleckVAE", {}, (1, 64, 4), (1, 2, 8192)),
    ("comfy.ldm.cosmos.vae.CausalContinuousVideoTokenizer", COSMOS, (1, 16, 2, 8, 8), (1, 3, 9, 64, 64)),
    ("ltx with timesteps", {}, (1, 128, 2, 4, 4), (1, 3, 9, 128, 128)),
    ("flux", {}, (1, 16, 8, 8), (1, 3, 64, 64)),
    ("qwen image", {}, (1, 16, 1, 8, 8), (1, 3, 1, 64, 64)),
    ("hunyuan image", {}, (1, 32, 8, 8), (1, 3, 64, 64)),
    ("hunyuan video 1.0", {}, (1, 16, 3, 8, 8), (1, 3, 9, 64, 64)),
    ("hunyuan video", {}, (1, 32, 2, 8, 8), (1, 3, 5, 64, 64)),
]
"""Path of the class, or a name that `build` knows; its arguments; shapes of a latent and of pixels."""

LTX_CHUNK = 1 << 20
"""Bytes of a map from which LTX goes on in chunks of frames: so few that it does with ours."""


def start_host(checkout: str) -> Any:
    """Make `comfy` importable and load this pack through ComfyUI's own loader; the pack's package."""
    sys.path[:0] = [checkout]
    prepare()
    sys.argv = ["probe", *([] if torch.cuda.is_available() else ["--cpu"])]
    options = importlib.import_module("comfy.options")
    options.enable_args_parsing()
    host_nodes = importlib.import_module("nodes")
    assert asyncio.run(host_nodes.load_custom_node(str(PACK)))
    assert {"PatchConv_VAE", "PatchConv_Model"} <= set(host_nodes.NODE_CLASS_MAPPINGS)
    return sys.modules[str(PACK).replace(".", "_x_")].__name__


def build(path: str, options: dict[str, Any]) -> torch.nn.Module:
    """A VAE of ComfyUI's by its class, without weights."""
    with torch.device("cpu" if options is COSMOS else "meta"):  # Cosmos computes when it is built
        if path == "ltx with timesteps":
            path, options = "comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE", {"version": 2}
        if path == "qwen image":
            path, options = "comfy.ldm.wan.vae.WanVAE", WAN
        if path == "hunyuan video 1.0":
            config = KL | {"z_channels": 16, "conv3d": True, "time_compress": 4}
            kind = importlib.import_module("comfy.ldm.models.autoencoder").AutoencoderKL
            return kind(ddconfig=config, embed_dim=16)
        if path in ("flux", "hunyuan image", "hunyuan video"):
            if path == "flux":
                kind, module, config = "DiagonalGaussian", "modules.diffusionmodules.model", KL | {"z_channels": 16}
            else:
                kind, module, config = "Empty", "hunyuan_video.vae", HUNYUAN
            if path == "hunyuan video":
                module, config = f"{module}_refiner", config | {"ffactor_temporal": 4}
            return importlib.import_module("comfy.ldm.models.autoencoder").AutoencodingEngine(
                regularizer_config={"target": f"comfy.ldm.models.autoencoder.{kind}Regularizer"},
                encoder_config={"target": f"comfy.ldm.{module}.Encoder", "params": config},
                decoder_config={"target": f"comfy.ldm.{module}.Decoder", "params": config},
            )
        module, kind = path.rsplit(".", 1)
        found: Any = importlib.import_module(module)
        if hasattr(found, "get_max_chunk_size"):
            found.get_max_chunk_size = lambda device: LTX_CHUNK
        return getattr(found, kind)(**options)


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
    for path, options, latent, pixels in FAMILIES:
        wrong: list[str] = []
        try:
            model = build(path, options)
        except ModuleNotFoundError as error:
            answer[path] = f"not in this ComfyUI ({error})"
            continue
        for method, half, shape in (("decode", "decoder", latent), ("encode", "encoder", pixels)):
            try:
                names, _ = called(pack, model, method, shape)
                wrong += [name for name in names if half_of(name) != half]
                wrong += [] if names else [f"{method} calls no convolution"]
            except Exception as error:
                wrong.append(f"{method}: {type(error).__name__}: {str(error)[:300]}")
        answer[path] = wrong
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
    model = build(FAMILIES[0][0], {"ddconfig": KL | {"ch": 128, "num_res_blocks": 2}, "embed_dim": 4})
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
    model = build(FAMILIES[0][0], {"ddconfig": KL | {"ch": 128, "num_res_blocks": 2}, "embed_dim": 4})
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


@torch.inference_mode()
def whole(pack: str) -> dict[str, Any]:
    streaming = importlib.import_module(f"{pack}.comfyui_patchconv.streaming")
    part_of = importlib.import_module(f"{pack}.comfyui_patchconv.hosts.halves").part_of
    answer: dict[str, Any] = {}
    for path, options, latent, pixels in FAMILIES:
        if len(latent) < 4:
            continue  # sound
        try:
            model = build(path, options).to_empty(device="cpu").float().eval()
        except ModuleNotFoundError as error:
            answer[path] = f"not in this ComfyUI ({error})"
            continue
        draw(model)
        for method, half, shape in (("decode", "decoder", latent), ("encode", "encoder", pixels)):
            input = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            report: dict[str, int] = {}
            owner, _, name = part_of(model, half, method).rpartition(".")
            part = model.get_submodule(owner)
            calls: list[int] = []
            try:
                eager = result_of(model, method, input)
                with streaming.stream(
                    getattr(part, name), report=report, on_progress=lambda *_, calls=calls: calls.append(1)
                ):
                    result = result_of(model, method, input)
                if not calls:  # the method goes through the part's inside itself: the node streams all of it
                    with streaming.stream(
                        getattr(model, method), report=report, on_progress=lambda *_, calls=calls: calls.append(1)
                    ):
                        result = result_of(model, method, input)
                assert calls, "nothing was streamed"
                error = float((result - eager).abs().max() / (eager.max() - eager.min()))
                answer[f"{path} {method}"] = {"difference": error, "whole": report}
            except Exception as error:
                answer[f"{path} {method}"] = f"{type(error).__name__}: {str(error)[:300]}"
    return answer


@torch.inference_mode()
def holes(pack: str) -> dict[str, Any]:
    with_holes = importlib.import_module(f"{pack}.comfyui_patchconv.conv.holes").with_holes
    tiling = importlib.import_module(f"{pack}.comfyui_patchconv").Tiling
    answer: dict[str, Any] = {}
    for path, options, latent, pixels in FAMILIES:
        if len(latent) < 4:
            continue  # sound
        try:
            model: Any = build(path, options).to_empty(device="cpu").float().eval()
        except ModuleNotFoundError as error:
            answer[path] = f"not in this ComfyUI ({error})"
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
            answer[path] = {"same": same, "strips": error}
        except Exception as error:
            answer[path] = f"{type(error).__name__}: {str(error)[:300]}"
    return answer


def draw(model: torch.nn.Module) -> None:
    """Seeded weights that keep every layer's output alive."""
    generator = torch.Generator().manual_seed(0)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        drawn = torch.randn(value.shape, generator=generator)
        drawn /= max(drawn[0].numel(), 1) ** 0.5 if value.dim() > 1 else 10
        value.data.copy_(drawn + (1.0 if value.dim() == 1 and not name.endswith("bias") else 0.0))


def result_of(model: Any, method: str, input: torch.Tensor) -> torch.Tensor:
    """What a VAE makes of `input`, in a tensor of ours where the host would give it one; the noise it adds is the same
    each time."""
    torch.manual_seed(0)
    if method == "decode" and getattr(model, "comfy_has_chunked_io", False):
        buffer = torch.zeros(model.decode_output_shape(input.shape))
        model.decode(input.clone(), output_buffer=buffer)
        return buffer
    return tensor(getattr(model, method)(input.clone()))


def tensor(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


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
    model = build("comfy.ldm.wan.vae.WanVAE", WAN | {"num_res_blocks": 2})
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
    model = build(FAMILIES[0][0], {"ddconfig": KL | {"ch": 128, "num_res_blocks": 2}, "embed_dim": 4})
    *_, vae = vaes(pack, load_vae(model), splits=0, threshold=0.0)
    vae.patcher.get_free_memory = lambda *_: 1  # one image a call
    vae.decode(torch.randn(3, 4, 40, 32, generator=torch.Generator().manual_seed(0)))
    return moves


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


if __name__ == "__main__":
    path, question, *arguments = sys.argv[1:]
    package = start_host(path)
    questions = {
        "halves": halves, "streamed": streamed, "cloned": cloned, "whole": whole, "holes": holes, "video": video,
        "batch": batch, "upscaled": upscaled, "sound": sound, "memory": memory,
    }  # fmt: skip
    print(json.dumps(questions[question](package, *arguments)))
