"""AutoencoderKLLTXVideo: LTX-Video's VAEs of 0.9, 0.9.1, and 0.9.5 to 0.9.8, in the authors' layout and diffusers'."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch

from ..packing import Statistics
from ..words import short
from .family import (
    Kind,
    Medium,
    Plan,
    Rename,
    Shapes,
    State,
    Traits,
    VaeFile,
    check_pairs,
    incomplete,
    numbered,
    renaming,
)

NAMES = ("AutoencoderKLLTXVideo",)

MEDIUM: Medium = "video"

KIND = Kind("AutoencoderKLLTXVideo", "0.33", ("diffusers.models.autoencoders.autoencoder_kl_ltx",))

_MEANS = {"per_channel_statistics.mean-of-means": "latents_mean", "per_channel_statistics.std-of-means": "latents_std"}

PARTS = ("encoder.", "decoder.", "per_channel_statistics.", *_MEANS.values())

_RATE = 25.0
"""Frames a second."""

_TIME, _NOISE, _SEED = 0.05, 0.025, 0
"""The timestep that a decoder with timesteps is told, and the share of noise in its latent, as ComfyUI has both; the
noise is always the same."""

_LAYERS = renaming(
    (r"\.res_blocks\.", ".resnets."),
    (r"\.conv_shortcut\.(?=weight|bias)", ".conv_shortcut.conv."),
    (r"\.norm3\.norm\.", ".norm3."),
    (r"^decoder\.last_(time_embedder|scale_shift_table)(?=\.|$)", r"decoder.\1"),
)

_BLOCK = re.compile(r"(encoder\.down|decoder\.up)_blocks\.([0-9]{1,3})\.(.*)")

_FIRST = "resnets.0.conv1.conv.weight"

_DOWN = {2: "temporal", 4: "spatial", 8: "spatiotemporal"}
"""How an encoder since 0.9.5 makes maps smaller, by how many values it moves into channels."""

_USUAL = {"spatial_padding_mode": "zeros", "causal_decoder": False}

_WIDTH = "one of LTX-Video 0.9, 0.9.1, or 0.9.5 to 0.9.8 is needed"


def claims(shapes: Shapes) -> bool:
    """The authors' blocks, which no one else names so, or statistics that diffusers has beside causal convolutions."""
    if any(_BLOCK.match(name) and ".res_blocks." in name for name in shapes):
        return True
    blocks = (f"{part}_blocks.0.{_FIRST}" for part in ("encoder.down", "decoder.up"))
    return bool(shapes.keys() & _MEANS.values()) and any(block in shapes for block in blocks)


