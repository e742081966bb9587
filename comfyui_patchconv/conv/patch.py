"""Find, patch and restore the convolutions of any `torch.nn.Module`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Optional, TypeVar

from torch import nn

from .blocks import block, put, state
from .forward import TiledForward, tiled_forward
from .partial import PartialPadding
from .strip_sizes import DEFAULT_THRESHOLD, MAX_ELEMENTS
from .tiling import Convolution, OnStrip, Tiling

Model = TypeVar("Model", bound=nn.Module)
CONVOLUTIONS: tuple[type[Convolution], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PADDINGS: dict[str, type[TiledForward]] = {"plain": TiledForward, "partial": PartialPadding}
"""What zeros around an image may count as: pixels of value 0, as PyTorch has them, or nothing."""

_ATTRIBUTE = "_conv_forward"
_MISSING = Convolution._conv_forward
"""What stands in its place where it is never called, as in transposed convolutions."""


def convert_model(
    model: Model,
    splits: int = 4,
    sequential: bool = True,
    threshold: int = DEFAULT_THRESHOLD,
    *,
    names: str | Sequence[str] | None = None,
    types: tuple[type[Convolution], ...] = CONVOLUTIONS,
    predicate: Optional[Callable[[str, Convolution], bool]] = None,
    on_strip: Optional[OnStrip] = None,
    padding: str = "plain",
    strip_bytes: Optional[int] = None,
    max_elements: int = MAX_ELEMENTS,
) -> Model:
    """Let the convolutions of `model` run in strips, in place, and return it. `restore_model` undoes it.

    Converting again changes the settings of the convolutions that are chosen, and only those.

    splits: strips per convolution; 0 chooses by size and device. See `Tiling`.
    sequential: one strip after the other, or False for all strips in one batched call (faster for small ones, no
        less memory than eager).
    threshold: input elements (C·H·W, times depth for 3-D) from which a convolution runs in strips.
    names, types, predicate: which convolutions; see `convolutions`.
    on_strip: progress; see `Tiling`.
    strip_bytes, max_elements: what a device wants otherwise than is usual; see `Tiling`.
    padding: `"plain"`, or `"partial"` for borders that are scaled up for the zeros around the image, which then do not
        count (partial convolution based padding, arXiv 1811.11718): the one setting that changes the result.

    Raises ValueError for a wrong setting, or if no convolution is found.
    """
    tiling = Tiling(splits, sequential, threshold, on_strip, strip_bytes, max_elements)
    if padding not in PADDINGS:
        raise ValueError(f"padding is {padding!r}: use {' or '.join(map(repr, PADDINGS))}.")
    found = list(convolutions(model, names=names, types=types, predicate=predicate))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no convolution of kernel larger than 1 that the filter lets through: "
            "there is nothing to run in strips."
        )
    for _, module in found:
        module.__dict__[_ATTRIBUTE] = tiled_forward(module, getattr(module, _ATTRIBUTE), tiling, PADDINGS[padding])
    return model


def restore_model(model: Model) -> Model:
    """Undo `convert_model` in place: every method is again what it was, another extension's included."""
    for module in model.modules():
        found = state(module, _ATTRIBUTE)
        if isinstance(found, TiledForward):
            put(module, _ATTRIBUTE, found.inner)
    return model


@contextmanager
def patched(model: Model, *args: Any, **kwargs: Any) -> Iterator[Model]:
    """`convert_model(model, *args, **kwargs)` for the length of a `with` block; then all is as it was before it.

    Blocks may overlap, in threads or generators, and end in any order: the last that began decides.
    """
    with block(model, _ATTRIBUTE, lambda: convert_model(model, *args, **kwargs)):
        yield model


@contextmanager
def unpatched(model: Model) -> Iterator[Model]:
    """`restore_model(model)` for the length of a `with` block; then all is as it was before it. See `patched`."""
    with block(model, _ATTRIBUTE, lambda: restore_model(model), all_of_them=True):
        yield model


def convolutions(
    model: nn.Module,
    *,
    names: str | Sequence[str] | None = None,
    types: tuple[type[Convolution], ...] = CONVOLUTIONS,
    predicate: Optional[Callable[[str, Convolution], bool]] = None,
) -> Iterator[tuple[str, Convolution]]:
    """Name and module of each convolution in `model`, `model` itself included, whose kernel is larger than 1.

    names: shell patterns, of which the dotted name must match one (`"decoder.*"`); one alone may be a string.
    types: classes to take, subclasses included; of these transposed convolutions are none.
    predicate: `predicate(name, module)` decides the rest; with one, kernels of size 1 are asked about too.
    """
    names = [names] if isinstance(names, str) else names
    for name, module in model.named_modules():
        if not isinstance(module, types) or getattr(type(module), _ATTRIBUTE, _MISSING) is _MISSING:
            continue
        if names is not None and not any(fnmatchcase(name, pattern) for pattern in names):
            continue
        if predicate(name, module) if predicate is not None else max(module.kernel_size) > 1:
            yield name, module
