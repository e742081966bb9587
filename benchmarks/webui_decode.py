"""One decode by Automatic1111's VAE, in the WebUI's Python: `webui_decode.py --worker CASE`, for `vae_decode.py`.

Eagerly, with this pack's toggle, or with the extension Tiled VAE, a part of
`pkuliyi2015/multidiffusion-upscaler-for-automatic1111`.
The VAE is the WebUI's own class with weights drawn by its own initialisation.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

PACK = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, PACK)

import torch
from harness import latent_of

from comfyui_patchconv.hosts.webui.settings import Settings
from comfyui_patchconv.hosts.webui.toggle import Toggle
from comfyui_patchconv.memory.recorder import Recorder

CONFIG = dict(
    double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4],
    num_res_blocks=2, attn_resolutions=[], dropout=0.0,
)  # fmt: skip
"""Settings of the WebUI's configs/v1-inference.yaml."""


def host(checkout: str) -> Any:
    """The WebUI's first stage model, as it is when a checkpoint was loaded: its attention replaced by the WebUI's."""
    os.chdir(checkout)
    sys.path[0] = checkout
    sys.argv = ["webui", *([] if torch.cuda.is_available() else ["--use-cpu", "all"]), "--skip-version-check"]
    importlib.import_module("modules.initialize").imports()
    hijack = importlib.import_module("modules.sd_hijack")
    hijack.list_optimizers()
    hijack.model_hijack.apply_optimizations()
    torch.manual_seed(0)
    autoencoder = importlib.import_module("ldm.models.autoencoder").AutoencoderKL
    return autoencoder(CONFIG, lossconfig={"target": "torch.nn.Identity"}, embed_dim=4).eval()


def tile(vae: Any, extension: str, device: str) -> None:
    """Tiled VAE on, as its box in the WebUI switches it: sizes that it recommends, fast decoder and encoder."""
    sys.path.append(extension)
    tiled_vae = importlib.import_module("scripts.tilevae")
    for net, size, is_decoder in (
        (vae.encoder, tiled_vae.get_rcmd_enc_tsize(), False),
        (vae.decoder, tiled_vae.get_rcmd_dec_tsize(), True),
    ):
        net.original_forward = net.forward
        net.forward = tiled_vae.VAEHook(net, size, is_decoder, True, True, False, device != "cpu")


@torch.inference_mode()
def worker(case: dict[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, case["dtype"])
    vae = host(case["checkout"]).to(case["device"], dtype)
    latent = latent_of(case).to(case["device"], dtype)
    if case["method"] == "webui_tiled":
        tile(vae, case["extension"], case["device"])
    if case["method"] == "webui_streamed":
        Toggle(Settings(mode="stream")).follow([vae], [])
    vae.decode(latent[..., :8, :8])  # the libraries' own start-up
    with Recorder(case["device"]) as record:
        image = vae.decode(latent)
    torch.save(image.float().cpu(), case["image"])
    return {"peak": record.peak, "seconds": [record.seconds]}


if __name__ == "__main__":
    print(json.dumps(worker(json.loads(sys.argv[2]))))
