"""Attributes by which hosts' modules cast or move their weights at every call."""

from __future__ import annotations

from typing import Any

FORGE_CASTS = "parameters_manual_cast"
"""On Forge's modules: whether their weights are cast, or moved, for each call."""

HOST_ATTRIBUTES: dict[str, Any] = {
    "comfy_cast_weights": False,
    FORGE_CASTS: False,
    "ldm_patched_cast_weights": False,
    "weight_function": [],
    "bias_function": [],
}
"""What these are on a copy that is counted, in the modules that have them: its weights are where and what they should
be, with nothing to cast or to move. ComfyUI's, Forge's and reForge's."""
