"""Takes docs/webui.png: a photograph that went through Automatic1111's VAE in strips, as a user sees it.

    WEBUI_PATH=… WEBUI_PYTHON=… python benchmarks/screenshots.py [--size 512] [--budget 0.5]

The VAE is the demo's at Stable Diffusion's full width (`widened.py`), the photograph the demo's, which the VAE was not
trained on: img2img encodes it, takes no noise away, and decodes it. So the checkpoint counts for nothing in the
picture, and may have random weights. Needs what the tests in a WebUI and in a browser need (CONTRIBUTING.md), and a
font of emoji, which the WebUI has on its buttons.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1])]

import torch
from comparison import part
from host_process import checkpoint_in, page_of  # pyright: ignore[reportMissingImports]
from PIL import Image
from webui.accordion import fill_number, open_tab  # pyright: ignore[reportMissingImports]
from webui.conftest import WebUI, serve  # pyright: ignore[reportMissingImports]
from widened import save

from comfyui_patchconv.cli.demo import PHOTOGRAPH, SMALL_VAE
from comfyui_patchconv.cli.vae import RunOptions, decode
from comfyui_patchconv.files.images import save_image, save_picture
from comfyui_patchconv.files.latents import load_latent
from comfyui_patchconv.files.vae import load_vae

ROOT = Path(__file__).parents[1]
VAE = "demo-full-width.safetensors"
ACCORDION = "#script_img2img_patch_conv_enabled"
_COARSE = 5  # of 255 levels every fifth: six tenths of the bytes, and no difference that shows
WIDTH, HEIGHT = 1280, 1200
CHOSEN: dict[str, Any] = {
    "sd_vae": VAE,
    "quicksettings_list": ["sd_model_checkpoint", "sd_vae"],
    "compact_prompt_box": True,
    "img2img_editor_height": 240,
    "ui_reorder_list": ["image", "scripts", "prompt"],
}
"""Under Settings, so that the picture, the accordion and the result fit on a screen."""


@torch.inference_mode()
def save_photograph(path: Path, size: int) -> None:
    """Write a square of the demo's photograph, `size` pixels wide."""
    latent = part(load_latent(PHOTOGRAPH), size // 8)
    save_image(path, decode(load_vae(SMALL_VAE), latent, RunOptions("stream"))[0])


def run(page: Any, photograph: Path, size: int, budget: float) -> None:
    """On the tab img2img, with Patch Conv on, until the result is there."""
    page.wait_for_selector("#txt2img_generate")
    open_tab(page, "img2img")
    page.locator("#img2img_image input[type=file]").first.set_input_files(photograph)
    page.wait_for_selector("#img2img_image img")
    for name, value in zip(("width", "height", "denoising_strength", "cfg_scale"), (size, size, 0, 1)):
        fill_number(page, f"img2img_{name}", str(value))
    page.locator(f"{ACCORDION} > .label-wrap").click()
    page.locator("#script_img2img_patch_conv_mode").get_by_label("stream").check()
    fill_number(page, "script_img2img_patch_conv_budget", str(budget))
    page.click("#img2img_generate")
    page.wait_for_selector("#img2img_gallery img")


def take(webui: WebUI, photograph: Path, args: argparse.Namespace) -> None:
    """What a user sees of it, from the top of the page to the end of the accordion."""
    with page_of(webui.address, WIDTH, HEIGHT) as page:
        run(page, photograph, args.size, args.budget)
        page.mouse.move(WIDTH - 1, HEIGHT - 1)
        page.evaluate("() => { document.activeElement.blur(); window.scrollTo(0, 0); }")
        page.wait_for_timeout(2000)  # for what fades in
        box = page.locator(ACCORDION).bounding_box()
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 6}
        whole = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    save_picture(args.out, whole.point([round(level / _COARSE) * _COARSE for level in range(256)] * 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "webui.png", help="default: docs/")
    parser.add_argument("--size", type=int, default=512, help="pixels of the picture's sides, up to 768 (%(default)s)")
    parser.add_argument("--budget", type=float, default=0.5, help="GiB (%(default)s)")
    args = parser.parse_args()
    checkout = Path(os.environ["WEBUI_PATH"]).resolve()
    checkpoint = checkpoint_in(
        checkout / "models" / "Stable-diffusion", "WEBUI_CHECKPOINT", os.environ.get("WEBUI_CHECKPOINT")
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models" / "VAE").mkdir(parents=True)
        save(folder / "models" / "VAE" / VAE, dtype=torch.float16)
        save_photograph(folder / "raccoon.png", args.size)
        with serve(checkout, checkpoint, folder, chosen=CHOSEN) as webui:
            webui.wait(lambda: "Startup time:" in webui.log())
            take(webui, folder / "raccoon.png", args)


if __name__ == "__main__":
    main()
