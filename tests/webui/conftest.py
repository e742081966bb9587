"""A real WebUI, Automatic1111's, Forge or reForge, driven through its API.

WEBUI_PATH: a checkout with its repositories; without it these tests are skipped. WEBUI_PYTHON: the Python to start it
with, this one by default. WEBUI_CHECKPOINT: name of an SD 1.5 checkpoint in its models/Stable-diffusion (random weights
will do); by default the first whose name has `sd15` or `v1-5` in it. Nothing is downloaded: what the WebUI wants from
the Hugging Face hub, CLIP's tokenizer, has to be in the hub's cache (HF_HOME).
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from host_process import HostProcess, checkpoint_in
from processes import LIMIT
from upscale_weights import compact, esrgan, real_esrgan

PACK = Path(__file__).parents[2]
CHECKPOINTS = ("first", "second")
UPSCALER, REAL_UPSCALER, COMPACT_UPSCALER = "patchconv-esrgan", "patchconv-realesrgan-x4plus", "patchconv-compact"
PATCH = {"mode": "patch", "unet": True, "splits": 3, "threshold": 0.0}
STREAM = {"mode": "stream", "unet": True, "splits": 3, "threshold": 0.0}
MODES = pytest.mark.parametrize("settings", [PATCH, STREAM], ids=["patch", "stream"])
FULL = ("--no-half",)
_NONE: Mapping[str, Any] = MappingProxyType({})


class Host(NamedTuple):
    """What differs between the WebUIs.

    cpu: flags for a machine without a GPU. frugal: flags that have weights move, one each.
    half, mixed, bfloat16: flags for half precision; for a U-Net in half precision and a VAE that is not; for bfloat16.
    plot: arguments of the X/Y/Z plot behind its axes: no legend, the single pictures too, no others; no other seeds.
    hires: what a request for hires fix needs beside the usual.
    compact: where models of RealESRGAN's compact kind lie, which is also what the settings of their tiles begin with.
    """

    name: str
    cpu: tuple[str, ...]
    frugal: tuple[str, ...]
    half: tuple[str, ...]
    mixed: tuple[str, ...]
    bfloat16: tuple[str, ...]
    plot: tuple[Any, ...]
    hires: Mapping[str, Any] = _NONE
    compact: str = "ESRGAN"


_PLOT = (True, False, False, False, False, False, 0, False)
A1111 = Host(
    "Automatic1111",
    cpu=("--skip-torch-cuda-test", "--use-cpu", "all"),
    frugal=("--medvram", "--lowvram"),
    half=("--precision", "half"),
    mixed=("--upcast-sampling", "--no-half-vae"),
    bfloat16=(),
    plot=(False, *_PLOT),
)
REFORGE = Host(
    "reForge",
    cpu=("--skip-torch-cuda-test", "--always-cpu"),
    frugal=("--always-low-vram", "--always-no-vram"),
    half=("--unet-in-fp16", "--vae-in-fp16"),
    mixed=("--unet-in-fp16", "--vae-in-fp32"),
    bfloat16=("--unet-in-bf16", "--vae-in-bf16"),
    plot=(False, False, False, 0, *_PLOT),
    compact="COMPACT",
)
FORGE = REFORGE._replace(
    name="Forge",
    plot=A1111.plot,
    hires={"hr_additional_modules": ["Use same choices"]},
    compact=A1111.compact,
)


class Result(NamedTuple):
    """What a run returned: pictures `[H, W, 3]`, the parameters written to the first, and the report in the answer; and
    what the log has of it."""

    images: list[np.ndarray]
    infotext: str
    report: str
    log: str


class WebUI(HostProcess):
    """One WebUI process with a data folder of its own; the checkout stays as it is. chosen: what it has under Settings
    from the start."""

    def __init__(
        self, checkout: Path, checkpoint: str, folder: Path, flags: tuple[str, ...], chosen: Mapping[str, Any] = _NONE
    ) -> None:
        extensions, checkpoints = folder / "extensions", folder / "checkpoints"
        extensions.mkdir()
        checkpoints.mkdir()
        (extensions / "comfyui_patchconv").symlink_to(PACK)
        (extensions / "patchconv_probe").symlink_to(Path(__file__).with_name("probe"))
        for name in CHECKPOINTS:
            source = checkout / "models" / "Stable-diffusion" / checkpoint
            (checkpoints / f"{name}.safetensors").symlink_to(source.resolve())
        self.host = host_of(checkout)
        _save_upscalers(folder / "models", self.host)
        # Random weights have no mean that emphasis could be scaled to.
        options = {"emphasis": "No norm", "live_previews_enable": False, "sd_model_checkpoint": "first.safetensors"}
        (folder / "config.json").write_text(json.dumps({**options, **chosen}))
        command = [python(), "launch.py", "--skip-prepare-environment", "--no-download-sd-model", "--api"]
        command += ["--do-not-download-clip", "--data-dir", str(folder), "--ckpt-dir", str(checkpoints), *flags]
        command += ["--gradio-allowed-path", str(checkout)]  # Forge hands out its own scripts from the data folder only
        if not torch.cuda.is_available():
            command += self.host.cpu
        environment = {"HF_HUB_OFFLINE": "1", "SD_WEBUI_RESTARTING": "1"}  # restarting: it opens no browser
        super().__init__(command, folder, checkout, os.environ | environment)

    def start(self) -> None:
        super().start()
        try:
            # Asked before it is through, it would refuse to add the rest of its routes.
            self.wait(lambda: "Startup time:" in self.log(), seconds=900)
        except BaseException:
            self.stop()
            raise

    def run(self, kind: str = "txt2img", patch_conv: Any = None, **request: Any) -> Result:
        """A picture of 128 pixels by two steps, `request` apart; patch_conv: the script's arguments."""
        asked: dict[str, Any] = {
            "prompt": "a cat", "seed": 1, "steps": 2, "cfg_scale": 1.0, "width": 128, "height": 128,
            "sampler_name": "Euler", **request,
        }  # fmt: skip
        if patch_conv is not None:
            args = patch_conv if isinstance(patch_conv, list) else [{"enabled": True, **patch_conv}]
            asked["alwayson_scripts"] = {"Patch Conv": {"args": args}}
        self.get("/probe/seed")
        before = len(self.log())
        answer = self.get(f"/sdapi/v1/{kind}", asked, seconds=LIMIT)
        images = [np.asarray(open_image(data)) for data in answer["images"]]
        info = json.loads(answer["info"])
        report = info["extra_generation_params"].get("Patch Conv report", "")
        return Result(images, info["infotexts"][0], report, self.log()[before:])

    @contextmanager
    def options(self, **values: Any) -> Iterator[None]:
        """Within the block these are set under Settings."""
        there = self.get(f"/probe/options?names={','.join(values)}")  # the hosts' own API leaves some out
        self.get("/sdapi/v1/options", values)
        try:
            yield
        finally:
            self.get("/sdapi/v1/options", there)


