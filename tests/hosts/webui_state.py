"""As the parts of the WebUI that the toggle meets: what is shared of a run, a model, and what makes live previews."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from comfyui_patchconv.hosts.webui.host import Host

from .vae import VAE


def state_of_a_run(jobs: int = 1, done: int = 0) -> Any:
    """At the end of the sampling of a job, ten seconds after the first began."""
    return SimpleNamespace(
        interrupted=False, skipped=False, textinfo=None, job_no=done, job_count=jobs, time_start=0.0,
        sampling_step=20, sampling_steps=20, current_image_sampling_step=20,
    )  # fmt: skip


class Model:
    """What a latent is decoded and a picture encoded by; here a latent has the picture's size."""

    latent_channels = 4

    def __init__(self, vae: VAE) -> None:
        self.first_stage_model = vae

    def decode_first_stage(self, z: Tensor) -> Tensor:
        return self.first_stage_model.decode(z)

    def encode_first_stage(self, pixels: Tensor) -> Tensor:
        return self.first_stage_model.encode(pixels)


def cheap(latents: Tensor) -> Tensor:
    return latents[:, :3] + 7


def host_of(state: Any, model: Model, **options: Any) -> tuple[Host, Any]:
    """A host, and its module that makes live previews."""
    previews = SimpleNamespace()
    previews.single_sample_to_image = lambda sample, approximation=None: model.decode_first_stage(sample[None])[0]
    return Host(state, cheap, previews, **options), previews
