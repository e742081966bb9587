"""Small VAEs and the files they are stored in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

LEVELS = 4


def small_vae(
    channels: int = 4, quant_conv: bool = True, attention: bool = True, seed: int = 0, groups: int = 32
) -> AutoencoderKL:
    """An AutoencoderKL of the usual four levels, in widths of 32 and 64."""
    config: dict[str, Any] = {
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
        "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
        "layers_per_block": 1,
        "latent_channels": channels,
        "norm_num_groups": groups,
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
        "mid_block_add_attention": attention,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(**config)
    return vae.requires_grad_(False).eval()


def ldm_state(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The VAE's tensors as LDM's code names and shapes them."""
    return {ldm_name(name): _as_convolution(name, value) for name, value in vae.state_dict().items()}


def ldm_name(name: str) -> str:
    """What LDM's code calls the tensor that diffusers calls `name`."""
    parts = name.split(".")
    if parts[1] in ("down_blocks", "up_blocks"):
        down = parts[1] == "down_blocks"
        level = int(parts[2]) if down else LEVELS - 1 - int(parts[2])
        kinds = {"resnets": f"block.{parts[4]}", "downsamplers": "downsample", "upsamplers": "upsample"}
        parts[1:5] = ["down" if down else "up", str(level), kinds[parts[3]]]
    elif parts[1] == "mid_block" and parts[2] == "resnets":
        parts[1:4] = ["mid", f"block_{int(parts[3]) + 1}"]
    elif parts[1] == "mid_block":
        tensor = ".".join(parts[4:-1])
        names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        parts[1:-1] = ["mid", "attn_1", names[tensor]]
    names = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}
    return ".".join(names.get(part, part) for part in parts)


def _as_convolution(name: str, value: Tensor) -> Tensor:
    return value[:, :, None, None].contiguous() if ".to_" in name and value.dim() == 2 else value


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def write_vae(path: Path, **kwargs: Any) -> Path:
    """A file that holds `small_vae(**kwargs)` in diffusers layout."""
    return write(path, small_vae(**kwargs).state_dict())


def random_latent(channels: int = 4, batch: int = 1, height: int = 6, width: int = 5) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def assert_one_sentence(error: BaseException, path: Path) -> None:
    text = str(error)
    assert text.startswith(str(path))
    assert text.endswith((".", "?"))
    assert "\n" not in text
    assert len(text) < len(str(path)) + 300
