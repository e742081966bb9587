"""Real networks of diffusers at reduced width, with an input each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers: Any = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")


def image(channels: int, *size: int) -> Tensor:
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(1))


def kl(channels: int) -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )


def tiny() -> nn.Module:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
    )


def vq() -> nn.Module:
    return diffusers.VQModel(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        num_vq_embeddings=32,
        lookup_from_codebook=False,
    )


def wan() -> nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]
    )


def qwen() -> nn.Module:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]
    )


def hunyuan() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )


def ltx() -> nn.Module:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(8, 16, 16, 16),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )


def mochi() -> nn.Module:
    return diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        latent_channels=4,
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )


def cosmos() -> nn.Module:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 16, 16, 16),
        decode_block_out_channels=(16, 16, 16, 16),
        attention_resolutions=(4,),
        resolution=32,
        num_layers=1,
        latents_mean=None,
        latents_std=None,
    )


def cogvideox() -> nn.Module:
    return diffusers.AutoencoderKLCogVideoX(
        latent_channels=4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=32,
        sample_width=32,
    )


def dc() -> nn.Module:
    return diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(16, 16, 32),
        decoder_block_out_channels=(16, 16, 32),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
    )


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def decode(model: Any, latent: Tensor) -> Tensor:
    return model.decode(latent, return_dict=False)[0]


def encode(model: Any, pixels: Tensor) -> Tensor:
    coded = model.encode(pixels, return_dict=False)[0]
    return coded if isinstance(coded, Tensor) else coded.mode()


def denoise(model: Any, latent: Tensor) -> Tensor:
    return model(latent, 500, torch.ones(1, 7, 16), return_dict=False)[0]


Run = Callable[[Any, Tensor], Tensor]
CASES: dict[str, tuple[Callable[[], nn.Module], Run, Tensor]] = {
    "kl decode": (lambda: kl(4), decode, image(4, 19, 16)),
    "kl encode": (lambda: kl(4), encode, image(3, 36, 32)),
    "kl 16 decode": (lambda: kl(16), decode, image(16, 19, 16)),
    "kl 16 encode": (lambda: kl(16), encode, image(3, 36, 32)),
    "tiny decode": (tiny, decode, image(4, 19, 16)),
    "tiny encode": (tiny, encode, image(3, 36, 32)),
    "vq decode": (vq, lambda model, latent: model.decode(latent, force_not_quantize=True).sample, image(3, 19, 16)),
    "vq encode": (vq, encode, image(3, 36, 32)),
    "wan decode": (wan, decode, image(16, 2, 7, 6)),
    "wan encode": (wan, encode, image(3, 5, 28, 24)),
    "qwen decode": (qwen, decode, image(16, 1, 11, 8)),
    "qwen encode": (qwen, encode, image(3, 1, 44, 32)),
    "hunyuan decode": (hunyuan, decode, image(4, 2, 5, 4)),
    "hunyuan encode": (hunyuan, encode, image(3, 5, 40, 32)),
    "ltx decode": (ltx, decode, image(8, 2, 3, 2)),
    "ltx encode": (ltx, encode, image(3, 9, 96, 64)),
    "mochi decode": (mochi, decode, image(4, 2, 5, 4)),
    "mochi encode": (mochi, encode, image(3, 7, 40, 32)),
    "cosmos decode": (cosmos, decode, image(4, 2, 5, 4)),
    "cosmos encode": (cosmos, encode, image(3, 9, 40, 32)),
    "cogvideox decode": (cogvideox, decode, image(4, 2, 5, 4)),
    "cogvideox encode": (cogvideox, encode, image(3, 5, 40, 32)),
    "dc decode": (dc, decode, image(8, 9, 8)),
    "dc encode": (dc, encode, image(3, 36, 32)),
    "unet": (unet, denoise, image(4, 22, 16)),
}


def draw_weights(model: nn.Module) -> nn.Module:
    """Seeded weights that keep every layer's output alive: some models start with layers of zeros."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            values /= max(parameter[0].numel(), 1) ** 0.5
        else:
            values = 0.1 * values + (0.0 if name.endswith("bias") else 1.0)
        parameter.data.copy_(values)
    return model.eval().requires_grad_(False)
