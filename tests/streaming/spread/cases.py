"""Programs that ranks run together: each is a function and its arguments, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from network_helpers import random_network, run_network
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Decoder, drawn, seeded
from vae_helpers import small_vae

from streaming.programs import random_program
from streaming.test_sound import Codec, sound

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def decoder(height: int = 13, width: int = 9, batch: int = 1) -> Case:
    return seeded(Decoder), (drawn(batch, 4, height, width),)


def vae_decoder(height: int = 7, width: int = 5, batch: int = 1) -> Case:
    return small_vae().decoder, (drawn(batch, 4, height, width),)


def vae_encoder(height: int = 72) -> Case:
    return small_vae().encoder, (drawn(1, 3, height, 40),)


def upsampled(height: int = 13, width: int = 9) -> Case:
    """The end of a level of a VAE's decoder."""
    convolutions = seeded(lambda: nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5)))
    norms = seeded(lambda: nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(3)))

    def run(x: Tensor) -> Tensor:
        x = convolutions[0](x)
        y = convolutions[1](F.silu(norms[0](x)))
        y = x + convolutions[2](F.silu(norms[1](y)))
        return convolutions[4](norms[2](convolutions[3](F.interpolate(y, scale_factor=2.0))))

    return run, (drawn(1, 8, height, width),)


def circular(height: int = 11) -> Case:
    convolutions = seeded(
        lambda: nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular") for _ in "ab"))
    )
    norm = seeded(lambda: nn.GroupNorm(2, 4))
    return lambda x: convolutions(F.silu(norm(convolutions(x)))).roll((3, 2), (2, 3)), (drawn(2, 4, height, 6),)


def video(frames: int = 5, height: int = 11) -> Case:
    first, last = seeded(lambda: nn.Conv3d(3, 4, 3, padding=(0, 1, 1))), seeded(lambda: nn.Conv3d(4, 3, 3, padding=1))
    norm = seeded(lambda: nn.GroupNorm(2, 4))

    def run(x: Tensor) -> Tensor:
        x = first(torch.cat((x[:, :, :1], x[:, :, :1], x), 2))
        x = F.silu(norm(x)).repeat_interleave(2, 2)[:, :, 1:]
        return last(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))

    return run, (drawn(1, 3, frames, height, 6),)


def codec(length: int = 1201) -> Case:
    model = seeded(lambda: Codec(4, (2, 3)))
    return lambda x: model.decode(model.encode(x).repeat(1, 2, 1)), (sound(1, 2, length),)


def linear_attention(height: int = 12) -> Case:
    def run(x: Tensor) -> Tensor:
        q, k, v = (torch.tanh(x * factor).flatten(2) for factor in (1.0, 2.0, 3.0))
        return ((v @ k.transpose(1, 2)) @ q).reshape(x.shape)

    return run, (drawn(1, 4, height, 9),)


def attention(height: int, width: int, causal: bool = False, dtype: str = "float32", heads: int = 2) -> Case:
    """Of every fourth pixel to all, whose scores are far apart, behind a convolution and before another."""
    kind = getattr(torch, dtype)
    first = seeded(lambda: nn.Conv2d(1, 8, 3, padding=1)).to(kind)
    make, back = (seeded(lambda ways=ways: nn.Conv2d(8, ways, 3, padding=1)).to(kind) for ways in (16, 8))

    def run(x: Tensor) -> Tensor:
        x = first(x)
        k, v = make(x).flatten(2).unflatten(1, (2, heads, -1)).transpose(-1, -2).unbind(1)
        few = x[:, :, ::2, ::2]
        q = few.flatten(2).unflatten(1, (heads, -1)).transpose(-1, -2)
        found = F.scaled_dot_product_attention(3 * q, 3 * k, v, is_causal=causal)
        return back(few + found.transpose(-1, -2).flatten(1, 2).unflatten(-1, few.shape[2:]))

    return run, (drawn(1, 1, height, width).to(kind),)


def reductions(height: int = 17) -> Case:
    convolution = seeded(lambda: nn.Conv2d(4, 4, 3, padding=1))

    def run(x: Tensor) -> list[Tensor]:
        y = convolution(x)
        dims = (2, 3)
        z = (y - y.mean(dims, keepdim=True)) / (y.std(dims, keepdim=True) + 0.1) + y.amax(dims, keepdim=True)
        whole = (z > 0).long().sum(dims), z.var((0, 2, 3)), z.amin((1, 2)), z.sum(), torch.linalg.vector_norm(z, dim=2)
        return [F.adaptive_avg_pool2d(z, 1), F.instance_norm(z), *whole]

    return run, (drawn(2, 4, height, 9),)


def evaluated_whole(height: int = 11) -> Case:
    convolution = seeded(lambda: nn.Conv2d(3, 3, 3, padding=1))
    return lambda x: convolution(convolution(x).cumsum(2).flip(2).sort(-1).values), (drawn(1, 3, height, 8),)


def demanded(height: int = 11) -> Case:
    convolution = seeded(lambda: nn.Conv2d(3, 3, 3, padding=1))

    def run(x: Tensor) -> tuple[Tensor, Tensor, float]:
        x = convolution(x)
        high = x.max().item()
        y = convolution(x * 2 if high > 0 else x)
        return convolution(y), x, high

    return run, (drawn(1, 3, height, 8),)


