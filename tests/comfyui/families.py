"""Every autoencoder that `comfy.sd.VAE` can build: as people have it, and narrow enough to run in a test.

`comfy` is imported where one is built, so that the table can be read without a host.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Optional

import torch

Shape = tuple[int, ...]

_HOSTS_OBJECTS = ("operations", "latent_format")
"""Options whose value is the name of an object of the host's."""


@dataclass(frozen=True)
class Family:
    """One kind of autoencoder.

    what: what it is of, as people know it. path: of its class. dtype: the half that the host prefers for it, or
    float32. size: of what people make with it, in words; latent, pixels: of that, as decode and encode get it; None
    where it has no such half. options: of its class, as the host builds it. narrow: those that differ in a narrow one;
    small_latent, small_pixels: what that is run on. needs: a package beside the host's, without which it cannot encode,
    and where decodes_without is False, not decode either. gain: of its drawn weights: those of many residuals would end
    in values that are cut off.
    """

    name: str
    what: str
    path: str
    dtype: str
    size: str
    latent: Optional[Shape]
    pixels: Optional[Shape]
    options: dict[str, Any] = field(default_factory=dict)
    narrow: dict[str, Any] = field(default_factory=dict)
    small_latent: Optional[Shape] = None
    small_pixels: Optional[Shape] = None
    needs: str = ""
    decodes_without: bool = True
    gain: float = 1.0

    def shape(self, method: str, small: bool = False) -> Optional[Shape]:
        """What `method`, `"decode"` or `"encode"`, gets; None where there is no such half."""
        latent, pixels = (self.small_latent, self.small_pixels) if small else (self.latent, self.pixels)
        return latent if method == "decode" else pixels


KL = "comfy.ldm.models.autoencoder.AutoencoderKL"
ENGINE = "comfy.ldm.models.autoencoder.AutoencodingEngine"
LTX = "comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE"
LTX_CHUNK = 1 << 27
"""Bytes of a map from which LTX goes on in chunks of frames, on a device of 24 GB."""

LTX_SMALL_CHUNK = 1 << 20
"""The same of a narrow one, which small maps exceed."""

_IMAGE = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
_NARROW = {"ch": 32, "num_res_blocks": 1}
_WAN = {
    "dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
    "temperal_downsample": [False, True, True], "dropout": 0.0,
}  # fmt: skip
_HUNYUAN = {
    "block_out_channels": [128, 256, 512, 512, 1024, 1024], "in_channels": 3, "out_channels": 3, "num_res_blocks": 2,
    "ffactor_spatial": 32, "downsample_match_channel": True, "upsample_match_channel": True, "z_channels": 64,
}  # fmt: skip
_REFINER = _HUNYUAN | {
    "block_out_channels": [128, 256, 512, 1024, 1024], "ffactor_spatial": 16, "ffactor_temporal": 4, "z_channels": 32,
}  # fmt: skip
_HUNYUAN_NARROW = {"block_out_channels": [64, 128, 128], "num_res_blocks": 1, "ffactor_spatial": 4, "z_channels": 32}
_LTX_SOUND = {
    "double_z": True, "mel_bins": 64, "z_channels": 8, "resolution": 256, "downsample_time": False, "in_channels": 2,
    "out_ch": 2, "ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    "mid_block_add_attention": False, "norm_type": "pixel", "causality_axis": "height",
}  # fmt: skip


def _engine(regularizer: str, module: str, params: dict[str, Any], decoder: str = "", **of_decoder: Any) -> Any:
    """The options of an `AutoencodingEngine`, whose halves have their parameters alike."""
    return {
        "regularizer_config": {"target": f"comfy.ldm.models.autoencoder.{regularizer}Regularizer"},
        "encoder_config": {"target": f"comfy.ldm.{module}.Encoder", "params": params},
        "decoder_config": {"target": f"comfy.ldm.{decoder or f'{module}.Decoder'}", "params": params | of_decoder},
    }


def _ltx_sound(stft: int = 1024, **narrow: Any) -> dict[str, Any]:
    audio = {
        "model": {"params": {"ddconfig": _LTX_SOUND | narrow, "sampling_rate": 16000}},
        "preprocessing": {"stft": {"filter_length": stft, "hop_length": 160}},
    }
    vocoder = {"upsample_initial_channel": 64} if narrow else {}
    return {"metadata": {"config": {"audio_vae": audio, "vocoder": vocoder | {"output_sample_rate": 24000}}}}


