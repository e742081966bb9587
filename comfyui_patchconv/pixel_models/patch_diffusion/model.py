"""A U-Net that works on patches of pixels (Luhman & Luhman 2022, arXiv 2207.04316).

P x P pixels become the channels of one position, so that 256² with P = 4 costs what 64² costs. Names of parameters are
those of the authors' PyTorch port, whose state dicts load as they are.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...streaming import Make, peak_activations
from .config import Config

_PLAIN_EPS = 1e-3  # of norms without weights, in every version


def to_patches(image: Tensor, patch: int) -> Tensor:
    """`[N, C, H, W]` as `[N, P·P·C, H / P, W / P]`: row in the patch, column, and last of all colour."""
    batch, channels, height, width = image.shape
    folded = image.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return folded.permute(0, 3, 5, 1, 2, 4).reshape(batch, -1, height // patch, width // patch)


def from_patches(patches: Tensor, patch: int) -> Tensor:
    """The inverse of `to_patches`."""
    batch, _, height, width = patches.shape
    unfolded = patches.reshape(batch, patch, patch, -1, height, width)
    return unfolded.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * patch, width * patch)


def position_table(channels: int, positions: int) -> Tensor:
    """`[1, channels, positions, positions]`: sines along the width in the first half, then the height."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / (half - 1)) * (64 / positions)
    waves = torch.sin(torch.arange(positions) * frequencies[:, None])  # [half, positions]
    along_width = waves[:, None, :].expand(-1, positions, -1)
    along_height = waves[:, :, None].expand(-1, -1, positions)
    return torch.cat([along_width, along_height])[None]


def timestep_table(steps: Tensor, channels: int) -> Tensor:
    """`[N, channels]` of the timesteps `[N]`."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=steps.device) / (half - 1))
    angles = steps.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, channels % 2))


class PatchUNet(nn.Module):
    """`forward(image [N, 3, H, W] in -1..1, steps [N], labels [N] or None)` -> `[N, 6, H, W]`: the image without noise,
    and where on the way from the smaller to the larger variance the step lies (0 to 1). `[N, 3, H, W]` without
    `learn_sigma`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths, pixels = config.widths, 3 * config.patch**2
        self.embedding_width = widths[-1]
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, 4 * config.channels),
            nn.SiLU(),
            nn.Linear(4 * config.channels, self.embedding_width),
            nn.SiLU(),
        )
        self.label_embs = nn.Embedding(config.classes + 1, widths[0]) if config.classes else None
        self.input_blocks, skips = self._way_down(pixels)
        width = widths[-1]
        self.middle_block = _Steps(
            _Residual(config, width, width), _Attention(config, width), _Residual(config, width, width)
        )
        self.output_blocks = self._way_up(skips)
        width = widths[0]
        self.out = nn.Sequential(_norm(config, width), nn.SiLU(), nn.Conv2d(width, pixels, 3, padding=1))
        _zero(self.out[2])
        if config.learn_sigma:
            self.variance_output_t_emb = nn.Conv2d(self.embedding_width, 2 * width, 1)
            self.variance_output_model = nn.Sequential(
                nn.Conv2d(2 * width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, pixels, 3, padding=1)
            )
        self.register_buffer("positions", position_table(width, config.positions), persistent=False)

    def _way_down(self, pixels: int) -> tuple[nn.ModuleList, list[int]]:
        """The blocks in front of the middle, and how many channels each of them leaves for one behind it."""
        config, widths = self.config, self.config.widths
        blocks = nn.ModuleList([_Steps(nn.Conv2d(pixels, widths[0], 3, padding=1))])
        skips, resolution = [widths[0]], config.positions
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                blocks.append(self._block(width, width, resolution))
                skips.append(width)
            if level + 1 < len(widths):
                blocks.append(_Steps(_Down(width, widths[level + 1])))
                skips.append(widths[level + 1])
                resolution //= 2
        return blocks, skips

    def _way_up(self, skips: list[int]) -> nn.ModuleList:
        """The blocks behind the middle. skips: see `_way_down`; they are taken from its end."""
        config, widths = self.config, self.config.widths
        blocks, resolution = nn.ModuleList(), config.positions // 2 ** (len(widths) - 1)
        for level, width in reversed(list(enumerate(widths))):
            for number in range(config.blocks + 1):
                block = self._block(skips.pop() + width, width, resolution)
                if level and number == config.blocks:
                    block.append(_Up(width, widths[level - 1]))
                    resolution *= 2
                blocks.append(block)
        return blocks

    def _block(self, before: int, width: int, resolution: int) -> _Steps:
        block = _Steps(_Residual(self.config, before, width))
        if resolution in self.config.attention:
            block.append(_Attention(self.config, width))
        return block

    def forward(self, image: Tensor, steps: Tensor, labels: Optional[Tensor] = None) -> Tensor:
        """Raises ValueError for labels that are missing or not wanted, or an image of another size."""
        config = self.config
        if image.shape[1:] != (3, config.image_size, config.image_size):
            raise ValueError(f"image is {tuple(image.shape)}: give [N, 3, {config.image_size}, {config.image_size}].")
        if (labels is not None) != (self.label_embs is not None):
            wanted = "needs labels" if labels is None else "has no classes and takes no labels"
            raise ValueError(f"this model {wanted}.")
        time = self.time_embed(timestep_table(steps, config.channels).to(image.dtype))
        label = None if labels is None or self.label_embs is None else self.label_embs(labels)
        first = self.input_blocks[0](to_patches(image, config.patch), time, label) + self.positions.to(image.dtype)
        skips = [first]
        for block in list(self.input_blocks)[1:]:
            skips.append(block(skips[-1], time, label))
        last = self.middle_block(skips[-1], time, label)
        for block in self.output_blocks:
            last = block(torch.cat([last, skips.pop()], 1), time, label)
        mean = from_patches(self.out(last), config.patch)
        if not config.learn_sigma:
            return mean
        seen = torch.cat([first, last], 1).detach() + self.variance_output_t_emb(F.silu(time)[..., None, None])
        return torch.cat([mean, from_patches(self.variance_output_model(seen).sigmoid(), config.patch)], 1)


