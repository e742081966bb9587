"""Architectures of `spandrel` that make an image of an image, small: few channels and blocks, random weights.

Left out are those that are refused: face restorers (GFPGAN, RestoreFormer) and inpainting (LaMa); AuraSR, which needs
noise and its authors' settings; and IPT, which takes one size and cuts tiles itself. Of KBNet and UpCunet one
variant stands for all.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

_SWIN = dict(img_size=32, embed_dim=24, depths=(2, 2), num_heads=(2, 2), upscale=2, upsampler="pixelshuffle")

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ATD.ATD": _SWIN | dict(window_size=8, category_size=32, num_tokens=16),
    "CRAFT.CRAFT": dict(embed_dim=24, depths=[2, 2], num_heads=[2, 2], upscale=2),
    "Compact.Compact": dict(num_feat=16, num_conv=4),
    "DAT.DAT": dict(img_size=32, embed_dim=24, split_size=[2, 4], depth=[2, 2], num_heads=[2, 2]),
    "DCTLSA.DCTLSA": dict(nf=20, num_head=2),
    "DITN.DITN": dict(dim=24, ITL_blocks=2, SAL_blocks=2, upscale=2),
    "DRCT.DRCT": _SWIN | dict(window_size=8, gc=8),
    "DRUNet.DRUNet": dict(in_nc=3, out_nc=3, nc=[8, 16, 24, 32], nb=1),
    "DnCNN.DnCNN": dict(in_nc=3, out_nc=3, nc=16, nb=5, act_mode="R"),
    "ESRGAN.ESRGAN": dict(num_filters=16, num_blocks=2),
    "FBCNN.FBCNN": dict(nc=[8, 16, 24, 512], nb=1),
    "FDAT.FDAT": dict(embed_dim=24, num_groups=1, depth_per_group=2, num_heads=2, mid_dim=16),
    "FFTformer.FFTformer": dict(dim=8, num_blocks=[1, 1, 1], num_refinement_blocks=1),
    "GRL.GRL": dict(
        img_size=32, embed_dim=24, upscale=2, upsampler="pixelshuffle", depths=[2, 2], num_heads_window=[2, 2],
        num_heads_stripe=[2, 2],
    ),
    "HAT.HAT": _SWIN | dict(window_size=8, num_feat=16, compress_ratio=3, squeeze_factor=6),
    "HVICIDNet.HVICIDNet": dict(channels=[8, 8, 16, 32], heads=[1, 2, 2, 4]),
    "KBNet.KBNet_s": dict(width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
    "MMRealSR.MMRealSR": dict(
        num_in_ch=3, num_out_ch=3, num_feat=16, num_block=2, num_grow_ch=8, num_feats=[8, 16, 24, 32],
        num_blocks=[1, 1, 1, 1],
    ),
    "MixDehazeNet.MixDehazeNet": dict(embed_dims=[8, 16, 24, 16, 8]),
    "MoESR.MoESR": dict(dim=16, n_blocks=1, n_block=2, upsample_dim=16),
    "MoSR.MoSR": dict(n_block=3, dim=16),
    "NAFNet.NAFNet": dict(width=8, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
    "OmniSR.OmniSR": dict(num_feat=16),
    "PLKSR.PLKSR": dict(dim=16, n_blocks=3),
    "PLKSR.RealPLKSR": dict(dim=16, n_blocks=3),
    "RCAN.RCAN": dict(n_resgroups=2, n_resblocks=2, n_feats=16, reduction=4),
    "RGT.RGT": dict(img_size=32, embed_dim=24, depth=[2, 2], num_heads=[2, 2]),
    "RealCUGAN.UpCunet2x": dict(),
    "RetinexFormer.RetinexFormer": dict(n_feat=8, stage=1),
    "SAFMN.SAFMN": dict(dim=16, n_blocks=2),
    "SAFMNBCIE.SAFMNBCIE": dict(dim=16, n_blocks=2, num_layers=1),
    "SCUNet.SCUNet": dict(config=[1, 1, 1, 1, 1, 1, 1], dim=64, input_resolution=64),
    "SPAN.SPAN": dict(num_in_ch=3, num_out_ch=3, feature_channels=16),
    "SeemoRe.SeemoRe": dict(num_experts=2, num_layers=2, embedding_dim=16),
    "SwiftSRGAN.SwiftSRGAN": dict(num_channels=16, num_blocks=2),
    "Swin2SR.Swin2SR": _SWIN | dict(window_size=8),
    "SwinIR.SwinIR": _SWIN | dict(window_size=8),
    "Uformer.Uformer": dict(img_size=64, embed_dim=8, depths=[1] * 9),
}  # fmt: skip
"""By module and class: what makes it small."""


FULL: dict[str, dict[str, Any]] = {
    "Compact.Compact": {},
    "DRUNet.DRUNet": dict(in_nc=3, out_nc=3),
    "DnCNN.DnCNN": dict(in_nc=3, out_nc=3, act_mode="R"),
    "MoSR.MoSR": {},
    "PLKSR.PLKSR": {},
    "SPAN.SPAN": dict(num_in_ch=3, num_out_ch=3),
}
"""Those of convolutions alone whose own widths a CPU computes in a minute: what else makes them as published."""


def made(name: str, full: bool = False) -> nn.Module:
    """One of them, with the random weights that it begins with, and noise where these are zero. full: as published."""
    torch.manual_seed(0)
    module, kind = name.split(".")
    settings = FULL[name] if full else ARCHITECTURES[name]
    model: nn.Module = getattr(import_module(f"spandrel.architectures.{module}"), kind)(**settings)
    for parameter in model.parameters():
        if parameter.dim() and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False).eval()


def first(result: Any) -> torch.Tensor:
    """The image among what a model returns."""
    return result[0] if isinstance(result, (tuple, list)) else result
