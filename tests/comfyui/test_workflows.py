"""The example workflows, loaded by the front end in a real browser and run as it queues them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_process import page_of
from PIL import Image
from safetensors.torch import save_file
from upscale_weights import compact

from .conftest import Graph, Server, read_latent

FOLDER = Path(__file__).parents[2] / "example_workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
OURS = '() => window.app?.graph && window.LiteGraph?.registered_node_types["PatchConv_VAE"]'
LOAD = """async workflow => {
    await app.loadGraphData(workflow);
    for (const node of app.graph.nodes) node.mode = 0;  // what is muted for later too
    return (await app.graphToPrompt()).output;
}"""


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Any]:
    """The front end."""
    with page_of(server.address, 1600, 1000) as page:
        page.wait_for_function(f"() => !!({OURS})()")
        yield page


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow(server: Server, checkpoint: str, page: Any, path: Path) -> None:
    picture = np.full((128, 128, 4), 255, dtype=np.uint8)
    picture[:64, :, :3] = 90
    picture[40:80, 40:80, 3] = 0  # LoadImage's mask
    Image.fromarray(picture).save(server.folder / "input" / "example.png")
    graph: Graph = page.evaluate(LOAD, json.loads(path.read_text()))
    for step in graph.values():
        inputs: dict[str, Any] = step["inputs"]
        if step["class_type"] == "CheckpointLoaderSimple":
            inputs["ckpt_name"] = checkpoint
        if step["class_type"] == "KSampler":
            inputs["steps"] = 2
        if step["class_type"] == "EmptyLatentImage":
            inputs |= {"width": 128, "height": 64}
        if step["class_type"] == "UpscaleModelLoader":
            save_file(compact(), server.folder / "upscale_models" / inputs["model_name"])
        if step["class_type"] == "LoadLatent":
            assert server.latent(Path(inputs["latent"]).stem, 64) == inputs["latent"]
    assert any(step["class_type"].startswith("PatchConv_") for step in graph.values())
    found = server.run(graph)
    assert found
    for file in found.values():
        kept = read_latent(file) if file.suffix == ".latent" else np.asarray(Image.open(file))
        assert kept.std() > 0


def test_every_workflow_has_a_thumbnail() -> None:
    assert WORKFLOWS
    for path in WORKFLOWS:
        assert Image.open(path.with_suffix(".jpg")).width >= 256
