"""Files of VAEs, latents and images: read with checks first, written whole."""
