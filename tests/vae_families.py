"""Small VAEs of each family that files are recognised as, and the names that their authors, and ComfyUI, give them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model_zoo import draw_weights
from torch import Tensor, nn

diffusers: Any = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """make: a VAE with drawn weights. authors: its tensors as its authors have them; None where that is diffusers'.
    shape: of a latent. name: of the file."""

    make: Callable[[], Any]
    authors: Callable[[State], State] | None
    shape: tuple[int, ...]
    name: str = "vae.safetensors"


def drawn(model: Any) -> Any:
    """`model` with weights, and statistics, that keep every layer alive."""
    draw_weights(model)
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return model


def of_class(name: str, **config: Any) -> Callable[[], Any]:
    """Makes a VAE of a class of diffusers, which skips where it is too old for that."""

    def make() -> nn.Module:
        kind = getattr(diffusers, name, None)
        if kind is None:
            pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
        return drawn(kind(**config))

    return make


def paella() -> Any:
    try:
        from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    except ImportError:
        from diffusers.pipelines.wuerstchen.modeling_paella_vq_model import (  # pyright: ignore[reportMissingImports]
            PaellaVQModel,
        )
    model = PaellaVQModel(embed_dim=32, bottleneck_blocks=2, num_vq_embeddings=16)
    return drawn(model)


# TAESD: the authors count a layer without weights before the decoder's first.


def taesd_names(state: State) -> State:
    """As ComfyUI joins the authors' two files."""

    def renamed(name: str) -> str:
        part, _, number, rest = name.split(".", 3)
        return f"taesd_{part}.{int(number) + (part == 'decoder')}.{rest}"

    return {renamed(name): value for name, value in state.items()}


# Wan: all blocks of the decoder in one list (2.1), or a list in each level (2.2)

_WAN = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv1\.", ".residual.2."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.norm1\.", ".residual.0."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
)


