"""Complex maps, whose conjugates torch keeps as a mark on a tensor that shares the memory of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .comparing import FEW_ROWS, MODES, Mode, assert_as_eager

C = nn.Conv2d(4, 4, 3, padding=1)
X = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
W = torch.randn(12, 12, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
LARGE = torch.randn(1, 4, 96, 96, generator=torch.Generator().manual_seed(0))


def z(x: Tensor) -> Tensor:
    return torch.complex(C(x), x) * (0.5 + 0.25j)


def written(value: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    write(value)
    return torch.view_as_real(value) * 1


def parts_set(y: Tensor) -> None:
    y.real = y.abs()
    y.imag = y.real * 2


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "product with its adjoint": lambda x: torch.view_as_real((y := z(x)) @ y.mH),
    "product with its H": lambda x: torch.view_as_real((y := z(x)[0, 0]) @ y.H),
    "adjoint": lambda x: z(x).adjoint().imag * 1,
    "matrix_H": lambda x: torch.view_as_real(torch.complex(C(x), x)[0, 1].H * 2),
    "conjugate of a product": lambda x: torch.view_as_real((z(x) * z(x).conj()) * 1),
    "number of a conjugate": lambda x: x * z(x).conj()[0, 0, 0, 0].item().imag,  # type: ignore[union-attr]
    "spectrum and its conjugate": lambda x: ((y := torch.fft.fft2(x * 2)) * y.conj()).real * 1,
    "conjugates in a row": lambda x: torch.view_as_real(torch.cat([z(x).conj(), z(x)])),
    "conjugates on each other": lambda x: torch.view_as_real(torch.stack([z(x).conj(), z(x)])),
    "conjugate of a spectrum turned": lambda x: torch.view_as_real(torch.fft.fft2(x).conj().flip(2) * 1),
    "conjugate of a spectrum, doubled": lambda x: torch.view_as_real(torch.fft.fft2(x).conj() * 2),
    "conjugate of a spectrum in another shape": lambda x: torch.view_as_real(
        torch.fft.fft2(x).conj().reshape(4, -1) * 1
    ),
    "conjugate twice": lambda x: torch.view_as_real(z(x).conj().conj() * 1),
    "conjugate resolved": lambda x: torch.view_as_real(z(x).conj().resolve_conj()) * 2,
    "imaginary part of a conjugate": lambda x: z(x).conj().imag * 1,
    "imaginary part of a conjugate, resolved": lambda x: z(x).conj().imag.resolve_neg() + 1,
    "real part of a conjugate": lambda x: z(x).conj().real * 1,
    "conjugate of an argument": lambda x: torch.view_as_real(torch.view_as_complex(x.view(1, 4, -1, 2)).conj() * 1),
    "sum of a conjugate": lambda x: z(x).conj().sum().imag + x,
    "conjugate as numbers": lambda x: torch.view_as_real(torch.tensor(z(x)[0, 0, 0].conj().tolist()).to(z(x))),
    "an ordinary conjugate": lambda x: torch.view_as_real(z(x) * W.conj() + W.mH),
    "matrices with an ordinary conjugate": lambda x: torch.view_as_real(z(x) @ W.mH),
    "sum of products with an ordinary conjugate": lambda x: torch.view_as_real(
        torch.einsum("bchw,hk->bckw", z(x), W.conj())
    ),
    "is a conjugate": lambda x: [*map(torch.is_conj, ((y := z(x)), y.conj(), y.mH, y.conj().conj(), y.conj()[0], y.T))],
    "is negative": lambda x: [
        *map(torch.is_neg, ((y := z(x)), y.imag, y.conj().imag, y.conj().real, y.conj().imag[0]))
    ],
    # written to
    "conjugate multiplied": lambda x: written(z(x), lambda y: y.conj().mul_(2j)),
    "conjugate filled": lambda x: written(z(x), lambda y: y.conj().fill_(1 + 2j)),
    "conjugate copied into": lambda x: written(z(x), lambda y: y.conj().copy_(y * 2)),
    "rows of a conjugate": lambda x: written(z(x), lambda y: y.conj()[:, :, 2:4].mul_(2j)),
    "adjoint added to": lambda x: written(z(x), lambda y: y.mH.add_(1j)),
    "adjoint of a spectrum": lambda x: written(torch.fft.fft2(x), lambda y: y.mH.mul_(2j)),
    "imaginary part of a conjugate, added to": lambda x: written(z(x), lambda y: y.conj().imag.add_(1)),
    "parts of a conjugate, set": lambda x: written(z(x), lambda y: parts_set(y.conj())),
    "imaginary parts beside each other": lambda x: written(
        z(x), lambda y: torch.broadcast_tensors(y.imag, y.real[..., :1])[0].mul_(2)
    ),
    "resolved conjugate": lambda x: written(z(x), lambda y: y.conj().resolve_conj().mul_(2)),
    "argument's conjugate": lambda x: written(
        torch.view_as_complex(x.view(1, 4, -1, 2)), lambda y: y.conj().add_(1j * y)
    ),
    "real map's conjugate": lambda x: C(x).conj().mul_(2) * 1,
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_conjugates_are_as_in_eager(name: str, mode: Mode) -> None:
    for x in (X, LARGE) if "ordinary" not in name else (X,):
        assert_as_eager(FUNCTIONS[name], x, tuning=FEW_ROWS, mode=mode)
