"""Refuses what a link brings and a node cannot take, before any work is done."""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import signature
from typing import Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import Tensor

from ..comfyui_patchconv.hosts.numbers import check_range


def checked(execute: Callable[..., Any]) -> Callable[..., Any]:
    """A node's `execute` that raises ValueError, in a sentence, for a number that its widget would not take, and where
    nothing came of what has to be connected, or no pictures.

    The host bounds what is typed into a node, but not what a link brings.
    """
    parameters = signature(execute)

    @functools.wraps(execute)
    def checking(node: type[io.ComfyNode], *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(node, *args, **kwargs)
        for one in node.define_schema().inputs:
            if one.id in given.arguments:
                given.arguments[one.id] = _checked(one, given.arguments[one.id])
        return execute(*given.args, **given.kwargs)

    return checking


def _checked(one: Any, value: Any) -> Any:
    """The value for the input `one` of a schema. Raises as `checked` says."""
    if isinstance(one, (io.Int.Input, io.Float.Input)):
        whole = isinstance(one, io.Int.Input)
        check_range(one.id, value, one.min, one.max, whole)
        return int(value) if whole else value
    if value is None and not one.optional and not isinstance(one, io.AnyType.Input):
        raise ValueError(f"{one.id} is missing: what is connected there has given nothing.")
    if isinstance(one, (io.Image.Input, io.Mask.Input)) and isinstance(value, Tensor):
        _check_pictures(one, value)
    if isinstance(one, io.Combo.Input) and type(value) is int:  # of devices, from a node for numbers
        return str(value)
    return value


def _check_pictures(one: Any, value: Tensor) -> None:
    """Raise ValueError where the input `one`, images or masks, is empty, or images are no images."""
    size = " x ".join(map(str, value.shape))
    if not value.numel():
        raise ValueError(f"{one.id} is empty ({size}): connect what has at least one picture.")
    if isinstance(one, io.Image.Input) and value.dim() != 4:
        raise ValueError(f"{one.id} is {size}: pictures are number x height x width x channels.")
