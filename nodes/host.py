"""Levels what differs between ComfyUI versions."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from importlib import import_module
from inspect import signature
from typing import Any, Optional

from comfy import model_management  # pyright: ignore[reportMissingImports]
from comfy.patcher_extension import CallbacksMP, PatcherInjection  # pyright: ignore[reportMissingImports]
from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

from ..comfyui_patchconv.hosts.clones import follow
from ..comfyui_patchconv.hosts.devices.spread import ONE, OnOutcome, Spread
from ..comfyui_patchconv.hosts.seamless import eject, inject

host_nodes: Any = import_module("nodes")  # ComfyUI's module of this name; ours is a part of a package

VAE_CATEGORY: str = host_nodes.VAEDecode.CATEGORY
"""Where the host lists VAE Decode and its tiled form."""

MODEL_CATEGORY = "model/patch/unet" if VAE_CATEGORY.startswith("model/") else "model_patches/unet"
"""Where the host lists HyperTile, FreeU and the like."""


LATENT_CATEGORY: str = host_nodes.VAEEncodeForInpaint.CATEGORY
"""Where the host lists VAE Encode (for Inpainting)."""

LOADER_CATEGORY: str = host_nodes.UNETLoader.CATEGORY
"""Where the host lists Load Diffusion Model."""

SAMPLER_CATEGORY: str = host_nodes.KSampler.CATEGORY

FILL_CATEGORY: str = host_nodes.ImagePadForOutpaint.CATEGORY
"""Where the host lists Pad Image for Outpainting."""


UPSCALE_CATEGORY: str = host_nodes.ImageScale.CATEGORY
"""Where the host lists Upscale Image, and Upscale Image (using Model)."""


def schema(**options: Any) -> Any:
    """Make an `io.Schema`, less the options that this ComfyUI does not know yet (`search_aliases`)."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(**{name: value for name, value in options.items() if name in known})


def advanced(kind: Any, name: str, **options: Any) -> Any:
    """Make an input of `kind` that the front end folds away under "advanced", where this ComfyUI can."""
    if "advanced" in signature(kind.Input).parameters:
        options["advanced"] = True
    return kind.Input(name, **options)


HIDDEN = (io.Hidden.unique_id, io.Hidden.dynprompt)
"""What `node_id` reads, for a schema."""


def node_id(node: type[io.ComfyNode]) -> str:
    """Find the node's id in the workflow: of one that a loop has made once more, that of the one which the user sees.
    Empty where it is called by hand."""
    hidden = getattr(node, "hidden", None)
    own, prompt = getattr(hidden, "unique_id", None), getattr(hidden, "dynprompt", None)
    if own is None:
        return ""
    return str(own if prompt is None else prompt.get_display_node_id(own))


def follow_changes(patcher: Any) -> None:
    """Have the host bind the patches of `patcher` anew in its clones that have a model of their own, and keep what
    other extensions put on the model by themselves."""
    patcher.remove_callbacks_with_key(CallbacksMP.ON_CLONE, "patchconv")
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, "patchconv", follow)
    patcher.set_injections("patchconv", [PatcherInjection(inject, eject)])


RELIABLE = "comfy_decode_estimate_is_reliable"
"""A model's attribute: whether the host goes to tiles at once where an estimate is more than what is free."""


def try_without_tiles(vae: Any) -> None:
    """Have the host begin a decode by `vae`, a copy that may be streamed, whatever its estimate says: what does not fit
    is offloaded, and no tiles are needed."""
    if hasattr(vae.first_stage_model, RELIABLE):  # whatever it says: another copy's patch may be on the model now
        vae.patcher.add_object_patch(RELIABLE, False)


def several_devices(wanted: str, on_outcome: OnOutcome) -> Optional[Spread]:
    """Make what has calls run on the devices that a user wants, with the host's interrupt; None for one."""
    calls = ("comfy.options:enable_args_parsing",)  # a worker has the command line of the host, and its devices
    interrupt = model_management.throw_exception_if_processing_interrupted
    return None if wanted == ONE else Spread(wanted, calls, interrupt, on_outcome)


def outside_recording() -> AbstractContextManager[Any]:
    """Make a context whose allocations the host does not record (`pause_malloc_graph`, ComfyUI 0.38): it ends the
    process where one that began in a block of a model is there when the block ends, as a stored map is."""
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", None)
    return nullcontext() if pause is None else pause()
