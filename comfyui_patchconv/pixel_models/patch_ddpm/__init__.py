"""Patch-based diffusion (Arakawa et al. 2023, arXiv 2304.07087): its network, samplers, training and files."""
