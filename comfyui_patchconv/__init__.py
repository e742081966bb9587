"""Convolutions in strips: the same pixels in less memory. See README.md."""

from contextlib import suppress

from .conv.forward import TiledForward
from .conv.module import PatchConv2d
from .conv.partial import PartialConv2d, PartialConv3d, PConv2d
from .conv.patch import convert_model, convolutions, patched, restore_model
from .conv.tiling import Tiling

__all__ = [
    "PConv2d",
    "PartialConv2d",
    "PartialConv3d",
    "PatchConv2d",
    "TiledForward",
    "Tiling",
    "convert_model",
    "convolutions",
    "patched",
    "restore_model",
]


def __getattr__(name: str) -> str:
    """`__version__`, where this is installed: a folder of a host's has it in its pyproject.toml alone."""
    if name == "__version__":
        from importlib import metadata

        with suppress(metadata.PackageNotFoundError):
            return metadata.version("patchconv")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
