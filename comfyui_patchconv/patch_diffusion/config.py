"""What a Patch Diffusion model is, and the published ones."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Config:
    """One U-Net and the noise that it was trained with. Raises ValueError for what does not fit together.

    image_size: pixels of a side; `patch` divides it. patch: pixels of a side that become one position.
    channels: the base width; `mults` times it are the widths of the levels, from `image_size / patch` down, and do not
        decrease. blocks: residual blocks of a level.
    classes: of a model that is told one, without the extra "no class"; 0 for a model that is not.
    attention: resolutions, in positions, at which blocks are followed by attention.
    head_channels: width of an attention head; 0 for `heads` heads instead.
    new_attention_order: q, k and v of all heads behind one another; otherwise each head has its three together.
    learn_sigma: the model gives a variance too.
    norm_eps: of the norms that have weights of their own. The published weights were trained with 1e-3; the PyTorch
        port of them runs with 1e-5.
    beta_max: end of the linear schedule of 1000 steps, which begins at 1e-4.
    snr_splits: for several models, the signal-to-noise ratios at which one takes over from the other.
    """

    image_size: int
    patch: int
    channels: int
    mults: tuple[float, ...]
    blocks: int
    classes: int = 0
    attention: tuple[int, ...] = (16, 8)
    head_channels: int = 64
    heads: int = 4
    new_attention_order: bool = True
    learn_sigma: bool = True
    dropout: float = 0.0
    norm_eps: float = 1e-3
    beta_max: float = 0.02
    snr_splits: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.patch < 1 or self.image_size % self.patch:
            raise ValueError(f"patch is {self.patch}: use a divisor of the image's {self.image_size} pixels.")
        if not self.mults or any(b < a for a, b in zip(self.mults, self.mults[1:])):
            raise ValueError(f"mults is {self.mults}: use one or more numbers that do not decrease.")
        if self.positions % 2 ** (len(self.mults) - 1):
            raise ValueError(
                f"{self.positions} positions cannot be halved {len(self.mults) - 1} times: use fewer mults, or another "
                "image_size or patch."
            )
        for width in self.widths:
            if width % 32 or (self.head_channels and width % self.head_channels):
                raise ValueError(
                    f"a level is {width} channels wide: use channels and mults that give multiples of 32 and of "
                    f"head_channels, {self.head_channels}."
                )

    @property
    def positions(self) -> int:
        """Of a side, at the first level."""
        return self.image_size // self.patch

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [int(self.channels * mult) for mult in self.mults]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Raises ValueError for an unknown name."""
        values: dict[str, Any] = json.loads(text)
        known = {field.name for field in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f"the configuration has {unknown[0]!r}: known are {', '.join(sorted(known))}.")
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values)


PUBLISHED = {
    "lsun_p2": Config(256, 2, 128, (1, 2, 2, 4, 4), 2),
    "lsun_p4": Config(256, 4, 256, (1, 1, 2, 2), 2),
    "lsun_p8": Config(256, 8, 256, (1, 1.5, 2), 3),
    "imagenet": Config(256, 4, 256, (1, 2, 2, 2), 3, classes=1000, snr_splits=(0.25,)),
    "ffhq": Config(1024, 4, 128, (1, 2, 2, 4, 4, 4), 2, beta_max=0.025),
}
"""By data set: Luhman & Luhman 2022, arXiv 2207.04316. `imagenet` is two models, one each side of its split."""
