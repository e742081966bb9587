"""Runs one case after the other in a process of its own: `serve` reads them from standard input, a line each."""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from single_conv import patch_conv_module
from tiles import thrice
from torch import Tensor, nn

from comfyui_patchconv import patched
from comfyui_patchconv.memory.errors import is_out_of_memory
from comfyui_patchconv.streaming import Streamed, Tuning
from comfyui_patchconv.streaming.execute.kernels import VARIABLE, Kernels, by_kitchen

from .cases import Case
from .measure import MOST_RUNS, clean, errors, kernels, measured
from .networks import Autoencoder, Esrgan

Parts = dict[str, Callable[[Tensor], Tensor]]

USUAL, SMALL = Tuning(), Tuning(strip_bytes=100_000, always=True)
"""How strips are sized, and so that toys come in several, too."""

PROFILED = 25
"""Kernels of a profile, the longest first."""


class LackingError(Exception):
    """What a case needs is not on this machine; the text says what."""


@dataclass
class Network:
    """A network with random weights.

    parts: what can be run of it, by name, each of one map. streamed: the owner and the name of the method that streams,
    by part. tile: has diffusers cut tiles from now on, or no longer; None where it cannot. scales: rows of the result
    to one of the input, by part. chunks: what streams instead where a video is decoded by chunks.
    """

    module: nn.Module
    parts: Parts
    streamed: dict[str, tuple[Any, str]]
    scales: dict[str, float]
    tile: Optional[Callable[[bool], None]] = None
    chunks: Optional[tuple[Any, str]] = None


def autoencoder(case: Case) -> Network:
    """The VAE of Stable Diffusion or Flux: diffusers' where it is there, else one of the same layout."""
    widths, layers = ((8, 8, 16, 16), 1) if case.toy else ((128, 256, 512, 512), 2)
    latent, quant, groups = (16, False, 4) if case.network == "flux" else (4, True, 4)
    groups = groups if case.toy else 32
    if importlib.util.find_spec("diffusers") is None:
        own = Autoencoder(latent, widths, layers, groups, quant)
        parts: Parts = {"decode": lambda x: own.decode(x), "encode": lambda x: own.encode(x)}
        streamed: dict[str, tuple[Any, str]] = {name: (own, name) for name in parts}
        return Network(own, parts, streamed, {"decode": 8, "encode": 1 / 8})
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config: dict[str, Any] = dict(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths, layers_per_block=layers, latent_channels=latent, norm_num_groups=groups,
        sample_size=64 if case.toy else 512, use_quant_conv=quant, use_post_quant_conv=quant,
    )  # fmt: skip
    vae: Any = AutoencoderKL(**config)
    parts = {"decode": lambda x: vae.decode(x).sample, "encode": lambda x: vae.encode(x).latent_dist.mode()}
    streamed = {"decode": (vae, "_decode"), "encode": (vae, "_encode")}
    return Network(vae, parts, streamed, {"decode": 8, "encode": 1 / 8}, tiling_of(vae))


def tiling_of(vae: Any) -> Callable[[bool], None]:
    """What has a VAE of diffusers' cut tiles, or stop to."""

    def tile(on: bool) -> None:
        vae.enable_tiling() if on else vae.disable_tiling()

    return tile


