"""Training images from a folder, in an order that a step's number alone decides."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ...files.images import IMAGES, open_image

_SUFFIXES = {*IMAGES, ".gif"}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

Item = tuple[int, bool]
"""An image's number, and whether it is mirrored."""


def derived_seed(*parts: int) -> int:
    """A seed that differs with each of `parts`, the same everywhere."""
    return random.Random(" ".join(map(str, parts))).getrandbits(62)


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images of a folder and of every folder in it: `[channels, H, W]` in 0..1, and the number of its class.

    folder: what is in it. An image is scaled until it covers the size, and its middle is taken. Transparent ones lie on
        white, unless there are four channels.
    size: height and width, pixels. channels: 1, 3 or 4.
    labelled: a class is a folder directly inside `folder`; `classes` holds their names, sorted. Otherwise all are 0.
    written: the folder that a training writes its own pictures to, if there is one.

    Raises ValueError for a folder without images, for an image outside the classes' folders, where `written` lies in
    `folder`, and, when it is its turn, for a file that is no image.
    """

    def __init__(
        self, folder: str | Path, size: tuple[int, int], channels: int = 3, labelled: bool = False,
        written: Optional[Path] = None,
    ) -> None:  # fmt: skip
        self.size, self.mode = size, _MODES[channels]
        folder = Path(folder)
        if written is not None and written.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"what the training makes would lie in {written}, among the images of {folder}, and be trained on: "
                "choose a folder outside."
            )
        self.paths = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and not path.is_dir()
        )
        if not self.paths:
            raise ValueError(f"{folder} holds no image: give a folder with {', '.join(sorted(_SUFFIXES))} files.")
        parts = [path.relative_to(folder).parts for path in self.paths]
        if labelled and min(map(len, parts)) < 2:
            raise ValueError(f"{folder} has images that lie in no folder of a class: move them into one.")
        self.classes = sorted({part[0] for part in parts}) if labelled else []
        self.labels = [self.classes.index(part[0]) if labelled else 0 for part in parts]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: Item) -> tuple[Tensor, int]:
        number, mirrored = item
        image = self._read(self.paths[number])
        return (image.flip(-1) if mirrored else image), self.labels[number]

    def _read(self, path: Path) -> Tensor:
        import numpy as np
        from PIL import Image, ImageOps

        image = open_image(path).convert("RGBA")
        height, width = self.size
        if self.mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(self.mode)
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        pixels = np.atleast_3d(np.asarray(image, dtype=np.float32) / 255)
        return torch.from_numpy(pixels).movedim(-1, 0)


class Batches(Sampler[list[Item]]):
    """Endless batches of `ImageFolder` items from step `first` on: every image once an epoch, mirrored by chance.

    count: images. batch: of each of `parts` processes; this one is number `part`. Step k has the same items whether or
    not the steps before it were asked for, so that training goes on where it stopped.
    """

    def __init__(
        self, count: int, batch: int, seed: int, first: int = 0, part: int = 0, parts: int = 1, mirror: bool = True
    ) -> None:
        self.count, self.batch, self.seed, self.first = count, batch, seed, first
        self.part, self.parts, self.mirror = part, parts, mirror

    def __iter__(self) -> Iterator[list[Item]]:
        epoch, order, mirrored = -1, [], []
        step = self.first
        while True:
            items: list[Item] = []
            for position in range(self.batch):
                whole, index = divmod((step * self.parts + self.part) * self.batch + position, self.count)
                if whole != epoch:
                    epoch, (order, mirrored) = whole, self._epoch(whole)
                items.append((order[index], mirrored[index]))
            yield items
            step += 1

    def _epoch(self, number: int) -> tuple[list[int], list[bool]]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, number))
        order = torch.randperm(self.count, generator=generator).tolist()
        mirrored = torch.rand(self.count, generator=generator) < 0.5 * self.mirror
        return order, mirrored.tolist()
