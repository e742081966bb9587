"""The pack's ComfyUI nodes: one module per family, listed here."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]

from .instead_of_tiles import install
from .partial_conv import FillMaskedArea, VAEEncodePartialConv
from .patch_conv import PatchConvModel, PatchConvVAE
from .patch_ddpm import PatchDDPMLoader, PatchDDPMSampler
from .patch_diffusion import PatchDiffusionLoader, PatchDiffusionSampler
from .report import PatchConvReport
from .upscale import UpscaleImage


class PatchConvExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            PatchConvVAE,
            PatchConvModel,
            PatchConvReport,
            UpscaleImage,
            VAEEncodePartialConv,
            FillMaskedArea,
            PatchDiffusionLoader,
            PatchDiffusionSampler,
            PatchDDPMLoader,
            PatchDDPMSampler,
        ]


async def comfy_entrypoint() -> PatchConvExtension:
    install()
    return PatchConvExtension()
