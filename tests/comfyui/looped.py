"""A node for tests: decodes by a Patch Conv (VAE) that it makes itself, as a loop does that repeats its body."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Looped:
    CATEGORY, FUNCTION, RETURN_TYPES = "testing", "run", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        return {"required": {"vae": ("VAE",), "samples": ("LATENT",), "of": ("STRING",)}}

    def run(self, vae: Any, samples: Any, of: str) -> dict[str, Any]:
        """of: the id of the node in the body."""
        graph = import_module("comfy_execution.graph_utils").GraphBuilder()
        patch = graph.node("PatchConv_VAE", vae=vae, splits=5, threshold=0.0, half="both", mode="patch")
        patch.set_override_display_id(of)
        decode = graph.node("VAEDecode", samples=samples, vae=patch.out(0))
        return {"result": (decode.out(0),), "expand": graph.finalize()}


NODE_CLASS_MAPPINGS = {"Test_Looped": Looped}
