"""One decode by ComfyUI's own nodes, in the host's Python: `comfyui_decode.py --worker CASE`, for `vae_decode.py` and
`comparison.py`."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PACK), str(PACK / "tests" / "comfyui")]

import torch
from harness import latent_of
from launch import prepare  # pyright: ignore[reportMissingImports]

from comfyui_patchconv.memory.recorder import Recorder


def host(checkout: str) -> Any:
    """ComfyUI's module `nodes`, with this pack loaded as the host loads it."""
    sys.path[0] = checkout
    prepare()
    sys.argv = ["comfyui", *([] if torch.cuda.is_available() else ["--cpu"])]
    importlib.import_module("comfy.options").enable_args_parsing()
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(PACK)))
    return nodes


@torch.inference_mode()
def worker(case: dict[str, Any]) -> dict[str, Any]:
    nodes = host(case["checkout"])
    state = importlib.import_module("comfy.utils").load_torch_file(case["vae"])
    dtype = getattr(torch, case["dtype"])
    vae = importlib.import_module("comfy.sd").VAE(sd=state, dtype=dtype)
    latent = {"samples": latent_of(case)}
    modes = {"comfyui_ours": "patch", "comfyui_streamed": "stream"}
    if case["method"] in modes:
        patch_conv = nodes.NODE_CLASS_MAPPINGS["PatchConv_VAE"]
        (vae,) = patch_conv.execute(vae, splits=0, threshold=16.0, half="both", mode=modes[case["method"]]).result
    if case["method"] == "comfyui_tiled":
        node, more = nodes.VAEDecodeTiled(), {"tile_size": case["tile"], "overlap": 64}
    else:
        node, more = nodes.VAEDecode(), {}
    vae.decode(latent["samples"][..., :8, :8])  # the libraries' own start-up
    with Recorder(vae.device) as record:
        (image,) = node.decode(vae, latent, **more)
    torch.save(image.movedim(-1, 1).float().cpu(), case["image"])
    return {"peak": record.peak, "seconds": [record.seconds]}


if __name__ == "__main__":
    print(json.dumps(worker(json.loads(sys.argv[2]))))
