"""Partial Conv: encodes an image with a hole, or fills the hole, without what lies in it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from comfy import model_management  # pyright: ignore[reportMissingImports]
from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.nn import functional as F

from ..comfyui_patchconv import Tiling, convolutions
from ..comfyui_patchconv.conv.fill import fill
from ..comfyui_patchconv.conv.holes import with_holes
from ..comfyui_patchconv.hosts.halves import half_of
from .checked import checked
from .host import FILL_CATEGORY, LATENT_CATEGORY, schema
from .progress import Progress
from .vae_half import leave


class VAEEncodePartialConv(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            node_id="PatchConv_PartialVAEEncode",
            display_name="VAE Encode (Partial Conv)",
            category=LATENT_CATEGORY,
            description=(
                "Encodes an image for inpainting as if the masked pixels were not there: nothing of them, and no grey "
                "in their place, gets into the latent around the mask."
            ),
            search_aliases=["inpaint encode", "vae encode for inpainting", "partial convolution", "patchconv"],
            inputs=[
                io.Image.Input("pixels", tooltip="The image to encode."),
                io.Vae.Input("vae", tooltip="The VAE to encode with. It is not changed."),
                io.Mask.Input("mask", tooltip="White is what does not count and is to be sampled anew."),
                io.Int.Input(
                    "grow_mask_by",
                    default=6,
                    min=0,
                    max=64,
                    step=1,
                    tooltip="Pixels by which the noise mask is wider than the mask, so that the sampler can blend, as "
                    "in VAE Encode (for Inpainting). The encoder uses the mask as it is.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The latent, with the mask as its noise mask.")],
        )

    @classmethod
    @checked
    def execute(cls, pixels: Tensor, vae: Any, mask: Tensor, grow_mask_by: int) -> io.NodeOutput:
        vae.throw_exception_if_invalid()
        if vae.latent_dim not in (2, 3):
            raise ValueError("This VAE does not encode images: connect one that does.")
        pixels, mask = _cropped(pixels, _like(mask, pixels).round(), vae.spacial_compression_encode())
        return io.NodeOutput({"samples": _encoded(vae, pixels, 1 - mask), "noise_mask": _grown(mask, grow_mask_by)})


class FillMaskedArea(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            node_id="PatchConv_FillMaskedArea",
            display_name="Fill Masked Area (Partial Conv)",
            category=FILL_CATEGORY,
            description=(
                "Fills the masked area smoothly from its border inwards, whatever its size: a start for inpainting "
                "with denoise below 1, and for outpainting."
            ),
            search_aliases=["inpaint prefill", "outpaint", "infill", "telea", "blur masked", "patchconv"],
            inputs=[
                io.Image.Input("image", tooltip="The image with the area to fill."),
                io.Mask.Input("mask", tooltip="White is filled. Grey is blended with what is there."),
                io.Boolean.Input(
                    "edge_aware",
                    default=False,
                    tooltip="Let edges that lead into the area go on in it, instead of melting away.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The image with the area filled.")],
        )

    @classmethod
    @checked
    def execute(cls, image: Tensor, mask: Tensor, edge_aware: bool) -> io.NodeOutput:
        mask = _like(mask, image).clamp(0, 1)
        device = model_management.get_torch_device()
        filled = torch.empty_like(image)
        for number, (one, hole) in enumerate(zip(image, mask)):
            model_management.throw_exception_if_processing_interrupted()
            whole = one.movedim(-1, 0)[None].to(device)
            hole = hole[None, None].to(device)
            found = torch.lerp(whole, fill(whole, hole == 0, edge_aware), hole)
            filled[number] = found[0].movedim(0, -1)
        return io.NodeOutput(filled)


def _like(mask: Tensor, image: Tensor) -> Tensor:
    """Fit a mask `[H, W]` or `[N, H, W]` to images `[N, H, W, C]`, as `[N, H, W]`: resized and repeated as the host
    does for inpainting."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(image.device, image.dtype)
    mask = F.interpolate(mask, size=image.shape[1:3], mode="bilinear")[:, 0]
    return mask[torch.arange(len(image), device=mask.device) % len(mask)]


def _cropped(pixels: Tensor, mask: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Crop both to the middle, to sides that the VAE can encode, as the host's VAE does. Raises ValueError where
    nothing is left."""
    height, width = pixels.shape[1:3]
    if min(height, width) < multiple:
        raise ValueError(
            f"The image is {width} x {height} pixels, and this VAE encodes from {multiple} x {multiple} on."
        )
    for dim in (1, 2):
        size = pixels.shape[dim] // multiple * multiple
        start = pixels.shape[dim] % multiple // 2
        pixels, mask = pixels.narrow(dim, start, size), mask.narrow(dim, start, size)
    return pixels, mask


def _grown(mask: Tensor, pixels: int) -> Tensor:
    """Grow a mask `[N, H, W]` by `pixels` to a noise mask `[N, 1, H, W]`, to either side as the host does."""
    kernel = max(pixels, 1)
    return F.max_pool2d(mask[:, None], kernel, 1, kernel // 2)[..., : mask.shape[-2], : mask.shape[-1]]


def _encoded(vae: Any, pixels: Tensor, valid: Tensor) -> Tensor:
    """Encode images `[N, H, W, C]` with a mask `[N, H, W]` each, 1 where valid. A video has one mask: what any frame's
    covers."""
    if bool(valid.all()):
        return vae.encode(pixels)
    video = vae.latent_dim == 3 and not getattr(vae, "not_video", False)
    together = len(pixels) if video else 1
    latents = []
    for images, masks in zip(pixels.split(together), valid.split(together)):
        latents.append(_with_holes(vae, masks.amin(0)).encode(images))
    return torch.cat(latents)


def _with_holes(vae: Any, valid: Tensor) -> Any:
    """Make a copy of `vae` that encodes an image of the size of `valid` without its holes."""
    patched = copy.copy(vae)
    patched.patcher = vae.patcher.clone()
    leave(patched, "encoder", "encode")
    model = patched.first_stage_model
    encode = patched.patcher.get_model_object("encode")
    names = [name for name, _ in convolutions(model, predicate=lambda name, _: half_of(name) == "encoder")]
    progress = Progress(max(len(names), 1))
    tiling = Tiling(splits=0, threshold=0, on_strip=progress)

    def run(image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if image.shape[-2:] != valid.shape:
            raise ValueError(
                f"The VAE was given {image.shape[-1]} x {image.shape[-2]} pixels of {valid.shape[1]} x "
                f"{valid.shape[0]}: it ran out of memory and fell back to tiles, which have no mask; encode a smaller "
                "image, or free memory."
            )
        return with_holes(model, lambda held: encode(held, *args, **kwargs), image, valid, tiling)

    patched.patcher.add_object_patch("encode", run)
    return patched
