"""Files of VAEs, latents and images: read with checks first, written whole. The names that programs import are here."""

from .images import load_image, open_image, save_image
from .latents import load_latent, save_latent
from .vae import load_vae, random_vae

__all__ = ["load_image", "load_latent", "load_vae", "open_image", "random_vae", "save_image", "save_latent"]
