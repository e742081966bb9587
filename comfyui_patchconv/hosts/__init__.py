"""Shared by both hosts, and independent of them: halves of a VAE, streaming, memory estimates, figures and charts."""
