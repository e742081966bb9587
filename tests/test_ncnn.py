"""RealESRGAN's weights from ncnn's files, which benchmarks use: as written, and as a picture needs them."""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from upscale_helpers import require_spandrel
from upscale_weights import NO_REAL_WEIGHTS

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import landscapes
import ncnn


def written(folder: Path, lines: list[str], content: bytes) -> tuple[Path, Path]:
    (folder / "a.param").write_text("\n".join(["7767517", f"{len(lines)} 9", *lines]) + "\n")
    (folder / "a.bin").write_bytes(content)
    return folder / "a.param", folder / "a.bin"


INPUT = "Input data 0 1 data"
HALF, SINGLE = struct.pack("<I", 0x01306B47), struct.pack("<I", 0)


def test_layers_in_both_precisions(tmp_path: Path) -> None:
    weights = [np.arange(3, dtype=np.float16), np.arange(18, dtype=np.float32)]
    bias, slopes = np.array([5, 6, 7], np.float32), np.array([0.5, 0.25], np.float32)
    padding = b"\0\0"  # to whole words
    content = HALF + weights[0].tobytes() + padding + bias.tobytes() + SINGLE + weights[1].tobytes() + slopes.tobytes()
    lines = [
        INPUT,
        "Convolution a 1 1 data x 0=3 1=1 5=1 6=3",
        "Convolution b 1 1 x y 0=2 1=3 5=0 6=18 9=2 -23310=1,2.0e-01",
    ]
    first, second, third = ncnn.read(*written(tmp_path, [*lines, "PReLU c 1 1 y z 0=2"], content))
    assert first.weight.flatten().tolist() == [0, 1, 2]
    assert first.bias is not None
    assert first.bias.tolist() == [5, 6, 7]
    assert second.weight.shape == (2, 1, 3, 3)
    assert second.weight.flatten().tolist() == list(range(18))
    assert second.bias is None
    assert (third.kind, third.weight.tolist()) == ("PReLU", [0.5, 0.25])


@pytest.mark.parametrize(
    ("lines", "content", "words"),
    [
        (["PReLU a 1 1 data x 0=4"], b"\0" * 8, "ends too early"),
        (["PReLU a 1 1 data x 0=1"], b"\0" * 8, "has 4 bytes more than a.param says"),
        (["Softmax a 1 1 data x"], b"", "kind Softmax, which is not known"),
        (["Convolution a 1 1 data x 0=1 1=1 6=1"], struct.pack("<I", 0x000D4B38), "marked as 0xd4b38"),
    ],
)
def test_what_is_not_known(tmp_path: Path, lines: list[str], content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(ncnn.read(*written(tmp_path, lines, content)))


def test_other_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.param").write_text("hello\nworld\n")
    with pytest.raises(ValueError, match="begins with 'hello'"):
        list(ncnn.read(tmp_path / "a.param", tmp_path / "a.param"))
    with pytest.raises(ValueError, match="these are 7"):
        ncnn.rrdb([ncnn.Layer("Convolution", "a", torch.zeros(1), None)] * 7)


def ratio(made: Tensor, wanted: Tensor) -> float:
    """PSNR, in dB."""
    return -10 * math.log10(float((made - wanted).square().mean()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ncnn.NAMES)
@torch.inference_mode()
def test_real_weights_draw_a_picture_larger(name: str) -> None:
    if ncnn.folder() is None:
        pytest.skip(NO_REAL_WEIGHTS)
    require_spandrel()
    import spandrel  # pyright: ignore[reportMissingImports]

    model = spandrel.ModelLoader().load_from_state_dict(ncnn.real_weights(name)).eval()
    assert (model.scale, model.input_channels) == (4, 3)
    wanted = F.avg_pool2d(landscapes.draw(landscapes.Scene(), 768), 3).clamp(0, 1)
    small = F.avg_pool2d(wanted, 4)
    made = model(small)
    smooth = F.interpolate(small, scale_factor=4, mode="bicubic")
    print(f"{name}: {ratio(made, wanted):.1f} dB, bicubic {ratio(smooth, wanted):.1f} dB")
    assert made.shape == wanted.shape
    assert ratio(made, wanted) > 30
