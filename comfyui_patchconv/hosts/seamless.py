"""Extensions that put a forward of their own on a host's convolutions, without the host's knowledge: seamless tiling.

A host puts patches on a model when it loads it, and takes back what was there before when it unloads it. An extension
that comes after the patches were made, or while they are on, would be covered by them, or lost with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..conv.forward import TiledForward, tiled_forward
from ..conv.tiling import Convolution

_ATTRIBUTE = "_conv_forward"


def inject(patcher: Any) -> None:
    """Let patches in strips run in strips what an extension has put on their convolutions since they were made; called
    when the patches are on.

    patcher: ComfyUI's `ModelPatcher`, or what is like it.
    """
    for key, module in _patched(patcher):
        found, patch = module.__dict__.get(_ATTRIBUTE), patcher.object_patches[key]
        below = patcher.object_patches_backup.get(key) if isinstance(found, TiledForward) else found
        if below is None or isinstance(below, TiledForward):
            continue
        late = tiled_forward(module, below, patch.tiling, type(patch))
        if late.inner is not None and late.inner != patch.inner:
            module.__dict__[_ATTRIBUTE] = late


def eject(patcher: Any) -> None:
    """Have the host take back what an extension has put in the place of patches in strips while they were on; called
    before the host takes off the patches."""
    for key, module in _patched(patcher):
        found = module.__dict__.get(_ATTRIBUTE)
        if found is not None and not isinstance(found, TiledForward) and key in patcher.object_patches_backup:
            patcher.object_patches_backup[key] = found


def _patched(patcher: Any) -> Iterator[tuple[str, Convolution]]:
    """The convolutions that are patched to run in strips, by the key of the patch."""
    for key, patch in patcher.object_patches.items():
        if isinstance(patch, TiledForward):
            yield key, patcher.model.get_submodule(key.rpartition(".")[0])
