"""Convolutions in strips: the same pixels in less memory. See README.md."""

from .convert import convert_model, convolutions, patched, restore_model
from .tiled_conv import PatchConv2d, TiledForward, Tiling

__version__ = "0.1.0"
__all__ = ["PatchConv2d", "TiledForward", "Tiling", "convert_model", "convolutions", "patched", "restore_model"]
