"""What a Patch Diffusion model is, and the published ones."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ..json_fields import MOST, MOST_LEVELS, checked, parsed, require_within

BETA_MIN = 1e-4
"""The first beta of every linear schedule."""

_MOST_BLOCKS = 1024
"""Of a level, and pixels of a patch's side: far more than any model has, and few enough to build."""


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
        require_within(1, MOST, "", self, "image_size")
        require_within(4, MOST, "", self, "channels")  # pairs of sines
        require_within(1, _MOST_BLOCKS, "", self, "blocks")
        require_within(0, MOST, "", self, "classes", "head_channels")
        require_within(0 if self.head_channels else 1, MOST, "", self, "heads")
        for name, most in (("mults", MOST_LEVELS), ("attention", _MOST_BLOCKS), ("snr_splits", _MOST_BLOCKS)):
            if len(getattr(self, name)) > most:
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers: use {most} or less.")
        if not all(0 < mult <= MOST for mult in self.mults):
            raise ValueError(f"mults is {self.mults}: use numbers above 0, {MOST} or less.")
        if not BETA_MIN < self.beta_max < 1:
            raise ValueError(f"beta_max is {self.beta_max}: use a number between {BETA_MIN} and 1, such as 0.02.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: use 0 to below 1.")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps is {self.norm_eps}: use a number above 0, such as 1e-3.")
        if not all(split > 0 for split in self.snr_splits):
            raise ValueError(f"snr_splits is {self.snr_splits}: use numbers above 0.")
        if self.patch < 1 or self.image_size % self.patch:
            raise ValueError(f"patch is {self.patch}: use a divisor of the image's {self.image_size} pixels.")
        require_within(1, _MOST_BLOCKS, "", self, "patch")
        if not self.mults or any(b < a for a, b in zip(self.mults, self.mults[1:])):
            raise ValueError(f"mults is {self.mults}: use one or more numbers that do not decrease.")
        if self.positions % 2 ** (len(self.mults) - 1):
            raise ValueError(
                f"{self.positions} positions cannot be halved {len(self.mults) - 1} times: use fewer mults, or another "
                "image_size or patch."
            )
        which = "head_channels" if self.head_channels else "heads"
        for width in self.widths:
            if width > MOST:
                raise ValueError(f"a level is {width} channels wide: use channels and mults that give {MOST} or less.")
            if width < 32 or width % 32 or width % getattr(self, which):
                raise ValueError(
                    f"a level is {width} channels wide: use channels and mults that give multiples of 32 and of "
                    f"{which}, {getattr(self, which)}."
                )

    @property
    def positions(self) -> int:
        """Positions of a side, at the first level."""
        return self.image_size // self.patch

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [int(self.channels * mult) for mult in self.mults]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Raises ValueError for what `to_json` does not write."""
        return cls(**checked(cls, parsed(text)))


PUBLISHED = {
    "lsun_p2": Config(256, 2, 128, (1, 2, 2, 4, 4), 2),
    "lsun_p4": Config(256, 4, 256, (1, 1, 2, 2), 2),
    "lsun_p8": Config(256, 8, 256, (1, 1.5, 2), 3),
    "imagenet": Config(256, 4, 256, (1, 2, 2, 2), 3, classes=1000, snr_splits=(0.25,)),
    "ffhq": Config(1024, 4, 128, (1, 2, 2, 4, 4, 4), 2, beta_max=0.025),
}
"""The published configurations by data set: Luhman & Luhman 2022, arXiv 2207.04316. `imagenet`
is two models, one each side of its split."""
