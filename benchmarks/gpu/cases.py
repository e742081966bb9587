"""What is measured, the most valuable first: plain data, so that a case can be handed to another process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

METHODS = {
    "eager": "eager",
    "stream": "ours, streamed",
    "strips": "ours, streamed, strips of {strips} MiB",
    "operators": "ours, streamed, by PyTorch's operators alone",
    "kitchen": "ours, streamed, by comfy-kitchen's kernel",
    "bounded": "ours, streamed within {budget}",
    "chunks": "ours, streamed by chunks",
    "patch": "ours, strips",
    "patch16": "ours, 16 strips",
    "patch_conv": "patch_conv, 16 strips",
    "tiled": "diffusers' tiling",
    "comfyui": "ComfyUI's tiling",
}
OTHERS = ("eager", "patch_conv", "tiled", "comfyui")
IMAGE = ("eager", "stream", "bounded", "patch", "tiled", "comfyui")
DECODE = ("eager", "stream", "operators", "kitchen", *IMAGE[2:])
CLIP = ("eager", "stream", "bounded", "tiled")
BY_CHUNKS = (*CLIP, "chunks")  # of a VAE whose decoder is called for each latent frame
UPSCALE = ("eager", "stream", "bounded", "comfyui")
CONVOLUTION = ("eager", "patch16", "patch", "patch_conv")

BUDGET, SMALL_BUDGET = 2 << 30, 1 << 20
"""Bytes of the bounded runs, and of those of toys."""


@dataclass(frozen=True)
class Case:
    """One row of a table.

    network: see `work.BUILDERS`. part: what is run of it. shape: of the input; kernel: of a convolution. seconds: what
    it takes in all on a large GPU, roughly; it is left out where that is more than there is left. exact: errors against
    float64 are measured. toy: the network is of toy width. strip_bytes: as of `Tuning`; 0 for what suits the device.
    """

    table: str
    what: str
    method: str
    network: str
    part: str
    shape: tuple[int, ...]
    dtype: str
    seconds: float
    kernel: int = 0
    exact: bool = False
    toy: bool = False
    strip_bytes: int = 0

    @property
    def budget(self) -> int | None:
        """Bytes to stay within."""
        return (SMALL_BUDGET if self.toy else BUDGET) if self.method == "bounded" else None

    @property
    def ours(self) -> bool:
        """Whether it is for us to mend what goes wrong."""
        return self.method not in OTHERS

    @property
    def label(self) -> str:
        """The method, as the table shows it."""
        budget = self.budget or 0
        text = f"{budget >> 30} GiB" if budget >> 30 else f"{budget >> 20} MiB"
        return METHODS[self.method].format(budget=text, strips=self.strip_bytes >> 20)


class About(NamedTuple):
    """title, what: of a table. unit: what a case of it is."""

    title: str
    what: str
    unit: str


_VAE = "Random weights. "
ABOUT = {
    "sd_decode": About("Decoding with Stable Diffusion's VAE, and SDXL's", _VAE, "image"),
    "sd_encode": About("Encoding with Stable Diffusion's VAE, and SDXL's", _VAE, "image"),
    "flux_decode": About("Decoding with Flux's VAE", _VAE, "image"),
    "flux_encode": About("Encoding with Flux's VAE", _VAE, "image"),
    "strips": About(
        "Decoding in strips of so many rows", f"{_VAE}The first row has the strips that were chosen. ", "image"
    ),
    "single_conv": About("One convolution", "Random weights, the input's rows alike. ", "convolution"),
    "profile": About("Profile of one decode", "Stable Diffusion's VAE, the longest kernels first. ", "image"),
    "wan": About("Decoding a clip with Wan 2.1's VAE", _VAE, "clip"),
    "ltx": About("Decoding a clip with LTX's VAE", _VAE, "clip"),
    "esrgan": About("Upscaling by ESRGAN, four times", "RealESRGAN x4plus' layout with random weights. ", "image"),
}


def images(
    table: str, sizes: Sequence[int], dtype: str, *, methods: Sequence[str] = IMAGE, exact: int = 0, toy: bool = False
) -> list[Case]:
    """Of a VAE's table, by side of the image in pixels. exact: the side whose errors are measured."""
    network, part = table.split("_")
    channels = 16 if network == "flux" else 4
    return [
        Case(
            table, f"{size}²", method, network, part,
            (1, channels, size // 8, size // 8) if part == "decode" else (1, 3, size, size),
            dtype, 1.5 + 0.3 * (size / 1024) ** 2.5, exact=size == exact, toy=toy,
        )
        for size in sizes
        for method in methods
    ]  # fmt: skip


def convolutions(
    shapes: Sequence[tuple[int, int, int]], dtype: str, *, exact: int = 0, toy: bool = False
) -> list[Case]:
    """By channels, side and kernel. exact: the side whose errors are measured."""
    return [
        Case(
            "single_conv", f"{kernel}x{kernel}, {channels} channels, {side}²", method, "conv", "run",
            (1, channels, side, side), dtype, 1.5 + kernel / 3 if side > 1024 else 1.5, kernel, side == exact, toy,
        )
        for channels, side, kernel in shapes
        for method in CONVOLUTION
    ]  # fmt: skip


def clips(
    table: str, frames: int, height: int, width: int, seconds: float, dtype: str, *, exact: bool = False,
    toy: bool = False,
) -> list[Case]:  # fmt: skip
    """Of one video. seconds: of one case. exact: whether errors are measured."""
    channels, steps, side = (16, 4, 8) if table == "wan" else (8 if toy else 128, 8, 32)
    shape = (1, channels, 1 + (frames - 1) // steps, height // side, width // side)
    what = f"{frames} frames of {width}x{height}"
    methods = BY_CHUNKS if table == "wan" else CLIP
    return [Case(table, what, one, table, "decode", shape, dtype, seconds, exact=exact, toy=toy) for one in methods]


def upscales(sizes: Sequence[int], dtype: str, *, exact: int = 0, toy: bool = False) -> list[Case]:
    """By side of the input in pixels."""
    return [
        Case("esrgan", f"{size}²", method, "esrgan", "run", (1, 3, size, size), dtype, 3 * (size / 512) ** 2,
             exact=size == exact, toy=toy)
        for size in sizes
        for method in UPSCALE
    ]  # fmt: skip


def profiles(size: int, dtype: str, toy: bool = False) -> list[Case]:
    """A decode of `size` pixels a side whose kernels are listed, of each method that there is something to see of."""
    cases = images("sd_decode", [size], dtype, methods=("stream", "operators", "eager"), toy=toy)
    return [Case(**vars(one) | {"table": "profile", "exact": False}) for one in cases]


STRIPS = (4, 8, 16, 32, 64, 128, 256)
"""MiB of a strip that are tried beside what is chosen for a device, from the least to the most that may be."""


def strips(size: int, dtype: str, toy: bool = False) -> list[Case]:
    """A decode of `size` pixels a side in strips of several heights, and of the height that is chosen."""
    (case,) = images("sd_decode", [size], dtype, methods=("stream",), toy=toy)
    case = replace(case, table="strips", exact=False)
    return [case, *(replace(case, method="strips", strip_bytes=one << 20) for one in STRIPS[: 2 if toy else None])]


def of_a_gpu() -> list[Case]:
    """All of them, the most valuable first, in half precision as users have it."""
    half, wide = "float16", "bfloat16"
    large = [(512, 2048, 3), (256, 4096, 3), (512, 2048, 5), (256, 4096, 5), (512, 2048, 7), (256, 4096, 7)]
    few, rest = ("stream", "bounded", "eager", "comfyui"), ("patch", "tiled")
    return [
        *images("sd_decode", [1024], half, methods=DECODE, exact=1024),
        *profiles(1024, half),
        *strips(1024, half),
        *convolutions([(512, 512, 3), *large], half, exact=512),
        *images("sd_decode", [2048], half, methods=DECODE),
        *strips(2048, half),
        *images("sd_encode", [1024], half, exact=1024),
        *clips("wan", 9, 240, 416, 3, wide, exact=True),
        *upscales([256, 512], half, exact=256),
        *images("sd_decode", [4096], half),
        *images("flux_decode", [1024], half, exact=1024),
        *clips("ltx", 25, 256, 384, 3, wide, exact=True),
        *images("sd_encode", [2048], half),
        *images("sd_decode", [8192], half, methods=("bounded", "stream")),
        *clips("wan", 33, 480, 832, 10, wide),
        *upscales([1024], half),
        *images("flux_encode", [1024], half, exact=1024),
        *clips("ltx", 97, 512, 768, 10, wide),
        *images("sd_encode", [4096], half, methods=few),
        *images("flux_decode", [2048, 4096], half, methods=few),
        *images("sd_decode", [8192], half, methods=("eager", "comfyui")),
        *images("flux_encode", [2048, 4096], half, methods=few),
        *clips("wan", 81, 480, 832, 25, wide),
        *images("sd_encode", [8192], half, methods=few),
        *images("flux_decode", [8192], half, methods=few),
        *images("flux_encode", [8192], half, methods=few),
        *images("sd_encode", [4096, 8192], half, methods=rest),
        *images("sd_decode", [8192], half, methods=rest),
        *images("flux_decode", [2048, 4096, 8192], half, methods=rest),
        *images("flux_encode", [2048, 4096, 8192], half, methods=rest),
    ]


def of_toys() -> list[Case]:
    """Every table and method, so small that a CPU has them in seconds."""
    single = "float32"
    vaes = ("sd_decode", "sd_encode", "flux_decode", "flux_encode")
    return [
        *(case for table in vaes for case in images(table, [64], single, exact=64, toy=True)),
        *images("sd_decode", [128], single, methods=("eager", "stream", "operators", "kitchen"), toy=True),
        *profiles(64, single, toy=True),
        *strips(64, single, toy=True),
        *convolutions([(4, 64, 3), (4, 64, 7)], single, exact=64, toy=True),
        *clips("wan", 5, 64, 64, 0.1, single, exact=True, toy=True),
        *clips("ltx", 9, 64, 64, 0.1, single, exact=True, toy=True),
        *upscales([32], single, exact=32, toy=True),
    ]