def _save_upscalers(models: Path, host: Host) -> None:
    """Write upscale models to where `host` looks for them in its folder of models."""
    for folder, name, weights in (
        ("ESRGAN", UPSCALER, esrgan()),
        ("ESRGAN", REAL_UPSCALER, real_esrgan()),
        (host.compact, COMPACT_UPSCALER, compact()),
    ):
        if weights is not None:
            (models / folder).mkdir(parents=True, exist_ok=True)
            # The WebUI's check of pickles knows no file in the newer format.
            torch.save(weights, models / folder / f"{name}.pth", _use_new_zipfile_serialization=False)


def open_image(data: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def as_base64(image: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def python() -> str:
    return os.environ.get("WEBUI_PYTHON", sys.executable)


def host_of(checkout: Path) -> Host:
    """Which WebUI lies in a folder, by the package that its models come from."""
    if (checkout / "backend").is_dir():
        return FORGE
    return REFORGE if (checkout / "ldm_patched").is_dir() else A1111


@pytest.fixture(scope="session")
def checkout() -> Path:
    path = os.environ.get("WEBUI_PATH")
    if not path:
        pytest.skip("WEBUI_PATH is not set: it names the checkout of the WebUI, Forge or reForge to test with")
    if not (Path(path) / "webui.py").is_file():
        pytest.skip(f"WEBUI_PATH is {path}, where there is no WebUI (no webui.py)")
    return Path(path).resolve()


@pytest.fixture(scope="session")
def checkpoint(checkout: Path) -> str:
    """File name of an SD 1.5 checkpoint."""
    folder = checkout / "models" / "Stable-diffusion"
    return checkpoint_in(folder, "WEBUI_CHECKPOINT", os.environ.get("WEBUI_CHECKPOINT"))


@contextmanager
def serve(
    checkout: Path, checkpoint: str, folder: Path, flags: tuple[str, ...] = FULL, chosen: Mapping[str, Any] = _NONE
) -> Iterator[WebUI]:
    """One that is starting; see `WebUI`."""
    webui = WebUI(checkout, checkpoint, folder, flags, chosen)
    try:
        yield webui
    finally:
        webui.stop()


@pytest.fixture(scope="session")
def webui(checkout: Path, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    with serve(checkout, checkpoint, tmp_path_factory.mktemp("webui")) as webui:
        yield webui


@pytest.fixture(scope="module", params=[0, 1], ids=["medium", "low"])
def frugal_webui(
    request: pytest.FixtureRequest, checkout: Path, checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WebUI]:
    host = host_of(checkout)
    if host is not A1111 and not torch.cuda.is_available():
        pytest.skip(f"there is no GPU: {host.name} moves weights for want of its memory only")
    flags = (*FULL, host.frugal[request.param])
    with serve(checkout, checkpoint, tmp_path_factory.mktemp("frugal"), flags) as webui:
        yield webui
