"""What tests of upscale models need and may not be there."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

_declared: list[object] = []  # a library's operators live as long as it does


def require_spandrel() -> None:
    """Skip the tests that ask for it, unless `spandrel` and `pyvips` are there; beside a PyTorch without CUDA
    torchvision's wheel loads once the operators that it describes are declared."""
    pytest.importorskip("pyvips", reason="pyvips is not installed: pip install 'patchconv[upscale]'")
    if find_spec("torchvision") is not None and not torch.cuda.is_available() and not _declared:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    pytest.importorskip("spandrel", reason="spandrel is not installed: pip install 'patchconv[upscale]'")
