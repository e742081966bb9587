"""As the modules of the WebUI that upscale: one that cuts tiles, and one that has its function by import."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HOME = "modules.upscaler_utils"


class Upscalers:
    """utils, esrgan: the modules. state: as the WebUI's; a picture that is interrupted is given back as it is."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(interrupted=False, skipped=False)
        self.utils, self.esrgan = ModuleType(HOME), ModuleType("modules.esrgan_model")
        self.asked: list[int] = []
        """The size of tiles, of each call that arrives at the host's function."""
        upscalers = self

        def upscale_with_model(
            model: Any, img: Image.Image, *, tile_size: int, tile_overlap: int = 0, desc: str = "tiled upscale"
        ) -> Image.Image:
            upscalers.asked.append(tile_size)
            if tile_size <= 0:
                return _picture(model(_tensor(model, img)))
            rows = []
            for top in range(0, img.height, tile_size):
                row = []
                for left in range(0, img.width, tile_size):
                    if upscalers.state.interrupted:
                        return img
                    box = (left, top, min(left + tile_size, img.width), min(top + tile_size, img.height))
                    row.append(np.asarray(_picture(model(_tensor(model, img.crop(box))))))
                rows.append(np.concatenate(row, 1))
            return Image.fromarray(np.concatenate(rows))

        def tiled_upscale_2(
            img: Tensor, model: Any, *, tile_size: int, tile_overlap: int, scale: int, device: torch.device,
            desc: str = "Tiled upscale",
        ) -> Tensor:  # fmt: skip
            upscalers.asked.append(tile_size)
            if tile_size <= 0:
                return model(img)
            rows = [torch.cat([model(tile) for tile in row.split(tile_size, 3)], 3) for row in img.split(tile_size, 2)]
            return torch.cat(rows, 2)

        def upscale_2(img: Image.Image, model: Any, **options: Any) -> Image.Image:
            return _picture(upscalers.utils.tiled_upscale_2(_tensor(model, img), model, **options, device="cpu"))

        for function in (upscale_with_model, tiled_upscale_2, upscale_2):
            function.__module__ = HOME
            setattr(self.utils, function.__name__, function)
        self.esrgan.__dict__["upscale_with_model"] = upscale_with_model
        self.modules: list[ModuleType] = [self.utils, self.esrgan]

    def upscale(self, model: Any, img: Image.Image, tile: int = 16) -> np.ndarray:
        """As an upscaler of the ESRGAN family does."""
        function = self.esrgan.__dict__["upscale_with_model"]
        return np.asarray(function(model, img, tile_size=tile, tile_overlap=8)).astype(int)

    def upscale_tensors(self, model: Any, img: Image.Image, tile: int = 16) -> np.ndarray:
        """As SwinIR does."""
        function = self.utils.__dict__["upscale_2"]
        options = {"tile_size": tile, "tile_overlap": 8, "scale": model.scale, "desc": "SwinIR"}
        return np.asarray(function(img, model, **options)).astype(int)

    def functions(self) -> dict[str, Any]:
        """All that is set in the modules."""
        return {f"{one.__name__}.{name}": value for one in self.modules for name, value in vars(one).items()}


def picture(width: int = 40, height: int = 56) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))


def _tensor(model: Any, img: Image.Image) -> Tensor:
    weights = next((model.model if hasattr(model, "model") else model).parameters())
    return (torch.from_numpy(np.array(img)).movedim(-1, 0)[None] / 255).to(weights)


def _picture(made: Tensor) -> Image.Image:
    return Image.fromarray((255 * made[0].float().clamp(0, 1)).round().byte().movedim(0, -1).numpy())