_MODEL = "modules.diffusionmodules.model"
_VIDEO = {"decoder": "modules.temporal_ae.VideoDecoder", "video_kernel_size": [3, 1, 1], "alpha": 0.0}
_SA3 = {
    "channels": 128, "transformer_depths": 6, "sinusoidal_blocks": 0, "sliding_window": None,
    "decoder_conv_mapping": True, "chunk_size": 32, "chunk_midpoint_shift": True,
}  # fmt: skip
_SA3_LARGE = {
    "channels": 256, "transformer_depths": 12, "sinusoidal_blocks": 8, "sliding_window": [1, 1],
    "decoder_conv_mapping": False, "chunk_size": 128, "chunk_midpoint_shift": False,
}  # fmt: skip
_COSMOS = {
    "z_channels": 16, "latent_channels": 16, "z_factor": 1, "resolution": 1024, "in_channels": 3, "out_channels": 3,
    "channels": 128, "channels_mult": [2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [32], "dropout": 0.0,
    "patch_size": 4, "num_groups": 1, "temporal_compression": 8, "spacial_compression": 8,
}  # fmt: skip
_LTX_24 = {
    "encoder": {"base_channels": 32},
    "decoder": {"stage_channels": [256, 128, 128, 128, 64], "stage_depths": [1, 1, 1, 1, 1]},
}

FAMILIES = (
    Family(
        "Stable Diffusion 1.5, SDXL", "images", KL, "bfloat16", "1024²", (1, 4, 128, 128), (1, 3, 1024, 1024),
        {"ddconfig": _IMAGE, "embed_dim": 4}, {"ddconfig": _IMAGE | _NARROW},
        (1, 4, 8, 8), (1, 3, 64, 64),
    ),
    Family(
        "Stable Diffusion x4 upscaler", "images", KL, "bfloat16", "1024²", (1, 4, 256, 256), (1, 3, 1024, 1024),
        {"ddconfig": _IMAGE | {"ch_mult": [1, 2, 4]}, "embed_dim": 4},
        {"ddconfig": _IMAGE | _NARROW | {"ch_mult": [1, 2, 4]}},
        (1, 4, 16, 16), (1, 3, 64, 64),
    ),
    Family(
        "Stable Video Diffusion", "videos, frames as a batch", ENGINE, "bfloat16", "14 frames of 1024x576",
        (14, 4, 72, 128), (14, 3, 576, 1024), _engine("DiagonalGaussian", _MODEL, _IMAGE, **_VIDEO),
        _engine("DiagonalGaussian", _MODEL, _IMAGE | _NARROW, **_VIDEO), (3, 4, 8, 8), (3, 3, 64, 64),
    ),
    Family(
        "Flux, SD 3, Z-Image", "images", ENGINE, "bfloat16", "1024²", (1, 16, 128, 128), (1, 3, 1024, 1024),
        _engine("DiagonalGaussian", _MODEL, _IMAGE | {"z_channels": 16}),
        _engine("DiagonalGaussian", _MODEL, _IMAGE | _NARROW | {"z_channels": 16}),
        (1, 16, 8, 8), (1, 3, 64, 64),
    ),
    Family(
        "Flux.2", "images", KL, "bfloat16", "1024²", (1, 128, 64, 64), (1, 3, 1024, 1024),
        {"ddconfig": _IMAGE | {"z_channels": 32, "batch_norm_latent": True}, "embed_dim": 32},
        {"ddconfig": _IMAGE | _NARROW | {"z_channels": 32, "batch_norm_latent": True}},
        (1, 128, 4, 4), (1, 3, 64, 64),
    ),
    Family(
        "Stable Cascade, stage A", "images", "comfy.ldm.cascade.stage_a.StageA", "bfloat16", "1024²", (1, 4, 256, 256),
        (1, 3, 1024, 1024), {}, {}, (1, 4, 8, 8), (1, 3, 32, 32),
    ),
    Family(
        "Stable Cascade, stage C", "images", "comfy.ldm.cascade.stage_c_coder.StageC_coder", "bfloat16",
        "1024², and a preview of 24² latents", (1, 16, 24, 24), (1, 3, 1024, 1024), {}, {},
        (1, 16, 8, 8), (1, 3, 256, 256),
    ),
    Family(
        "HunyuanImage 2.1", "images", ENGINE, "float16", "2048²", (1, 64, 64, 64), (1, 3, 2048, 2048),
        _engine("DiagonalGaussian", "hunyuan_video.vae", _HUNYUAN),
        _engine("DiagonalGaussian", "hunyuan_video.vae", _HUNYUAN | _HUNYUAN_NARROW), (1, 32, 8, 8), (1, 3, 64, 64),
    ),
    Family(
        "HunyuanImage 2.1's refiner", "images", ENGINE, "float16", "2048²", (1, 32, 1, 128, 128), (1, 3, 1, 2048, 2048),
        _engine("DiagonalGaussian", "hunyuan_video.vae_refiner", _REFINER | {"refiner_vae": False}),
        _engine("DiagonalGaussian", "hunyuan_video.vae_refiner", _REFINER | _HUNYUAN_NARROW | {"refiner_vae": False}),
        (1, 32, 1, 8, 8), (1, 3, 1, 64, 64),
    ),
    Family(
        "Qwen-Image", "images", "comfy.ldm.wan.vae.WanVAE", "bfloat16", "1024²", (1, 16, 1, 128, 128),
        (1, 3, 1, 1024, 1024), _WAN | {"image_channels": 3, "conv_out_channels": 3},
        {"dim": 32, "num_res_blocks": 1}, (1, 16, 1, 8, 8), (1, 3, 1, 64, 64),
    ),
    Family(
        "Qwen-Image-Layered", "images with alpha", "comfy.ldm.wan.vae.WanVAE", "bfloat16", "1024², 4 layers",
        (1, 16, 5, 128, 128), (1, 4, 5, 1024, 1024), _WAN | {"image_channels": 4, "conv_out_channels": 4},
        {"dim": 32, "num_res_blocks": 1}, (1, 16, 2, 8, 8), (1, 4, 5, 64, 64),
    ),
    Family(
        "Qwen-Image 2.1", "images with alpha", "comfy.ldm.wan.vae2_2.WanVAE", "bfloat16", "1024²", (1, 64, 64, 64),
        (1, 4, 1024, 1024),
        _WAN | {
            "dec_dim": 96, "z_dim": 64, "dim_mult": [1, 2, 4, 8, 8], "temperal_downsample": [False, True, True, True],
            "image_channels": 4, "patch_size": 1, "temporal_kernel": 1,
        },
        {"dim": 16, "dec_dim": 16, "num_res_blocks": 1}, (1, 64, 8, 8), (1, 4, 128, 128),
    ),
    Family(
        "Mage-VAE", "images", "comfy.ldm.mage_flow.vae.MageVAE", "bfloat16", "1024²", (1, 128, 64, 64),
        (1, 3, 1024, 1024), {}, {}, (1, 128, 8, 8), (1, 3, 128, 128),
    ),
    Family(
        "TAESD", "images", "comfy.taesd.taesd.TAESD", "bfloat16", "1024²", (1, 4, 128, 128), (1, 3, 1024, 1024),
        {}, {}, (1, 4, 8, 8), (1, 3, 64, 64),
    ),
    Family(
        "TAESD of Flux.2", "images", "comfy.taesd.taesd.TAESD", "bfloat16", "1024²", (1, 128, 64, 64),
        (1, 3, 1024, 1024), {"latent_channels": 128}, {}, (1, 128, 4, 4), (1, 3, 64, 64),
    ),
    Family(
        "TAESD of Qwen-Image 2.1", "images with alpha", "comfy.taesd.taesd.TAESD", "bfloat16", "1024²", (1, 64, 64, 64),
        (1, 4, 1024, 1024), {"latent_channels": 64}, {}, (1, 64, 4, 4), (1, 4, 64, 64),
    ),
    Family(
        "Wan 2.1", "videos", "comfy.ldm.wan.vae.WanVAE", "bfloat16", "81 frames of 832x480", (1, 16, 21, 60, 104),
        (1, 3, 81, 480, 832), _WAN | {"image_channels": 3, "conv_out_channels": 3},
        {"dim": 32, "num_res_blocks": 1}, (1, 16, 2, 8, 8), (1, 3, 5, 64, 64),
    ),
    Family(
        "Wan 2.2", "videos", "comfy.ldm.wan.vae2_2.WanVAE", "bfloat16", "81 frames of 1280x704", (1, 48, 21, 44, 80),
        (1, 3, 81, 704, 1280), _WAN | {"dim": 160, "z_dim": 48}, {"dim": 32, "num_res_blocks": 1},
        (1, 48, 2, 8, 8), (1, 3, 5, 64, 64),
    ),
    Family(
        "HunyuanVideo", "videos", KL, "bfloat16", "73 frames of 832x480", (1, 16, 19, 60, 104), (1, 3, 73, 480, 832),
        {"ddconfig": _IMAGE | {"z_channels": 16, "conv3d": True, "time_compress": 4}, "embed_dim": 16},
        {"ddconfig": _IMAGE | _NARROW | {"z_channels": 16, "conv3d": True, "time_compress": 4}},
        (1, 16, 3, 8, 8), (1, 3, 9, 64, 64),
    ),
    Family(
        "HunyuanVideo 1.5", "videos", ENGINE, "float16", "121 frames of 832x480", (1, 32, 31, 30, 52),
        (1, 3, 121, 480, 832), _engine("Empty", "hunyuan_video.vae_refiner", _REFINER),
        _engine("Empty", "hunyuan_video.vae_refiner", _REFINER | _HUNYUAN_NARROW), (1, 32, 2, 8, 8), (1, 3, 5, 64, 64),
    ),
    Family(
        "Mochi", "videos", "comfy.ldm.genmo.vae.model.VideoVAE", "float16", "37 frames of 848x480",
        (1, 12, 7, 60, 106), (1, 3, 37, 480, 848), {}, {}, (1, 12, 2, 8, 8), (1, 3, 7, 64, 64),
    ),
    Family(
        "LTX-Video 0.9", "videos", LTX, "bfloat16", "97 frames of 768x512", (1, 128, 13, 16, 24), (1, 3, 97, 512, 768),
        {"version": 0}, {}, (1, 128, 2, 4, 4), (1, 3, 9, 128, 128),
    ),
    Family(
        "LTX-Video 0.9.1", "videos, with timesteps", LTX, "bfloat16", "97 frames of 768x512", (1, 128, 13, 16, 24),
        (1, 3, 97, 512, 768), {"version": 1}, {}, (1, 128, 2, 4, 4), (1, 3, 9, 128, 128),
    ),
    Family(
        "LTX-Video 0.9.5", "videos, with timesteps", LTX, "bfloat16", "97 frames of 768x512", (1, 128, 13, 16, 24),
        (1, 3, 97, 512, 768), {"version": 2}, {}, (1, 128, 2, 4, 4), (1, 3, 9, 128, 128),
    ),
    Family(
        "LTX 2.4", "videos, by neighbourhood attention",
        "comfy.ldm.lightricks.vae.na_diffusion_decoder.CausalDiffusionVAE", "bfloat16", "121 frames of 1280x704",
        (1, 128, 16, 22, 40), (1, 3, 121, 704, 1280), {}, {"config": _LTX_24}, (1, 128, 2, 4, 4), (1, 3, 9, 128, 128),
    ),
    Family(
        "CogVideoX", "videos", "comfy.ldm.cogvideo.vae.AutoencoderKLCogVideoX", "bfloat16", "49 frames of 720x480",
        (1, 16, 13, 60, 90), (1, 3, 49, 480, 720), {"latent_channels": 16}, {}, (1, 16, 2, 8, 8), (1, 3, 5, 64, 64),
    ),
    Family(
        "Cosmos", "videos", "comfy.ldm.cosmos.vae.CausalContinuousVideoTokenizer", "bfloat16", "121 frames of 1280x704",
        (1, 16, 16, 88, 160), (1, 3, 121, 704, 1280), _COSMOS, {"channels": 32, "num_res_blocks": 1},
        (1, 16, 2, 8, 8), (1, 3, 9, 64, 64),
    ),
    Family(
        "SeedVR2", "videos", "comfy.ldm.seedvr.vae.VideoAutoencoderKLWrapper", "float16", "21 frames of 1280x720",
        (1, 16, 6, 90, 160), (1, 3, 21, 720, 1280), {}, {}, (1, 16, 3, 8, 8), (1, 3, 9, 64, 64),
    ),
    Family(
        "MiniMax H3", "videos, in tiles of its own", "comfy.ldm.minimax.vae.MiniMaxH3VideoVAE", "float16",
        "56 frames of 768x448", (1, 24, 17, 28, 48), (1, 3, 56, 448, 768), {}, {}, (1, 24, 7, 4, 4), (1, 3, 22, 32, 32),
    ),
    Family(
        "TAEHV of Wan 2.1 and HunyuanVideo", "videos", "comfy.taesd.taehv.TAEHV", "bfloat16", "81 frames of 832x480",
        (1, 16, 21, 60, 104), (1, 3, 81, 480, 832), {"latent_channels": 16}, {}, (1, 16, 2, 8, 8), (1, 3, 8, 64, 64),
    ),
    Family(
        "TAEHV of Wan 2.2", "videos", "comfy.taesd.taehv.TAEHV", "bfloat16", "81 frames of 1280x704",
        (1, 48, 21, 44, 80), (1, 3, 81, 704, 1280), {"latent_channels": 48}, {}, (1, 48, 2, 8, 8), (1, 3, 8, 64, 64),
    ),
    Family(
        "Stable Audio's Oobleck", "sounds", "comfy.ldm.audio.autoencoder.AudioOobleckVAE", "float16", "3 minutes",
        (1, 64, 3876), (1, 2, 3876 * 2048), {}, {"channels": 16}, (1, 64, 40), (1, 2, 40 * 2048),
    ),
    Family(
        "ACE-Step 1.5's Oobleck", "sounds", "comfy.ldm.audio.autoencoder.AudioOobleckVAE", "float16", "3 minutes",
        (1, 64, 4500), (1, 2, 4500 * 1920), {"strides": [2, 4, 4, 6, 10]}, {"channels": 16},
        (1, 64, 40), (1, 2, 40 * 1920),
    ),
    Family(
        "YuE2's Oobleck", "sounds", "comfy.ldm.audio.autoencoder.AudioOobleckVAE", "float16", "3 minutes",
        (1, 64, 4500), (1, 2, 4500 * 1920),
        {"channels": 64, "c_mults": [1, 2, 4, 8, 16, 32], "strides": [2, 2, 4, 4, 5, 6], "sample_latent": False},
        {"channels": 8}, (1, 64, 40), (1, 2, 40 * 1920),
    ),
    Family(
        "Stable Audio 3, small", "sounds", "comfy.ldm.audio.vae_sa3.SA3AudioVAE", "bfloat16", "3 minutes",
        (1, 256, 1938), (1, 2, 1938 * 4096), _SA3, {"channels": 32, "transformer_depths": 2},
        (1, 256, 16), (1, 2, 16 * 4096),
    ),
    Family(
        "Stable Audio 3, large", "sounds", "comfy.ldm.audio.vae_sa3.SA3AudioVAE", "bfloat16", "3 minutes",
        (1, 256, 1938), (1, 2, 1938 * 4096), _SA3_LARGE,
        {"channels": 32, "transformer_depths": 2, "sinusoidal_blocks": 1}, (1, 256, 16), (1, 2, 16 * 4096),
    ),
    Family(
        "ACE-Step", "sounds, as spectrograms", "comfy.ldm.ace.vae.music_dcae_pipeline.MusicDCAE", "bfloat16",
        "3 minutes", (1, 8, 16, 1938), (1, 2, 1938 * 4096), {"source_sample_rate": 44100},
        {
            "dcae_config": {"encoder_block_out_channels": [32, 64, 64, 128],
                            "decoder_block_out_channels": [32, 64, 64, 128]},
            "vocoder_config": {"dims": [32, 32, 48, 64], "num_mels": 64, "upsample_initial_channel": 128},
        },
        (1, 8, 16, 24), (1, 2, 24 * 4096), needs="torchaudio", decodes_without=False,
    ),
    Family(
        "LTX audio", "sounds, as spectrograms", "comfy.ldm.lightricks.vae.audio_vae.AudioVAE", "float32", "3 minutes",
        (1, 8, 4500, 16), (1, 2, 180 * 16000), _ltx_sound(), _ltx_sound(ch=32, num_res_blocks=1),
        (1, 8, 40, 16), (1, 2, 2 * 16000), needs="torchaudio",
    ),
    Family(
        "MMAudio", "sounds, as spectrograms", "comfy.ldm.mmaudio.vae.autoencoder.AudioAutoencoder", "float32",
        "3 minutes", (1, 20, 5625), (1, 2, 180 * 44100), {"mode": "16k"}, {}, (1, 20, 40), (1, 2, 44100),
        needs="torchaudio", decodes_without=False, gain=0.5,
    ),
    Family(
        "MiniMax H3 audio", "sounds", "comfy.ldm.minimax.audio_vae.MiniMaxH3AudioVAE", "float32", "3 minutes",
        (1, 32, 2, 7200), (1, 2, 180 * 32000), {},
        {"encoder_dim": 8, "latent_dim": 64, "decoder_dim": 128}, (1, 32, 2, 40), (1, 2, 32000), gain=0.5,
    ),
    Family(
        "MiniMax Music 3", "sounds", "comfy.ldm.minimax_music.dav.MiniMaxMusic3DAV", "float32", "3 minutes",
        (1, 128, 15504), None, {"operations": "comfy.ops.disable_weight_init"}, {}, (1, 128, 24), None,
    ),
)  # fmt: skip

WITHOUT_MAPS = {
    "Pixel space": "comfy.pixel_space_convert.PixelspaceConversionVAE",
    "Hunyuan3D": "comfy.ldm.hunyuan3d.vae.ShapeVAE",
    "Trellis 2, shapes": "comfy.ldm.trellis2.vae.ShapeVae",
    "Trellis 2, textures": "comfy.ldm.trellis2.vae.TextureVae",
    "TripoSplat": "comfy.ldm.triposplat.vae.OctreeGaussianDecoder",
}
"""What `comfy.sd.VAE` builds too, whose decode has no maps: it gives back what it is given, or makes bodies of points,
through nodes of its own."""


class NotHereError(Exception):
    """This ComfyUI, or what stands beside it, has no such autoencoder."""


def family_of(name: str) -> Family:
    return next(one for one in FAMILIES if one.name == name)


def is_there(package: str) -> bool:
    """Whether a package, and not what stands in its place, can be imported."""
    return hasattr(importlib.import_module(package), "__file__")


def build(family: Family, narrow: bool = False, device: str = "meta") -> torch.nn.Module:
    """One of ComfyUI's, without weights. Raises NotHereError."""
    options = {**family.options, **(family.narrow if narrow else {})}
    try:
        for name in _HOSTS_OBJECTS:
            if isinstance(options.get(name), str):
                options[name] = _named(options[name])
        kind: Any = _named(family.path)
        if family.needs and not family.decodes_without and not is_there(family.needs):
            raise ImportError(f"{family.needs} is not installed")
        module: Any = importlib.import_module(LTX.rpartition(".")[0])
        if hasattr(module, "get_max_chunk_size"):  # it asks the device
            module.get_max_chunk_size = lambda device: LTX_SMALL_CHUNK if narrow else LTX_CHUNK
        with torch.device("cpu" if family.name in _COMPUTING else device):
            model = kind(**options)
            if narrow and family.name == "MiniMax H3":
                vit = _named("comfy.ldm.minimax.vae.ViT3DDecoder")
                model.decoder = vit(patch_size=16, patch_size_t=4, in_channels=24, num_layers=2, heads=2)
    except (ImportError, AttributeError, TypeError) as error:
        raise NotHereError(f"{family.name}: {error}") from error
    if family.name == "TAESD of Qwen-Image 2.1" and not isinstance(model.taesd_decoder[-1], torch.nn.PixelShuffle):
        raise NotHereError(f"{family.name}: this TAESD makes 3 channels of 8 times the latent's size")
    return model.eval()


def halves(family: Family) -> list[str]:
    """`"decode"`, `"encode"` or both: the halves that it has, and that what is installed can run."""
    there = [method for method in ("decode", "encode") if family.shape(method) is not None]
    return there if not family.needs or is_there(family.needs) else there[:1]


_COMPUTING = ("Cosmos", "ACE-Step", "LTX audio", "MMAudio")
"""What looks at values when it is built: wavelets, filters of a spectrogram."""


def _named(path: str) -> Any:
    """An object of the host's by its dotted name."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        owner, _, kind = module.rpartition(".")
        return getattr(getattr(importlib.import_module(owner), kind), name)


def draw(model: torch.nn.Module, gain: float = 1.0) -> None:
    """Seeded values for all that a checkpoint has, such that every layer's output stays alive. gain: see `Family`."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        drawn = torch.randn(value.shape, generator=generator)
        drawn *= gain / max(drawn[0].numel(), 1) ** 0.5 if value.dim() > 1 else 0.1
        usual = -2.0 if name.endswith("alpha") else 0.0 if name.endswith("bias") else 1.0  # slow waves in a snake
        value.copy_(drawn + (usual if value.dim() == 1 else 0.0))


def result_of(model: Any, method: str, input: torch.Tensor) -> torch.Tensor:
    """What a VAE makes of `input`, in a tensor of ours where the host would give it one; the noise it adds is the same
    each time."""
    torch.manual_seed(0)
    if method == "decode" and getattr(model, "comfy_has_chunked_io", False):
        buffer = torch.zeros(model.decode_output_shape(input.shape))
        model.decode(input.clone(), output_buffer=buffer)
        return buffer
    return tensor(getattr(model, method)(input.clone()))


def tensor(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]
