"""Models that make images patch by patch in pixel space: Patch Diffusion, patch-based DDPM, and their training."""
