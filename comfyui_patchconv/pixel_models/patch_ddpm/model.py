"""A U-Net that predicts an image patch by patch (Arakawa et al. 2023, arXiv 2304.07087).

Every patch sees the whole image at a patch's size, and knows its place. Names of parameters are those of the authors'
code behind `denoise_fn.`, so that its weights load as they are.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...memory.usage import free
from ...streaming import Make, peak_activations
from ..patch_diffusion.model import timestep_table
from .config import ModelConfig

_HEADS, _HEAD_CHANNELS = 4, 32  # of every attention
_OF_FREE = 0.5  # a convolution's workspace, which a count does not see, may be as large as what it sees
_EPS = 1e-5


def cut(image: Tensor, divider: int) -> Tensor:
    """`[N, C, H, W]` as its `divider`² patches, row by row: `[divider², N, C, H / divider, W / divider]`."""
    batch, channels, height, width = image.shape
    cells = image.reshape(batch, channels, divider, height // divider, divider, width // divider)
    return cells.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)


def join(patches: Tensor, divider: int) -> Tensor:
    """The inverse of `cut`."""
    _, batch, channels, height, width = patches.shape
    cells = patches.unflatten(0, (divider, divider)).permute(2, 3, 0, 4, 1, 5)
    return cells.reshape(batch, channels, divider * height, divider * width)


class PatchDenoiser(nn.Module):
    """`forward(image [N, C, H, W] in -1..1, steps [N])` -> `[N, C, H, W]`, of the image's dtype: what the model is
    trained to predict, the noise in the image or the image without it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._patched_encoder = _Encoder(config)
        self._patched_decoder = _Decoder(config)
        self._embedding = _Embedding(config)

    def forward(self, image: Tensor, steps: Tensor, patches_at_once: Optional[int] = None) -> Tensor:
        """patches_at_once: how many patches of each image to work on together, with the same result and memory in
        proportion. None or 0: all while gradients are recorded, otherwise as many as fit into half of the free memory.

        Raises ValueError for an image of another size than the configuration's, steps that are not one for each image,
        or a negative number of patches.
        """
        config = self.config
        if image.shape[1:] != (config.channels, *config.image_sides):
            wanted = ", ".join(map(str, (config.channels, *config.image_sides)))
            raise ValueError(f"image is {tuple(image.shape)}: give [N, {wanted}].")
        if steps.shape != image.shape[:1]:
            raise ValueError(f"steps is {tuple(steps.shape)}: give one for each image, [{len(image)}].")
        at_once = self._at_once(image, patches_at_once or 0)
        seen = image.to(self._dtype)
        whole, patches = F.avg_pool2d(seen, config.patch_divider), cut(seen, config.patch_divider)
        predicted = torch.empty_like(patches, dtype=image.dtype)
        for first in range(0, len(patches), at_once):
            some = slice(first, first + at_once)
            predicted[some] = self._denoised(patches[some], whole, steps, first)
        return join(predicted, config.patch_divider)

    def _denoised(self, patches: Tensor, whole: Tensor, steps: Tensor, first: int) -> Tensor:
        """patches: `[count, N, C, h, w]` from number `first` on. whole: the images at the size of a patch."""
        embedding = self._embedding(steps, first, len(patches))
        image = torch.cat([patches, whole.expand_as(patches)], 2).flatten(0, 1)
        image, skips = self._patched_encoder(image, embedding)
        return self._patched_decoder(image, skips, embedding).view_as(patches)

    def _at_once(self, image: Tensor, asked: int) -> int:
        if asked < 0:
            raise ValueError(f"patches_at_once is {asked}: use 1 or more, or 0 for as many as fit.")
        if asked or torch.is_grad_enabled():
            return asked or self.config.patches
        each = len(image) * patch_bytes(self.config, self._dtype, image.device)
        return min(max(int(_OF_FREE * free(image.device)) // each, 1), self.config.patches)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


@cache
def patch_bytes(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of activations that are held at once for one patch of one image, without gradients: counted, not measured.

    The most that are alive between two operators, on tensors with shapes alone. So many patches of so many images need
    that many times as much, beside the workspace of one operator.
    """
    with torch.device("meta"):
        model = PatchDenoiser(config)
    shape = (config.channels, *(side // config.patch_divider for side in config.image_sides))

    def run(copy: PatchDenoiser, make: Make) -> None:
        patch = make((1, *shape), dtype)
        copy._denoised(patch[None], patch, make((1,), torch.float32), 0)

    return peak_activations(model, run, device=device, dtype=dtype)


class _Embedding(nn.Module):
    """The timestep and a patch's place, as a vector."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.dim, self.patches = dim, config.patches
        self._time_embedding_layer = nn.Sequential(nn.Identity(), nn.Linear(dim, dim), nn.GELU())
        self._pos_embedding_layer = nn.Sequential(nn.Linear(config.patches, dim), nn.GELU())
        self._mapping = nn.Sequential(nn.Linear(2 * dim, 4 * dim))

    def forward(self, steps: Tensor, first: int, count: int) -> Tensor:
        """`[count · N, 4 · dim]` of the timesteps `[N]`, for `count` patches from number `first` on."""
        dtype = next(self.parameters()).dtype
        time = self._time_embedding_layer(timestep_table(steps, self.dim).to(dtype))
        one_hot = torch.eye(self.patches, device=steps.device)[first : first + count]
        place = self._pos_embedding_layer(one_hot.to(dtype))
        return self._mapping(torch.cat([time.repeat(count, 1), place.repeat_interleave(len(steps), 0)], 1))


class _Encoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._init_conv = nn.Conv2d(2 * config.channels, config.first_width, 7, padding=3)
        befores = [config.first_width, *config.widths]
        self._downsLayers = nn.ModuleList(
            _Level(config, before, width, nn.Conv2d(width, width, 4, 2, 1) if level else nn.Identity())
            for level, before, width in zip(reversed(range(len(config.widths))), befores, config.widths)
        )

    def forward(self, image: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The patch at the last level, and as it leaves every level but the first."""
        skips: list[Tensor] = []
        image = self._init_conv(image)
        for number, level in enumerate(self._downsLayers):
            image = level(image, embedding, skips if number else None)
        return image, skips


class _Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = config.widths
        self.mid_block1 = _Residual(config, widths[-1], widths[-1])
        self.mid_attn = _Attended(widths[-1], _Attention(widths[-1]))
        self.mid_block2 = _Residual(config, widths[-1], widths[-1])
        # Never used, but in every file; without a gradient, which a training on several devices would wait for.
        self._embedder = nn.Linear(config.dim, 4 * config.dim).requires_grad_(False)
        self.ups = nn.ModuleList(
            _Level(config, 2 * width, above, nn.ConvTranspose2d(above, above, 4, 2, 1))
            for above, width in reversed(list(pairwise(widths)))
        )
        self.final_conv = nn.Sequential(
            _Residual(config, config.dim, config.dim, embedded=False), nn.Conv2d(config.dim, config.channels, 1)
        )

    def forward(self, image: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        image = self.mid_block2(self.mid_attn(self.mid_block1(image, embedding)), embedding)
        for level in self.ups:
            image = level(torch.cat([image, skips.pop()], 1), embedding)
        return self.final_conv(image)


class _Level(nn.ModuleList):
    """Residual blocks and attention at one resolution, and the way to the next."""

    def __init__(self, config: ModelConfig, before: int, width: int, onward: nn.Module) -> None:
        first, second = _Residual(config, before, width), _Residual(config, width, width)
        super().__init__([first, second, _Attended(width, _LinearAttention(width)), onward])

    def forward(self, image: Tensor, embedding: Tensor, skips: Optional[list[Tensor]] = None) -> Tensor:
        """skips: where to put the patch as it leaves this resolution."""
        first, second, attention, onward = self
        image = attention(second(first(image, embedding), embedding))
        if skips is not None:
            skips.append(image)
        return onward(image)


class _Residual(nn.Module):
    """Two convolutions beside a shortcut, the first of them scaled and shifted by the embedding."""

    def __init__(self, config: ModelConfig, before: int, width: int, embedded: bool = True) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.dim, 2 * width)) if embedded else None
        self.block1 = _Block(config, before, width)
        self.block2 = _Block(config, width, width)
        self.res_conv = nn.Identity() if before == width else nn.Conv2d(before, width, 1)

    def forward(self, image: Tensor, embedding: Optional[Tensor] = None) -> Tensor:
        modulation = None if self.mlp is None else self.mlp(embedding)[..., None, None]
        return self.block2(self.block1(image, modulation)) + self.res_conv(image)


class _Block(nn.Module):
    def __init__(self, config: ModelConfig, before: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(before, width, 3, padding=1)
        self.norm = nn.GroupNorm(config.resnet_block_groups, width)

    def forward(self, image: Tensor, modulation: Optional[Tensor] = None) -> Tensor:
        image = self.norm(self.proj(image))
        if modulation is not None:
            scale, shift = modulation.chunk(2, 1)
            image = torch.addcmul(shift, image, scale + 1)
        return F.silu(image)


class _Attended(nn.Module):
    """Attention on the normalised image, beside a shortcut."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.fn = nn.ModuleDict({"fn": attention, "norm": _ChannelNorm(width)})

    def forward(self, image: Tensor) -> Tensor:
        return image + self.fn["fn"](self.fn["norm"](image))


class _ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, width, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        weight, bias = self.g.flatten(), self.b.flatten()
        return F.layer_norm(image.movedim(1, -1), weight.shape, weight, bias, _EPS).movedim(-1, 1)


class _LinearAttention(nn.Module):
    """Attention whose cost is in proportion to the pixels (Shen et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_qkv = _to_qkv(width)
        self.to_out = nn.Sequential(nn.Conv2d(_HEADS * _HEAD_CHANNELS, width, 1), _ChannelNorm(width))

    def forward(self, image: Tensor) -> Tensor:
        q, k, v = _heads(self.to_qkv(image))
        q, k = q.softmax(2) * _HEAD_CHANNELS**-0.5, k.softmax(3)
        context = v @ k.transpose(2, 3)  # [N, heads, channels of v, channels of k]
        return self.to_out((context @ q).flatten(1, 2).unflatten(2, image.shape[2:]))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_qkv = _to_qkv(width)
        self.to_out = nn.Conv2d(_HEADS * _HEAD_CHANNELS, width, 1)

    def forward(self, image: Tensor) -> Tensor:
        q, k, v = (part.transpose(2, 3) for part in _heads(self.to_qkv(image)))
        found = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return self.to_out(found.flatten(1, 2).unflatten(2, image.shape[2:]))


def _to_qkv(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, 3 * _HEADS * _HEAD_CHANNELS, 1, bias=False)


def _heads(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, each `[N, heads, channels, pixels]`."""
    return qkv.flatten(2).unflatten(1, (3, _HEADS, _HEAD_CHANNELS)).unbind(1)
