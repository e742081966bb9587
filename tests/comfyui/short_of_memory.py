"""A node for tests: a VAE that runs out of memory once, as a graphics card does, at its next decode or encode."""

from __future__ import annotations

import copy
from typing import Any

import torch


class ShortOfMemory:
    CATEGORY, FUNCTION, RETURN_TYPES = "testing", "run", ("VAE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        return {"required": {"vae": ("VAE",)}}

    @classmethod
    def IS_CHANGED(cls, vae: Any) -> float:  # noqa: N802 - the host's name
        """Each prompt has one that is still to run out."""
        return float("nan")

    def run(self, vae: Any) -> tuple[Any]:
        copied = copy.copy(vae)
        copied.patcher = vae.patcher.clone()
        for method in ("decode", "encode"):
            copied.patcher.add_object_patch(method, _once(getattr(vae.first_stage_model, method)))
        return (copied,)


def _once(method: Any) -> Any:
    left = [torch.cuda.OutOfMemoryError("CUDA out of memory.")]

    def run(*args: Any, **kwargs: Any) -> Any:
        if left:
            raise left.pop()
        return method(*args, **kwargs)

    return run


NODE_CLASS_MAPPINGS = {"Test_ShortOfMemory": ShortOfMemory}
