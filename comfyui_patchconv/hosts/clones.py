"""A host's clone of a patched model for another device: what stands in for methods of the one is bound to the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any, Optional

from torch import nn

from ..conv.forward import TiledForward, tiled_forward


class Wrapper:
    """Stands in for a method of a model. forward: the method, or what stood in for it before. model: the one whose
    method it is, for where that does not tell; None where nobody asks."""

    forward: Callable[..., Any]
    model: Optional[nn.Module] = None


def follow(old: Any, new: Any) -> None:
    """Bind the object patches of `new` to its own model, where that is not the model of `old`; a host's `ON_CLONE`.

    Hosts load a model anew for another device, and copy to it the patches of a model that it was cloned from. A
    method that was set on the old model is not copied: ours stands in for what the new model has in its place.

    old, new: ComfyUI's `ModelPatcher`, or what is like it.
    """
    if new.model is old.model:
        return
    moved = dict(_pairs(old.model, new.model))
    for key, patch in list(new.object_patches.items()):
        before = old.object_patches_backup.get(key, _attribute(old.model, key))
        new.object_patches[key] = _bound(patch, moved, before, _attribute(new.model, key))


def owner_of(wrapper: Wrapper) -> Optional[nn.Module]:
    """The model whose method stands below all stand-ins; None where that is a function that does not tell."""
    method = _below(wrapper)
    while not hasattr(method, "__self__"):
        further = getattr(method, "__wrapped__", getattr(method, "func", None))  # as `torch.compile` and `partial` say
        if further is None:
            return None
        method = further
    return method.__self__ if isinstance(method.__self__, nn.Module) else None


def _below(wrapper: Wrapper) -> Any:
    """What stands below all stand-ins."""
    found: Any = wrapper
    while isinstance(found, Wrapper):
        found = found.forward
    return found


def _pairs(old: nn.Module, new: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Modules of the two that have the same name."""
    there = dict(new.named_modules())
    return [(module, there[name]) for name, module in old.named_modules() if name in there]


def _attribute(model: nn.Module, key: str) -> Any:
    """What a model has at a dotted name; None where it has nothing."""
    found: Any = model
    for name in key.split("."):
        found = getattr(found, name, None)
    return found


def _bound(patch: Any, moved: Mapping[nn.Module, nn.Module], before: Any, after: Any) -> Any:
    """What `patch` is on the new model; itself where it has nothing of the old one.

    before, after: what the old and the new model have without patches.
    """
    if _is_same(patch, before):
        return after
    if isinstance(patch, TiledForward):
        module: Any = moved.get(patch.module, patch.module)
        if patch.inner is None:
            return type(patch)(module, patch.tiling)
        return tiled_forward(module, _bound(patch.inner, moved, before, after), patch.tiling, type(patch))
    if isinstance(patch, Wrapper):
        bound = copy.copy(patch)
        bound.forward = _bound(patch.forward, moved, before, after)
        if patch.model is not None and _below(bound) is not _below(patch):  # else it runs the old model all the same
            bound.model = moved.get(patch.model, patch.model)
        return bound
    if isinstance(patch, MethodType) and isinstance(patch.__self__, nn.Module):
        return MethodType(patch.__func__, moved.get(patch.__self__, patch.__self__))
    if isinstance(patch, partial):
        args = [moved.get(value, value) if isinstance(value, nn.Module) else value for value in patch.args]
        return partial(_bound(patch.func, moved, before, after), *args, **patch.keywords)
    return patch


def _is_same(one: Any, other: Any) -> bool:
    """Whether both are the same object, or the same method of the same object."""
    return one is other or (isinstance(one, MethodType) and one == other)
