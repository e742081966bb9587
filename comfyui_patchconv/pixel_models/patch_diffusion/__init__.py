"""Patch Diffusion (Luhman & Luhman 2022, arXiv 2207.04316): its network, its losses, its training and its files."""
