"""Starts a ComfyUI checkout, on a machine without CUDA too: `launch.py CHECKOUT [ComfyUI's own flags]`.

ComfyUI imports torchvision and torchaudio, whose ordinary wheels do not load beside a CPU-only PyTorch. Where they do
not, the operators that torchvision looks for are declared, and torchaudio is a name with nothing behind it.
"""

from __future__ import annotations

import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_declared: list[Any] = []  # a library's operators live as long as it does


class _Missing(ModuleType):
    """A module any part of which can be imported and none of which can be called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []
        sys.modules[name] = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self.__name__} is not installed")


def prepare() -> None:
    """Make what ComfyUI imports importable."""
    if not torch.cuda.is_available():
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    try:
        import torchaudio  # pyright: ignore[reportMissingImports]  # noqa: F401
    except (ImportError, OSError):
        module = _Missing("torchaudio")
        module.__dict__["__version__"] = "0"
        _ = module.functional, module.transforms


if __name__ == "__main__":
    checkout = Path(sys.argv[1]).resolve()
    prepare()
    sys.argv = [str(checkout / "main.py"), *sys.argv[2:]]
    sys.path[0] = str(checkout)
    runpy.run_path(sys.argv[0], run_name="__main__")
