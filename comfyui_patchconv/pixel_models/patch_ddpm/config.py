"""What a patch-based DDPM is and how it is trained: the authors' JSON (Arakawa et al. 2023, arXiv 2304.07087)."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Optional

from ..json_fields import MOST, MOST_LEVELS, checked, parsed, require_within

_MOST_STEPS = 2**40
"""Of a training: more than any takes."""


@dataclass(frozen=True)
class TrainerConfig:
    """How a model is trained. Raises ValueError for what cannot be.

    train_dataset_dir: folder of images. log_dir: where checkpoints and samples go.
    ema_decay: what the averaged weights keep of themselves every `update_ema_every` steps; up to step
        `step_start_ema` they are the trained ones.
    train_batch_size: images of a batch, on all devices together. gradient_accumulate_every: batches of a step.
    train_num_steps: in all.
    train_lr: of Adam. use_amp: whether to compute in half precision where that is safe.
    save_and_sample_every: steps between two checkpoints. num_workers: processes that read images; by default one for
        each processor.
    wandb_enabled: whether to report to Weights & Biases, as `wandb_name` in `wandb_project`.
    """

    train_dataset_dir: str
    log_dir: str
    ema_decay: float = 0.995
    train_batch_size: int = 32
    train_lr: float = 1e-4
    train_num_steps: int = 100_000
    gradient_accumulate_every: int = 1
    use_amp: bool = False
    step_start_ema: int = 2000
    update_ema_every: int = 10
    save_and_sample_every: int = 1000
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    seed: int = 1234
    wandb_enabled: bool = False
    wandb_project: Optional[str] = None
    wandb_name: Optional[str] = None

    def __post_init__(self) -> None:
        counts = ("train_batch_size", "train_num_steps", "gradient_accumulate_every", "update_ema_every")
        require_within(1, _MOST_STEPS, "trainer.", self, *counts, "save_and_sample_every")
        require_within(0, _MOST_STEPS, "trainer.", self, "step_start_ema", "num_workers")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"trainer.ema_decay is {self.ema_decay}: use 0 to below 1.")
        if not self.train_lr > 0:
            raise ValueError(f"trainer.train_lr is {self.train_lr}: use a number above 0, such as 1e-4.")


@dataclass(frozen=True)
class ModelConfig:
    """A U-Net for patches. Raises ValueError for what does not fit together.

    dim: the base width; `dim_mults` times it are the widths of the levels, of which each has half the resolution of the
        one before. The first of them is 1.
    init_dim: channels of the first convolution; None for two thirds of `dim`.
    out_dim: channels of what is predicted, which are those of the image; None says the same.
    channels: of the image, 1 (grey), 3 (RGB) or 4 (RGBA). resnet_block_groups: of every group norm.
    learned_variance: False; the authors' code knows the name and refuses it.
    patch_divider: patches along the height, and as many along the width.
    image_size: pixels of a side, or (height, width), which the authors' code does not know.
    """

    dim: int
    init_dim: Optional[int] = None
    out_dim: Optional[int] = None
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)
    channels: int = 3
    resnet_block_groups: int = 8
    learned_variance: bool = False
    patch_divider: int = 4
    image_size: int | tuple[int, int] = 128

    def __post_init__(self) -> None:
        require_within(4, MOST, "model.", self, "dim")  # the table of timesteps has no fewer columns
        require_within(1, MOST, "model.", self, "resnet_block_groups", "patch_divider")
        if self.channels not in (1, 3, 4):
            raise ValueError(f"model.channels is {self.channels}: use 1 for grey, 3 for RGB or 4 for RGBA.")
        if self.init_dim is not None:
            require_within(1, MOST, "model.", self, "init_dim")
        if self.learned_variance:
            raise ValueError("model.learned_variance is true, which the authors' code refuses as well: use false.")
        if self.out_dim not in (None, self.channels):
            raise ValueError(f"model.out_dim is {self.out_dim}: use null or the image's channels, {self.channels}.")
        if len(self.dim_mults) > MOST_LEVELS:
            raise ValueError(f"model.dim_mults has {len(self.dim_mults)} numbers: use {MOST_LEVELS} or less.")
        if self.dim_mults[:1] != (1,) or min(self.dim_mults) < 1:
            raise ValueError(
                f"model.dim_mults is {list(self.dim_mults)}: use whole numbers above 0, the first of them 1."
            )
        for width in self.widths:
            if width > MOST:
                raise ValueError(
                    f"a level is {width} channels wide: use model.dim and dim_mults that give {MOST} or less."
                )
            if width % self.resnet_block_groups:
                raise ValueError(
                    f"a level is {width} channels wide: use model.dim and dim_mults that give multiples of "
                    f"resnet_block_groups, {self.resnet_block_groups}."
                )
        unit = self.patch_divider * 2 ** (len(self.dim_mults) - 1)
        if max(self.image_sides) > MOST:
            raise ValueError(f"model.image_size is {self.image_size}: use {MOST} or less.")
        if any(side < 1 or side % unit for side in self.image_sides):
            raise ValueError(
                f"model.image_size is {self.image_size}: use a multiple of {unit}, which is {self.patch_divider} "
                f"patches that are halved {len(self.dim_mults) - 1} times, or another patch_divider or dim_mults."
            )

    @property
    def first_width(self) -> int:
        """Channels of the first convolution."""
        return self.dim // 3 * 2 if self.init_dim is None else self.init_dim

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.dim * mult for mult in self.dim_mults]

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def patches(self) -> int:
        """Patches of an image, in all."""
        return self.patch_divider**2


@dataclass(frozen=True)
class DiffusionConfig:
    """What a model is trained to predict, and how that is judged. Raises ValueError for what is not known.

    timesteps: from no noise to nothing else. loss_type: `l1` or `l2`, of absolute or squared differences.
    objective: `pred_noise`, the noise, or `pred_x0`, the image.
    """

    timesteps: int = 1000
    loss_type: str = "l1"
    objective: str = "pred_noise"

    def __post_init__(self) -> None:
        require_within(1, MOST, "diffusion.", self, "timesteps")
        if self.loss_type not in ("l1", "l2"):
            raise ValueError(f"diffusion.loss_type is {self.loss_type!r}: use l1 or l2.")
        if self.objective not in ("pred_noise", "pred_x0"):
            raise ValueError(f"diffusion.objective is {self.objective!r}: use pred_noise or pred_x0.")


@dataclass(frozen=True)
class Config:
    """Model, diffusion and trainer. Files of weights have no trainer: it names folders of the machine
    that they come from."""

    model: ModelConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    trainer: Optional[TrainerConfig] = None

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})

    def difference(self, other: Config) -> Optional[str]:
        """The first value of the model or the diffusion that is another one in `other`: its name and both; None if
        there is none. What a value that is left out stands for is the same as that value."""
        for section in ("model", "diffusion"):
            one, two = (asdict(getattr(config, section)) for config in (self._spelled_out(), other._spelled_out()))
            for name, value in one.items():
                if two[name] != value:
                    return f"{section}.{name}, {value} and {two[name]}"
        return None

    def _spelled_out(self) -> Config:
        model = self.model
        whole = {"init_dim": model.first_width, "out_dim": model.channels, "image_size": model.image_sides}
        return replace(self, model=replace(model, **whole))

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Raises ValueError for text that is not JSON, and for the first name that is unknown, missing, or has a value
        of the wrong type or that does not fit the others."""
        given = parsed(text)
        sections = checked(cls, given, "")
        return cls(**{name: _SECTIONS[name](**checked(_SECTIONS[name], sections[name], f"{name}.")) for name in given})


_SECTIONS: dict[str, Any] = {"model": ModelConfig, "diffusion": DiffusionConfig, "trainer": TrainerConfig}