def several(height: int = 11) -> Case:
    down = seeded(lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1))
    same = seeded(lambda: nn.Conv2d(3, 3, 5, padding=2))

    def run(x: Tensor, other: Tensor) -> dict[str, Any]:
        small, large = down(same(x)), same(x + other)
        joined = torch.cat((large, x[:, :, 2:5], large[:, :, ::3]), 2)
        padded = F.pad(F.pad(joined, (1, 1, 2, 3), "reflect"), (0, 0, 1, 2), "replicate")
        turned = same(padded.transpose(2, 3).contiguous())
        return {"small": small, "parts": [large, F.conv_transpose2d(large, same.weight, stride=2)], "turned": turned}

    return run, (drawn(1, 3, height, 8), drawn(1, 3, height, 1))


def without_norms(height: int = 40) -> Case:
    many = seeded(lambda: nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(12))))
    return many, (drawn(1, 3, height, 8),)


def written(height: int = 11) -> Case:
    convolution = seeded(lambda: nn.Conv2d(3, 3, 3, padding=1))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y = convolution(x)
        y[:, :, 3:7].mul_(2).add_(1)
        y[:, 1] = y[:, 0]
        z = convolution(y)
        x.add_(z)
        return z, y

    return run, (drawn(1, 3, height, 8),)


def copied(batch: int) -> Case:
    """Into memory of the program's, which lies otherwise."""
    convolution = seeded(lambda: nn.Conv2d(4, 8, 3, padding=1))

    def run(x: Tensor) -> Tensor:
        result = torch.empty(batch, 16, 12, 8)
        result.permute(0, 3, 1, 2).copy_(convolution(x))
        return result

    return run, (drawn(batch, 4, 16, 12),)


def network(seed: int, height: int, batch: int = 1) -> Case:
    operators, channels = random_network(seed)
    return lambda x: run_network(operators, x, 2), (drawn(batch, channels, height, 7).double(),)


def program(seed: int) -> Case:
    return random_program(seed)


def apart(batch: int, height: int = 11) -> Case:
    """Much that treats samples each by itself: views, joins, pools, sums, tables and writes."""
    same, wide = (seeded(lambda sides=sides: nn.Conv2d(4, 4, 3, padding=1)) for sides in (1, 2))
    table, tokens = drawn(4, 1, 1), seeded(lambda: nn.Linear(4, 4))

    def run(x: Tensor, other: Tensor) -> dict[str, Any]:
        y = F.instance_norm(same(x)) * table + F.interpolate(
            F.avg_pool2d(F.pad(x, (1, 1, 0, 0)), (1, 3), 1), scale_factor=1.0
        )
        y[:, :, 3:7].mul_(2).add_(1)
        y[:, 1] = y[:, 0]
        frames = y.unflatten(1, (2, 2)).transpose(1, 2).flatten(0, 0)
        weights = torch.softmax(frames.flatten(1, 2), 1).mean((2, 3), keepdim=True)
        z = torch.cat((wide(y * weights), other), 1).reshape(batch, 2, 2, -1, height, x.shape[-1]).flatten(1, 3)
        rows = F.layer_norm(tokens(z[:, :4].flatten(2).mT), (4,)).amax(-1)
        return {"map": F.pixel_shuffle(z[:, :4].flip(2), 2), "parts": [z, z.expand_as(z)[:, ::2]], "rows": rows,
                "most": z.amax((1, 2, 3)), "spread": z.std((2, 3))}  # fmt: skip

    return run, (drawn(batch, 4, height, 6), drawn(batch, 4, height, 6) * 2)


def attended(pixels: int) -> Case:
    """Attention alone."""
    layers = seeded(lambda: nn.ModuleList(nn.Linear(8, 8) for _ in range(3)))
    return (
        lambda x: F.scaled_dot_product_attention(*(layer(x) for layer in layers)),
        (drawn(1, pixels, 8),),
    )


def mixed(batch: int, how: str, height: int = 9) -> Case:
    """What mixes samples in one way, between convolutions that do not."""
    same = seeded(lambda: nn.Conv2d(4, 4, 3, padding=1))
    held, order = drawn(batch, 4, 1, 1), torch.arange(batch).flip(0)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda y: y - y.mean(0, keepdim=True),
        "largest": lambda y: y / y.amax((0, 2, 3), keepdim=True),
        "roll": lambda y: y.roll(1, 0),
        "flip": lambda y: y.flip(0),
        "index": lambda y: y[order],
        "softmax": lambda y: y.softmax(0),
        "held": lambda y: y * held,
        "exchanged": lambda y: y.transpose(0, 1).contiguous().view(y.shape),
        "one": lambda y: y + y[:1],
        "shifted": lambda y: F.pad(y, (0, 0, 0, 0, 0, 0, 1, -1)),
        "joined": lambda y: torch.cat((y[1:], y[:1])),
        "norm": lambda y: F.layer_norm(y, y.shape),
        "cumulated": lambda y: y.cumsum(0),
        "written": lambda y: y.clone().index_fill_(0, order[:1], 2.0),
        "trained": lambda y: F.batch_norm(y, None, None, training=True),
        "product": lambda y: y * (y.flatten(1) @ y.flatten(1).mT).sum(1)[:, None, None, None],
    }
    return lambda x: same(ways[how](same(x))), (drawn(batch, 4, height, 6),)


CASES: dict[str, Callable[..., Case]] = {
    make.__name__: make
    for make in (
        decoder, vae_decoder, vae_encoder, upsampled, circular, video, codec, linear_attention, reductions,
        evaluated_whole, demanded, several, without_norms, written, copied, apart, attended, attention, mixed, network,
        program,
    )
}  # fmt: skip