def video(case: Case) -> Network:
    """The VAE of Wan 2.1 or LTX."""
    if importlib.util.find_spec("diffusers") is None:
        raise LackingError("diffusers is not installed here, which has the network")
    if case.network == "wan":
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan as Kind

        toy: dict[str, Any] = dict(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    else:
        from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo as Kind

        widths, ones = (8, 16, 16, 16), (1,) * 5
        toy = dict(
            latent_channels=8, block_out_channels=widths, decoder_block_out_channels=widths, layers_per_block=ones,
            decoder_layers_per_block=ones,
        )  # fmt: skip
    vae: Any = Kind(**(toy if case.toy else {}))
    parts: Parts = {"decode": lambda x: vae.decode(x, return_dict=False)[0]}
    chunks = (vae.decoder, "forward") if case.network == "wan" else None
    return Network(vae, parts, {"decode": (vae, "_decode")}, {}, tiling_of(vae), chunks)


def convolution(case: Case) -> Network:
    channels = case.shape[1]
    conv = nn.Conv2d(channels, channels, case.kernel, padding=case.kernel // 2)
    model = nn.Sequential(conv)
    return Network(model, {"run": model}, {"run": (model, "forward")}, {"run": 1})


def upscaler(case: Case) -> Network:
    model = Esrgan(8, 2, 4) if case.toy else Esrgan()
    return Network(model, {"run": model}, {"run": (model, "forward")}, {"run": 4})


BUILDERS: dict[str, Callable[[Case], Network]] = {
    "sd": autoencoder, "flux": autoencoder, "wan": video, "ltx": video, "conv": convolution, "esrgan": upscaler,
}  # fmt: skip


class Worker:
    """Runs cases on `device`, and keeps the last network and what is exact of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key: Any = None
        self._network: Optional[Network] = None
        self._exact: Optional[Tensor] = None
        self._tried = False  # what is exact: where that does not fit, it does not for the next method

    def run(self, case: Case) -> dict[str, Any]:
        """What was measured, or `{"error": …}` or `{"lacking": …}` in words.

        ends: this process is of no use any more.
        """
        try:
            with torch.inference_mode():
                return self._measured(case)
        except LackingError as error:
            return {"lacking": str(error)}
        except Exception as error:
            self._key = self._network = self._exact = None  # a failed call may have left a network in pieces
            if is_out_of_memory(error):
                return {"error": "out of memory"}
            text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return {"error": text[:200], "ends": "CUDA error" in text}  # behind which every call fails
        finally:
            with suppress(RuntimeError):
                clean(self.device)

    def _measured(self, case: Case) -> dict[str, Any]:
        network = self._built(case)
        input = made(case, self.device)
        if case.exact and not self._tried:
            self._tried, self._exact = True, exactly(network, case, input)
            clean(self.device)
        run = network.parts[case.part]
        run(input[..., :32, :32])  # the libraries' own start-up
        with way(network, case) as (function, expected):
            if case.table == "profile":
                function(input)
                found, seconds = kernels(lambda: function(input), self.device)
                return {"kernels": sorted(found.items(), key=lambda one: -one[1][1])[:PROFILED], "seconds": seconds,
                        "all": [sum(one[part] for one in found.values()) for part in (0, 1)]}  # fmt: skip
            counted = not case.toy or case.method == "eager"  # the profiler takes longer than a toy
            runs = MOST_RUNS if not case.toy else int(counted)
            result, found = measured(lambda: function(input), self.device, runs, counted)
            found["expected"], found["rows"] = expected()
        if case.exact and self._exact is not None:
            found["errors"] = errors(result, self._exact)
        return found

    def _built(self, case: Case) -> Network:
        key = case.network, case.part, case.shape, case.dtype, case.kernel, case.toy
        if self._network is None or key != self._key:
            self._network, self._exact, self._tried = None, None, False
            clean(self.device)
            torch.manual_seed(0)
            with torch.inference_mode(False), torch.device(self.device):
                network = BUILDERS[case.network](case)
            nn.Module.to(network.module, getattr(torch, case.dtype)).eval().requires_grad_(False)
            self._key, self._network = key, network
        return self._network


def made(case: Case, device: torch.device) -> Tensor:
    """The input of a case, a part of it alike in each row where it is large."""
    torch.manual_seed(1)
    dtype = getattr(torch, case.dtype)
    if case.network != "conv":
        return torch.randn(case.shape, device=device, dtype=dtype)
    rows = torch.randn(*case.shape[:2], 64, case.shape[3], device=device, dtype=dtype)
    return rows.repeat(1, 1, case.shape[2] // 64, 1)


def exactly(network: Network, case: Case, input: Tensor) -> Optional[Tensor]:
    """The result in float64, on the CPU, of the same weights; None where there is no room for it."""
    with torch.inference_mode(False), torch.device(input.device):
        wide = BUILDERS[case.network](case)
    nn.Module.to(wide.module, torch.float64).load_state_dict(network.module.state_dict())
    wide.module.eval().requires_grad_(False)
    try:
        return wide.parts[case.part](input.double()).cpu()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


Way = tuple[Callable[[Tensor], Tensor], Callable[[], tuple[int, int]]]


@contextmanager
def way(network: Network, case: Case) -> Iterator[Way]:
    """What runs a case by its method, and tells afterwards the bytes that its plan expected, and the rows of a strip (0
    for none)."""
    run, method = network.parts[case.part], case.method
    if method in ("stream", "operators", "kitchen", "bounded", "chunks", "strips"):
        place = network.chunks if method == "chunks" else network.streamed[case.part]
        if place is None:
            raise LackingError("it is not decoded by chunks")
        tuning = SMALL if case.toy else USUAL
        tuning = replace(tuning, strip_bytes=case.strip_bytes) if case.strip_bytes else tuning
        with kernels_of(method, network.module), streaming(*place, case.budget, tuning) as runner:
            yield run, lambda: (0, 0) if runner.last is None else (runner.last.peak, runner.last.rows)
    elif method in ("patch", "patch16"):
        with patched(network.module, 16 if method == "patch16" else 0, threshold=0):
            yield run, lambda: (0, 0)
    elif method == "patch_conv":
        if importlib.util.find_spec("patch_conv") is None:
            raise LackingError("patch_conv is not installed here")
        yield patch_conv_module().PatchConv2d(splits=16, conv2d=network.module[0]), lambda: (0, 0)  # pyright: ignore
    elif method == "tiled":
        if network.tile is None:
            raise LackingError("diffusers is not installed here, which has the tiles")
        network.tile(True)
        try:
            yield run, lambda: (0, 0)
        finally:
            network.tile(False)
    elif method == "comfyui":
        tile, overlap = comfyui_tile(case)
        yield lambda input: thrice(run, input, tile, overlap, network.scales[case.part]), lambda: (0, 0)
    else:
        yield run, lambda: (0, 0)


@contextmanager
def kernels_of(method: str, module: nn.Module) -> Iterator[None]:
    """Within the block what lies between convolutions is left to PyTorch's operators, or to comfy-kitchen's kernel,
    where the method says so."""
    if method not in ("operators", "kitchen"):
        yield
        return
    device = next(module.parameters()).device
    if method == "kitchen":
        with suppress(ImportError):
            importlib.import_module("comfy_kitchen")
        if by_kitchen.operator() is None:
            raise LackingError("no comfy-kitchen is installed here that takes statistics, as 0.2.40 does")
    elif device.type == "cuda" and not Kernels(device).by_triton:
        raise LackingError("there is no Triton here that works: PyTorch's operators alone is what streamed above")
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "torch" if method == "operators" else "kitchen"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def comfyui_tile(case: Case) -> tuple[int, int]:
    """Side and overlap of ComfyUI's tiles, in pixels of the input: 512 and 64 of the image."""
    side, overlap = (64, 16) if case.toy else (512, 64)
    return (side // 8, overlap // 8) if case.part == "decode" else (side, overlap)


@contextmanager
def streaming(owner: Any, name: str, budget: Optional[int], tuning: Tuning) -> Iterator[Streamed]:
    """Within the block a method of `owner` streams; what streams it tells what it expected."""
    runner, original = Streamed(budget, tuning=tuning), getattr(owner, name)
    owner.__dict__[name] = lambda *args, **kwargs: runner.call(original, args, kwargs)
    try:
        yield runner
    finally:
        del owner.__dict__[name]


def serve(device: str) -> None:
    """Answer each case, a line of JSON, with a line of JSON."""
    torch.set_grad_enabled(False)
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1)  # says where it is before it is ended
    worker = Worker(torch.device(device))
    for line in sys.stdin:
        fields = json.loads(line)
        case = Case(**fields | {"shape": tuple(fields["shape"])})
        print(json.dumps(worker.run(case)), flush=True)
