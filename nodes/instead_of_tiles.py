"""Streams a decode or encode that would go on in tiles, or end, where memory ran out; if a setting asks for that."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Optional

import comfy.sd  # pyright: ignore[reportMissingImports]
import folder_paths  # pyright: ignore[reportMissingImports]

from ..comfyui_patchconv.conv.patch import PADDINGS
from ..comfyui_patchconv.hosts.halves import HALVES
from ..comfyui_patchconv.hosts.memory_estimates import StreamEstimate
from ..comfyui_patchconv.memory.errors import is_out_of_memory
from .vae_half import convolutions_of, leave, stream_half

SETTING = "PatchConv.InsteadOfTiles"
"""The setting's id in the front end, which keeps it in a file of the user's."""

_METHODS = dict(zip(("decode", "encode"), HALVES))
_TILED = ("{}_tiled_", "{}_tiled_1d", "{}_tiled_3d", "_{}_tiled_owned")
"""What the host's methods call where memory ran out; not every version has each."""

_log = logging.getLogger(__name__)
_under_way: ContextVar[Optional[Any]] = ContextVar("under_way", default=None)
"""The VAE that decodes or encodes all at once here."""


class _MemoryRanOutError(Exception):
    """The host turns to tiles."""


def install() -> None:
    """Put ourselves around what the host calls, once; while the setting is off it does what it did before.

    The host offers no hook between a decode and its tiles.
    """
    kind = comfy.sd.VAE
    for method, half in _METHODS.items():
        if not hasattr(getattr(kind, method), "patchconv"):
            setattr(kind, method, _around(method, half, getattr(kind, method)))
            for name in (name.format(method) for name in _TILED):
                if hasattr(kind, name):
                    setattr(kind, name, _tiles(method, half, getattr(kind, name)))


def wanted() -> bool:
    """Whether the setting is on. Where there are several users, that of the first, `default`, counts for all."""
    path = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json")
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(SETTING) is True
    except (OSError, ValueError, AttributeError):  # there is none yet, or it is damaged
        return False


def _around(method: str, half: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """`VAE.decode` or `VAE.encode`, begun anew and streamed where it would go on in tiles."""

    @functools.wraps(original)
    def around(vae: Any, *args: Any, **kwargs: Any) -> Any:
        token = _under_way.set(vae)
        try:
            return original(vae, *args, **kwargs)
        except Exception as error:
            # Of memory that ran out on a CPU, where many hosts turn to no tiles.
            ours = isinstance(error, _MemoryRanOutError)
            if not ours and not (is_out_of_memory(error) and _may_stream(vae, method, half)):
                raise
        finally:
            _under_way.reset(token)
        # Here, where nothing holds what the call had any more. Should this run out of memory too, tiles it is.
        _log.info("Patch Conv: %s is streamed instead of tiled.", method)
        return original(_streamed(vae, method, half), *args, **kwargs)

    around.__dict__["patchconv"] = True
    return around


def _tiles(method: str, half: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """One of the host's methods that work in tiles. Raises _MemoryRanOutError where nobody asked for them."""

    @functools.wraps(original)
    def tiles(vae: Any, *args: Any, **kwargs: Any) -> Any:
        if _under_way.get() is vae and _may_stream(vae, method, half):
            raise _MemoryRanOutError
        return original(vae, *args, **kwargs)

    return tiles


def _may_stream(vae: Any, method: str, half: str) -> bool:
    """Whether the setting is on, and this half of a VAE has convolutions and is not streamed by a node already."""
    by_node = isinstance(getattr(vae, f"memory_used_{method}"), StreamEstimate)
    return wanted() and not by_node and convolutions_of(vae, half) > 0


def _streamed(vae: Any, method: str, half: str) -> Any:
    """A copy of `vae` of which one half is streamed, within what is free."""
    copied = copy.copy(vae)
    copied.patcher = vae.patcher.clone()
    kinds = {type(patch) for patch in copied.patcher.object_patches.values()}
    padding = "partial" if PADDINGS["partial"] in kinds else "plain"
    leave(copied, half, method)
    stream_half(copied, half, method, 0, padding, "")
    return copied