def plan(file: VaeFile) -> Plan:
    rename = _rename_of(file.shapes)
    names = {rename(name): name for name in file.shapes}
    shapes = {name: file.shapes[own] for name, own in names.items()}
    check_pairs(file, ("encoder.", "decoder."))
    first, inner, last = (f"{name}.conv.weight" for name in ("encoder.conv_in", "decoder.conv_in", "decoder.conv_out"))
    inside = [name for name in shapes if name.endswith(("conv1.conv.weight", ".conv.conv.weight"))]
    for name in (first, inner, last, *inside):
        if len(shapes.get(name, ())) != 5 or 0 in shapes[name]:
            raise file.other_kind("a VAE like LTX-Video's", names.get(name, name), _WIDTH)
    _check_said(file)
    statistics = {name: names.get(name) for name in _MEANS.values()}
    for theirs, name in _MEANS.items():
        if shapes.get(name) != (shapes[inner][1],):
            missing = names.get(name, name if not _kinds(file.shapes, "decoder.up") else theirs)
            raise incomplete(file.path, names[inner], f"{missing} of {shapes[inner][1]} channels")
    config = _encoder(shapes) | _decoder(file, names, shapes) | {"latent_channels": shapes[inner][1]}
    config["patch_size"] = isqrt(shapes[first][1] // 3)
    apart = {own: name for name, own in statistics.items() if own is not None}
    left = [name for name in file.shapes if name.startswith("per_channel_statistics.") and name not in apart]
    noise = _NOISE if config["timestep_conditioning"] else 0.0

    def finish(vae: Any, values: State) -> None:
        found = {apart[own]: value for own, value in values.items()}
        vae.add_module("packing", Statistics(found["latents_mean"], found["latents_std"], noise, _SEED))

    return Plan(KIND, config, rename, left=left, apart=tuple(apart), prepare=_prepared, finish=finish)


def _check_said(file: VaeFile) -> None:
    """Raises ValueError where the authors' metadata say of the VAE what no shape shows, and it is not as usual."""
    try:
        said = json.loads(file.metadata.get("config", "{}"))["vae"]
        unusual = {name: said[name] for name, usual in _USUAL.items() if said.get(name, usual) != usual}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    for name, value in unusual.items():
        raise ValueError(
            f"{file.path} has a VAE like LTX-Video's whose metadata say that its {name} is {short(str(value), 30)}: "
            f"one where it is {_USUAL[name]} is needed."
        )


def traits(vae: Any) -> Traits:
    config = vae.config
    times = 2 ** sum(map(bool, config["decoder_spatio_temporal_scaling"]))
    return Traits(MEDIUM, config["latent_channels"], config["patch_size"] * times, times, rate=_RATE)


def _prepared(vae: Any) -> None:
    """Have its statistics apart, and its decoder told the timestep, with the same noise in its layers each time."""
    del vae.latents_mean, vae.latents_std
    if vae.config["timestep_conditioning"]:
        vae.decoder.__class__ = _timed(type(vae.decoder))


def _timed(kind: Any) -> Any:
    """A decoder of the class `kind` that knows the timestep: a class, so that a copy of the VAE is one too."""

    class Timed(kind):
        def forward(self, hidden_states: torch.Tensor, _: Any = None) -> torch.Tensor:
            time = hidden_states.new_full(hidden_states.shape[:1], _TIME)
            with _same_noise(hidden_states.device):
                return super().forward(hidden_states, time)

    return Timed


@contextmanager
def _same_noise(device: torch.device) -> Iterator[None]:
    """Within the block what is drawn is the same each time, and outside of it what it would have been without."""
    on_device = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_device):
        torch.default_generator.manual_seed(_SEED)  # torch.manual_seed would set those of other GPUs too
        for one in on_device:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(_SEED)
        yield


@dataclass(frozen=True)
class _Level:
    """width: channels of its blocks. layers: how many. sampler: the shape of the convolution that changes the size;
    empty where there is none. noisy: whether its blocks add noise."""

    width: int
    layers: int
    sampler: tuple[int, ...]
    noisy: bool


def _level(shapes: Shapes, part: str) -> _Level:
    way = "down" if part.startswith("encoder.") else "up"
    samplers = [f"{part}.{way}samplers.0.{name}.weight" for name in ("conv.conv", "conv")]
    sampler = next((shapes[name] for name in samplers if name in shapes), ())
    width = shapes.get(f"{part}.{_FIRST}", (0,))[0]
    layers = len(numbered(shapes, f"{part}.resnets.{{}}.conv1.conv.weight"))
    return _Level(width, layers, sampler, f"{part}.resnets.0.per_channel_scale1" in shapes)


def _levels(shapes: Shapes, part: str) -> list[_Level]:
    blocks = f"{part}_blocks.{{}}"
    return [_level(shapes, blocks.format(level)) for level in range(len(numbered(shapes, f"{blocks}.{_FIRST}")))]