@cache
def image_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes of activations that are held at once for one image, without gradients: counted, not measured."""
    with torch.device("meta"):
        model = PatchUNet(config)

    def run(copy: PatchUNet, make: Make) -> None:
        labels = make((1,), torch.long) if config.classes else None
        copy(make((1, 3, config.image_size, config.image_size), dtype), make((1,), torch.float32), labels)

    return peak_activations(model, run, device=torch.device("cpu"), dtype=dtype)


class _Steps(nn.Sequential):
    """Layers one after the other, of which some want to know the time and the class."""

    def forward(self, image: Tensor, time: Tensor, label: Optional[Tensor]) -> Tensor:  # type: ignore[override]
        for layer in self:
            image = layer(image, time, label) if isinstance(layer, _Residual) else layer(image)
        return image


class _Residual(nn.Module):
    """Two convolutions beside a shortcut; scaled and shifted by the time, and let through by the class."""

    def __init__(self, config: Config, before: int, width: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(_norm(config, before), nn.SiLU(), nn.Conv2d(before, width, 3, padding=1))
        self.classemb_proj = nn.Linear(config.widths[0], width) if config.classes else None
        self.emb_layers = nn.Linear(config.widths[-1], 2 * width)
        self.out_layers = nn.Sequential(nn.SiLU(), nn.Dropout(config.dropout), nn.Conv2d(width, width, 3, padding=1))
        self.skip_connection = nn.Identity() if before == width else nn.Conv2d(before, width, 1)
        _zero(self.emb_layers)
        _zero(self.out_layers[2])

    def forward(self, image: Tensor, time: Tensor, label: Optional[Tensor]) -> Tensor:
        scale, shift = self.emb_layers(time)[..., None, None].chunk(2, 1)
        found = F.group_norm(self.in_layers(image), 32, eps=_PLAIN_EPS) * (1 + scale) + shift
        found = self.out_layers(found)
        if self.classemb_proj is not None and label is not None:
            found = found * torch.sigmoid(self.classemb_proj(label) + 2)[..., None, None]
        return self.skip_connection(image) + found


class _Attention(nn.Module):
    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.heads = width // config.head_channels if config.head_channels else config.heads
        self.new_order = config.new_attention_order
        self.norm = _norm(config, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)
        _zero(self.proj_out)

    def forward(self, image: Tensor) -> Tensor:
        pixels = image.flatten(2)
        order = (3, self.heads) if self.new_order else (self.heads, 3)
        parts = self.qkv(self.norm(pixels)).unflatten(1, (*order, -1)).transpose(-1, -2)  # [N, ., ., pixels, channels]
        q, k, v = parts.unbind(1 if self.new_order else 2)
        found = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)
        return (pixels + self.proj_out(found)).view_as(image)


class _Down(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(before, width, 3, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return self.op(F.pad(image, (0, 1, 0, 1)))


class _Up(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, width, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(F.interpolate(image, scale_factor=2, mode="nearest"))


def _norm(config: Config, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, config.norm_eps)


def _zero(layer: nn.Module) -> None:
    """A branch that adds nothing before training."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
