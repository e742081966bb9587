"""Takes docs/nodes.png: a photograph's latent that ComfyUI decoded in strips, and the nodes that did it.

    COMFYUI_PATH=… COMFYUI_PYTHON=… python benchmarks/nodes_picture.py [--size 640]

The VAE is the demo's at Stable Diffusion's full width (`widened.py`), the photograph the demo's, which the VAE was not
trained on. Needs what the tests in ComfyUI and in a browser need (CONTRIBUTING.md).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1])]

import torch
from browser.test_front_end import GRAPH, OPEN_AGAIN, READY  # pyright: ignore[reportMissingImports]
from comfyui.conftest import Server, serve  # pyright: ignore[reportMissingImports]
from comparison import part
from host_process import page_of  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file
from widened import save

from comfyui_patchconv.cli.demo import PHOTOGRAPH

ROOT = Path(__file__).parents[1]
VAE = "demo-full-width.safetensors"
NODES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "1": ("VAELoader", {"vae_name": VAE}, (0, 0)),
    "2": ("LoadLatent", {"latent": "raccoon.latent"}, (0, 190)),
    "3": (
        "PatchConv_VAE",
        {
            "vae": ["1", 0], "splits": 0, "threshold": 0.0, "half": "both", "mode": "stream", "budget": 0.0,
            "padding": "plain", "devices": "one",
        },
        (340, 0),
    ),
    "4": ("VAEDecode", {"samples": ["2", 0], "vae": ["3", 0]}, (700, 0)),
    "5": ("SaveImage", {"images": ["4", 0], "filename_prefix": "raccoon"}, (700, 150)),
    "6": ("PatchConv_Report", {"after": ["4", 0], "vae": ["3", 0]}, (1020, 0)),
}  # fmt: skip
"""Of each node its type, its inputs, and where it lies."""
LEFT, TOP = 80, 120
"""Pixels of the page beside and above the nodes."""
TITLE, EDGE = 48, 14
"""Pixels above a node's place, of its title and what is written over it, and those that are shown around all nodes."""

NARROWEST = 180
"""Pixels of a node's width, in which its title can be read."""

PLACE = f"""places => {{
    for (const node of {GRAPH}.nodes) {{
        node.pos = [...places[node.id]];
        node.setSize([Math.max(node.size[0], {NARROWEST}), node.size[1]]);
    }}
    Object.assign(app.canvas.ds, {{ scale: 1 }});
    app.canvas.ds.offset = [{LEFT}, {TOP}];
    app.canvas.deselectAll?.();
    app.canvas.setDirty(true, true);
}}"""
EXTENT = f"() => [0, 1].map(side => Math.max(...{GRAPH}.nodes.map(node => node.pos[side] + node.size[side])))"


def take(server: Server, out: Path) -> None:
    with page_of(server.address, 1560, 860) as page:
        page.wait_for_function(READY)
        page.wait_for_load_state("networkidle")
        graph = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs, _) in NODES.items()}
        page.evaluate("async graph => { await app.loadApiJson(graph, 'nodes'); }", graph)
        page.wait_for_function(f"count => {GRAPH}.nodes.length === count", arg=len(NODES))
        page.evaluate(OPEN_AGAIN)
        places = {name: place for name, (_, _, place) in NODES.items()}
        page.evaluate(PLACE, places)
        page.evaluate("async () => { await app.queuePrompt(0); }")
        page.wait_for_selector(".patchconv-row")
        page.wait_for_selector(".patchconv-text")
        page.wait_for_timeout(5000)  # for the pictures
        page.evaluate("async () => { await app.extensionManager.command.execute('Workspace.ToggleFocusMode'); }")
        page.evaluate(PLACE, places)
        page.mouse.move(1559, 859)
        page.wait_for_timeout(3000)
        width, height = page.evaluate(EXTENT)
        clip = {
            "x": LEFT - EDGE, "y": TOP - TITLE - EDGE, "width": width + 2 * EDGE, "height": height + TITLE + 2 * EDGE,
        }  # fmt: skip
        page.screenshot(path=str(out), clip=clip)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "nodes.png", help="default: docs/")
    parser.add_argument("--size", type=int, default=640, help="pixels of the picture's sides (%(default)s)")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        contextmanager(serve)(Path(os.environ["COMFYUI_PATH"]).resolve(), Path(name)) as server,
    ):
        for setting, value in (("Comfy.TutorialCompleted", True), ("Comfy.Graph.CanvasInfo", False)):
            server.get(f"/settings/{setting}", value)
        save(server.folder / "vae" / VAE, dtype=torch.float16)
        latent = part(load_file(PHOTOGRAPH)["latent_tensor"], args.size // 8).contiguous()
        save_file(
            {"latent_tensor": latent, "latent_format_version_0": torch.tensor([])},
            server.folder / "input" / "raccoon.latent",
        )
        take(server, args.out)


if __name__ == "__main__":
    main()