def _encoder(shapes: Shapes) -> dict[str, Any]:
    levels, middle = _levels(shapes, "encoder.down"), _level(shapes, "encoder.mid_block")
    newer = "encoder.down_blocks.0.downsamplers.0.conv.conv.weight" in shapes
    widths = [level.width for level in levels] + ([middle.width] if newer else [])
    config: dict[str, Any] = {
        "block_out_channels": tuple(widths),
        "layers_per_block": (*(level.layers for level in levels), middle.layers),
        "spatio_temporal_scaling": tuple(bool(level.sampler) for level in levels),
        "down_block_types": ("LTXVideo095DownBlock3D" if newer else "LTXVideoDownBlock3D",) * len(levels),
    }
    if newer:
        moved = [after // level.sampler[0] if level.sampler else 0 for level, after in zip(levels, widths[1:])]
        config["downsample_type"] = tuple(_DOWN.get(values, "conv") for values in moved)
    return config


def _decoder(file: VaeFile, names: dict[str, str], shapes: Shapes) -> dict[str, Any]:
    """Its part of the configuration, which counts levels from the image's side. Raises ValueError for LTX 2's, which
    has the layers of 0.9.5 and another padding."""
    levels, middle = _levels(shapes, "decoder.up"), _level(shapes, "decoder.mid_block")
    factors = [level.sampler[1] // max(level.width, 1) if level.sampler else 1 for level in levels]
    timed = "decoder.timestep_scale_multiplier" in shapes
    if not levels or any((factor != 1) != timed for factor, level in zip(factors, levels) if level.sampler):
        raise file.other_kind("a VAE like LTX-Video's", names["decoder.conv_in.conv.weight"], _WIDTH)
    parts, times = (middle, *levels)[::-1], sum(bool(level.sampler) for level in levels)
    patch = isqrt(shapes["decoder.conv_out.conv.weight"][0] // 3)
    return {
        "decoder_block_out_channels": tuple(level.width * factor for level, factor in zip(levels, factors))[::-1],
        "decoder_layers_per_block": tuple(part.layers for part in parts),
        "decoder_inject_noise": tuple(part.noisy for part in parts),
        "decoder_spatio_temporal_scaling": tuple(bool(level.sampler) for level in levels)[::-1],
        "upsample_factor": tuple(factors)[::-1],
        "upsample_residual": tuple(factor != 1 for factor in factors)[::-1],
        "timestep_conditioning": timed,
        "spatial_compression_ratio": patch * 2**times,
        "temporal_compression_ratio": 2**times,
    }


def _rename_of(shapes: Shapes) -> Rename:
    """diffusers' names of the authors' tensors, which have all blocks and samplers of a part in one list."""
    places: dict[tuple[str, int], str] = {}
    for way, part in (("encoder.down", "encoder"), ("decoder.up", "decoder")):
        kinds = _kinds(shapes, way)
        residual = [number for number, kind in enumerate(kinds) if kind == "resnets"]
        middle = (residual[-1] if part == "encoder" else residual[0]) if residual else -1
        for number, kind in enumerate(kinds):
            own = [place for place in residual if place != middle]
            before = sum(place <= number if part == "encoder" else place < number for place in own)
            level = f"{way}_blocks.{before - 1 if part == 'encoder' else before}."
            place = {
                "resnets": "",
                "sampler": f"{way[8:]}samplers.0.",
                "wider": "conv_out." if part == "encoder" else "conv_in.",
            }
            places[way, number] = f"{part}.mid_block." if number == middle else level + place[kind]

    def rename(name: str) -> str:
        found = _BLOCK.fullmatch(name)
        if found is not None and (found[1], int(found[2])) in places:
            name = places[found[1], int(found[2])] + found[3]
        renamed = _LAYERS(name) if places else name
        return _MEANS.get(renamed, renamed)

    return rename


def _kinds(shapes: Shapes, way: str) -> list[str]:
    """What each of the authors' blocks is; none where they are diffusers'."""
    kinds: list[str] = []
    if not any(name.startswith(f"{way}_blocks.0.res_blocks.") for name in shapes):
        return kinds
    while True:
        block = f"{way}_blocks.{len(kinds)}."
        if any(name.startswith(f"{block}res_blocks.") for name in shapes):
            kinds.append("resnets")
        elif any(name.startswith(f"{block}conv1.") for name in shapes):
            kinds.append("wider")
        elif any(name.startswith(f"{block}conv.") for name in shapes):
            kinds.append("sampler")
        else:
            return kinds