def substituted(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def wan_names(state: State) -> State:
    """As the authors of Wan 2.1 have them, with one residual block to a level, so two in the decoder."""

    def flat(found: re.Match[str]) -> str:
        return f"decoder.upsamples.{3 * int(found[1]) + (2 if found[2] is None else int(found[2]))}."

    def renamed(name: str) -> str:
        name = re.sub(r"^decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.", flat, name)
        return substituted(name, _WAN).replace("encoder.down_blocks.", "encoder.downsamples.")

    return {renamed(name): value for name, value in state.items()}


def wan_2_2_names(state: State) -> State:
    """As the authors of Wan 2.2 have them, with one residual block to a level, so two in the decoder."""
    rules = (
        (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.downsamples.\1.downsamples.\2."),
        (r"^encoder\.down_blocks\.(\d+)\.downsampler\.", r"encoder.downsamples.\1.downsamples.1."),
        (r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r"decoder.upsamples.\1.upsamples.\2."),
        (r"^decoder\.up_blocks\.(\d+)\.upsampler\.", r"decoder.upsamples.\1.upsamples.2."),
    )
    return {substituted(substituted(name, rules), _WAN): value for name, value in state.items()}


# DC-AE


def dc_names(state: State) -> State:
    """As the authors have them, of a decoder without running statistics; attention's weights are one convolution."""
    rules = (
        (r"^(en|de)coder\.(down|up)_blocks\.(\d+)\.(\d+)\.", r"\1coder.stages.\3.op_list.\4."),
        (r"^(en|de)coder\.conv_in\.", r"\1coder.project_in.conv."),
        (r"^encoder\.conv_out\.", "encoder.project_out.0.conv."),
        (r"^decoder\.norm_out\.", "decoder.project_out.0."),
        (r"^decoder\.conv_out\.", "decoder.project_out.2.conv."),
        (r"(op_list\.\d+)\.conv1\.", r"\1.main.conv1.conv."),
        (r"(op_list\.\d+)\.conv2\.", r"\1.main.conv2.conv."),
        (r"(op_list\.\d+)\.norm\.", r"\1.main.conv2.norm."),
        (r"(op_list\.\d+)\.conv\.", r"\1.main.conv.conv."),
        (r"\.attn\.to_qkv_multiscale\.0\.proj_in\.", ".context_module.main.aggreg.0.0."),
        (r"\.attn\.to_qkv_multiscale\.0\.proj_out\.", ".context_module.main.aggreg.0.1."),
        (r"\.attn\.to_out\.", ".context_module.main.proj.conv."),
        (r"\.attn\.norm_out\.", ".context_module.main.proj.norm."),
        (r"\.conv_out\.conv_inverted\.", ".local_module.main.inverted_conv.conv."),
        (r"\.conv_out\.conv_depth\.", ".local_module.main.depth_conv.conv."),
        (r"\.conv_out\.conv_point\.", ".local_module.main.point_conv.conv."),
        (r"\.conv_out\.norm\.", ".local_module.main.point_conv.norm."),
    )
    found: State = {}
    for name, value in state.items():
        if ".attn.to_q." in name:
            parts = [state[name.replace("to_q", other)] for other in ("to_q", "to_k", "to_v")]
            theirs = substituted(name, rules).replace(".attn.to_q.", ".context_module.main.qkv.conv.")
            found[theirs] = torch.cat(parts)[:, :, None, None]
        elif ".attn.to_k." not in name and ".attn.to_v." not in name:
            found[substituted(name, rules)] = value[:, :, None, None] if ".attn.to_out." in name else value
    return found


# HunyuanImage: LDM's names


def hunyuan_names(state: State) -> State:
    """As the authors have them, with one residual block to a level, so two in the decoder."""
    rules = (
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
        (r"\.mid_block\.attentions\.0\.proj\.", ".mid.attn_1.proj_out."),
        (r"\.mid_block\.attentions\.0\.norm\.", ".mid.attn_1.norm."),
    )

    def nested(found: re.Match[str]) -> str:
        part, way, number = found[1], found[2], int(found[3])
        level, block = divmod(number, 2 if way == "down" else 3)
        sampler = block == (1 if way == "down" else 2)
        return f"{part}.{way}.{level}.{f'{way}sample' if sampler else f'block.{block}'}."

    def renamed(name: str) -> str:
        return substituted(re.sub(r"^(encoder|decoder)\.(down|up)_blocks\.(\d+)\.", nested, name), rules)

    return {renamed(name): value for name, value in state.items()}


# HunyuanVideo: LDM's names


def hunyuan_video_names(state: State) -> State:
    """As the authors have them, with three levels; attention's weights are convolutions."""
    rules = (
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
        (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
        (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
        (r"\.(down|up)_blocks\.(\d)\.resnets\.", r".\1.\2.block."),
        (r"\.(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.", r".\1.\2.\1sample."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
    )

    def renamed(name: str) -> str:
        return re.sub(r"\.up\.(\d)\.", lambda level: f".up.{2 - int(level[1])}.", substituted(name, rules))

    return {
        renamed(name): value[:, :, None, None, None] if ".to_" in name and value.dim() == 2 else value
        for name, value in state.items()
    }


# Mochi: what changes sizes is one of the blocks beside it


def mochi_names(state: State) -> State:
    """As the authors have them, of two levels with one block each."""
    rules = (
        (r"^encoder\.proj_in\.", "encoder.layers.0."),
        (r"^encoder\.block_in\.(resnets|norms|attentions)\.0\.", r"encoder.layers.1.\1."),
        (r"^encoder\.down_blocks\.0\.conv_in\.conv\.", "encoder.layers.2.layers.0."),
        (r"^encoder\.down_blocks\.0\.(resnets|norms|attentions)\.0\.", r"encoder.layers.2.layers.1.\1."),
        (r"^encoder\.down_blocks\.1\.conv_in\.conv\.", "encoder.layers.3.layers.0."),
        (r"^encoder\.down_blocks\.1\.(resnets|norms|attentions)\.0\.", r"encoder.layers.3.layers.1.\1."),
        (r"^encoder\.block_out\.(resnets|norms|attentions)\.0\.", r"encoder.layers.4.\1."),
        (r"^encoder\.norm_out\.norm_layer\.", "encoder.output_norm."),
        (r"^(encoder|decoder)\.proj_out\.", r"\1.output_proj."),
        (r"^decoder\.conv_in\.", "decoder.blocks.0.0."),
        (r"^decoder\.block_in\.resnets\.0\.", "decoder.blocks.0.1.resnets."),
        (r"^decoder\.up_blocks\.0\.resnets\.0\.", "decoder.blocks.1.blocks.0.resnets."),
        (r"^decoder\.up_blocks\.1\.resnets\.0\.", "decoder.blocks.2.blocks.0.resnets."),
        (r"^decoder\.up_blocks\.0\.proj\.", "decoder.blocks.1.proj."),
        (r"^decoder\.up_blocks\.1\.proj\.", "decoder.blocks.2.proj."),
        (r"^decoder\.block_out\.resnets\.0\.", "decoder.blocks.3.0.resnets."),
        (r"\.resnets\.norm1\.norm_layer\.", ".stack.0."),
        (r"\.resnets\.conv1\.conv\.", ".stack.2."),
        (r"\.resnets\.norm2\.norm_layer\.", ".stack.3."),
        (r"\.resnets\.conv2\.conv\.", ".stack.5."),
        (r"\.norms\.norm_layer\.", ".attn_block.norm."),
        (r"\.attentions\.to_out\.0\.", ".attn_block.attn.out."),
        (r"\.attentions\.to_q\.", ".attn_block.attn.qkv."),
    )
    found: State = {}
    for name, value in state.items():
        if ".to_q." in name:
            value = torch.cat([state[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"])
        if ".to_k." not in name and ".to_v." not in name:
            found[substituted(name, rules)] = value
    return found


# LTX-Video: all blocks and samplers of a part in one list, each at its place here


def ltx_names(encoder: tuple[str, ...], decoder: tuple[str, ...]) -> Callable[[State], State]:
    """As the authors have them. encoder, decoder: diffusers' names of the lists' elements, in the authors' order."""
    layers = (
        (r"\.resnets\.", ".res_blocks."),
        (r"\.conv_shortcut\.conv\.", ".conv_shortcut."),
        (r"\.norm3\.", ".norm3.norm."),
        (r"^decoder\.(time_embedder|scale_shift_table)", r"decoder.last_\1"),
        (r"^latents_mean$", "per_channel_statistics.mean-of-means"),
        (r"^latents_std$", "per_channel_statistics.std-of-means"),
    )

    def renamed(name: str) -> str:
        for part, way, blocks in (("encoder", "down", encoder), ("decoder", "up", decoder)):
            own = [block for block in blocks if name.startswith(f"{part}.{block}.")]
            if own:
                block = max(own, key=len)
                name = f"{part}.{way}_blocks.{blocks.index(block)}.{name[len(f'{part}.{block}.') :]}"
                break
        return substituted(name, layers)

    return lambda state: {renamed(name): value for name, value in state.items()}


def ltx(**config: Any) -> Callable[[], Any]:
    """Makes an LTX-Video with statistics of its latents."""

    def make() -> nn.Module:
        model = of_class("AutoencoderKLLTXVideo", latent_channels=16, patch_size=2, **config)()
        generator = torch.Generator().manual_seed(3)
        model.latents_mean.normal_(0, 0.2, generator=generator)
        model.latents_std.uniform_(0.5, 2, generator=generator)
        return model

    return make


_LTX_OLD_ENCODER: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": (2, 1, 1),
    "spatio_temporal_scaling": (True, False),
    "down_block_types": ("LTXVideoDownBlock3D",) * 2,
}

_LTX_TIMED_DECODER: dict[str, Any] = {
    "decoder_block_out_channels": (32, 64),
    "decoder_layers_per_block": (1, 2, 1),
    "decoder_spatio_temporal_scaling": (True, True),
    "upsample_residual": (True, True),
    "upsample_factor": (2, 2),
    "timestep_conditioning": True,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
}

_LTX_OLD = ("down_blocks.0", "down_blocks.0.downsamplers.0", "down_blocks.0.conv_out", "down_blocks.1", "mid_block")

_LTX_TIMED = ("mid_block", "up_blocks.0.upsamplers.0", "up_blocks.0", "up_blocks.1.upsamplers.0", "up_blocks.1")


# Stage A


def stage_a_names(state: State) -> State:
    return {name.replace("vquantizer.embedding.", "vquantizer.codebook."): value for name, value in state.items()}


# Oobleck


def oobleck_names(state: State, norm: str = "old") -> State:
    """As the authors have them, of two blocks. norm: whose weight norm, torch's of before or since 2.0."""
    unit = {"snake1": 0, "conv1": 1, "snake2": 2, "conv2": 3}
    encoder = {"res_unit1": 0, "res_unit2": 1, "res_unit3": 2, "snake1": 3, "conv1": 4}
    decoder = {"snake1": 0, "conv_t1": 1, "res_unit1": 2, "res_unit2": 3, "res_unit3": 4}
    outer = {"conv1": 0, "snake1": 3, "conv2": 4}
    found: State = {}
    for name, value in state.items():
        part, *layers, last = name.split(".")
        if layers[0] == "block":
            inner = (encoder if part == "encoder" else decoder)[layers[2]]
            numbers = [int(layers[1]) + 1, inner, *(unit[layer] for layer in layers[3:])]
        else:
            numbers = [outer[layers[0]]]
        if norm == "new":
            last = {
                "weight_g": "parametrizations.weight.original0",
                "weight_v": "parametrizations.weight.original1",
            }.get(last, last)
        theirs = ".".join([part, *(f"layers.{number}" for number in numbers), last])
        found[theirs] = value.flatten() if last in ("alpha", "beta") else value
    return found


_DC = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (16, 16, 32),
    "decoder_block_out_channels": (16, 16, 32),
    "encoder_layers_per_block": (1, 2, 1),
    "decoder_layers_per_block": (2, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
}

_DC_EMPTY = {
    **_DC,
    "attention_head_dim": 32,
    "encoder_layers_per_block": (0, 1, 1),
    "decoder_layers_per_block": (0, 1, 1),
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), ()),
}

_WAN_CONFIG: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
}

_TINY = {
    "encoder_block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "num_encoder_blocks": (1, 2, 1, 1),
    "num_decoder_blocks": (2, 1, 1, 1),
}

IMAGES: dict[str, Case] = {
    "TAESD": Case(of_class("AutoencoderTiny", **_TINY), taesd_names, (1, 4, 9, 7), "taesd.safetensors"),
    "TAEF1": Case(
        of_class("AutoencoderTiny", **_TINY, latent_channels=16), taesd_names, (1, 16, 9, 7), "taef1.safetensors"
    ),
    "Wan 2.1": Case(of_class("AutoencoderKLWan", **_WAN_CONFIG), wan_names, (1, 16, 9, 7)),
    "Wan 2.2": Case(
        of_class(
            "AutoencoderKLWan",
            **_WAN_CONFIG,
            decoder_base_dim=16,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
        ),
        wan_2_2_names,
        (1, 16, 9, 7),
    ),
    "Qwen-Image": Case(of_class("AutoencoderKLQwenImage", **_WAN_CONFIG), wan_names, (1, 16, 9, 7)),
    "DC-AE, Sana's": Case(
        of_class("AutoencoderDC", **_DC, downsample_block_type="Conv", upsample_block_type="interpolate"),
        dc_names,
        (1, 8, 9, 8),
    ),
    "DC-AE, by pixels": Case(of_class("AutoencoderDC", **_DC), dc_names, (1, 8, 9, 8)),
    "DC-AE, empty level": Case(
        of_class(
            "AutoencoderDC",
            **_DC_EMPTY,
            decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"),
            decoder_act_fns=("relu", "relu", "silu"),
        ),
        dc_names,
        (1, 8, 9, 8),
    ),
    "DC-AE Lite": Case(
        of_class(
            "AutoencoderDC",
            **{**_DC_EMPTY, **{name: value for name, value in _DC.items() if name.startswith(("enc", "att"))}},
            downsample_block_type="Conv",
            decoder_conv_act_fn="silu",
        ),
        None,
        (1, 8, 9, 8),
    ),
    "HunyuanImage": Case(
        of_class(
            "AutoencoderKLHunyuanImage",
            in_channels=3,
            out_channels=3,
            latent_channels=16,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=64,
        ),
        hunyuan_names,
        (1, 16, 9, 7),
    ),
    "HunyuanVideo": Case(
        of_class(
            "AutoencoderKLHunyuanVideo",
            block_out_channels=(32, 32, 64),
            down_block_types=("HunyuanVideoDownBlock3D",) * 3,
            up_block_types=("HunyuanVideoUpBlock3D",) * 3,
            layers_per_block=1,
            spatial_compression_ratio=4,
        ),
        hunyuan_video_names,
        (1, 16, 9, 7),
    ),
    "CogVideoX": Case(
        of_class(
            "AutoencoderKLCogVideoX",
            block_out_channels=(32, 32, 64),
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            layers_per_block=1,
        ),
        None,
        (1, 16, 9, 7),
    ),
    "LTX-Video 0.9": Case(
        ltx(
            **_LTX_OLD_ENCODER,
            decoder_block_out_channels=(16, 32),
            decoder_layers_per_block=(1, 2, 1),
            decoder_spatio_temporal_scaling=(True, False),
            decoder_inject_noise=(False,) * 3,
            upsample_residual=(False,) * 2,
            upsample_factor=(1, 1),
        ),
        ltx_names(
            _LTX_OLD, ("mid_block", "up_blocks.0", "up_blocks.1.conv_in", "up_blocks.1.upsamplers.0", "up_blocks.1")
        ),
        (1, 16, 9, 7),
    ),
    "LTX-Video 0.9.1": Case(
        ltx(
            **_LTX_OLD_ENCODER | {"spatio_temporal_scaling": (True, True)},
            **_LTX_TIMED_DECODER,
            decoder_inject_noise=(True, True, False),
        ),
        ltx_names((*_LTX_OLD[:4], "down_blocks.1.downsamplers.0", "mid_block"), _LTX_TIMED),
        (1, 16, 9, 7),
    ),
    "LTX-Video 0.9.5": Case(
        ltx(
            block_out_channels=(16, 32, 32, 64),
            layers_per_block=(2, 1, 1, 1),
            spatio_temporal_scaling=(True, True, True),
            downsample_type=("spatial", "temporal", "spatiotemporal"),
            down_block_types=("LTXVideo095DownBlock3D",) * 3,
            **_LTX_TIMED_DECODER,
            decoder_inject_noise=(False,) * 3,
        ),
        ltx_names(
            (*(f"down_blocks.{level}{own}" for level in range(3) for own in ("", ".downsamplers.0")), "mid_block"),
            _LTX_TIMED,
        ),
        (1, 16, 9, 7),
    ),
    "Mochi": Case(
        of_class(
            "AutoencoderKLMochi",
            encoder_block_out_channels=(32, 64, 64),
            decoder_block_out_channels=(32, 64, 64),
            layers_per_block=(1, 1, 1, 1),
            temporal_expansions=(2, 3),
            spatial_expansions=(2, 2),
            add_attention_block=(False, True, True, True),
        ),
        mochi_names,
        (1, 12, 9, 7),
    ),
    "Stage A": Case(paella, stage_a_names, (1, 4, 9, 7)),
}

SOUNDS: dict[str, Case] = {
    "Oobleck": Case(
        of_class(
            "AutoencoderOobleck",
            encoder_hidden_size=16,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=8,
            decoder_input_channels=8,
        ),
        oobleck_names,
        (1, 8, 40),
    ),
}

LTX = ("LTX-Video 0.9", "LTX-Video 0.9.1", "LTX-Video 0.9.5")

VIDEOS = ("Wan 2.1", "Wan 2.2", "Qwen-Image", "HunyuanVideo", "CogVideoX", "Mochi", *LTX)
"""Those of `IMAGES` that make videos too."""

ALL = {**IMAGES, **SOUNDS}
