"""Convolutions in strips: the same pixels in less memory. See README.md."""

from .convert import convert_model, convolutions, patched, restore_model
from .partial_conv import PartialConv2d, PartialConv3d, PConv2d
from .tiled_conv import PatchConv2d, TiledForward, Tiling

__version__ = "0.1.0"
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
