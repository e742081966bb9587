"""What both hosts share, and imports neither: halves of a VAE, streaming, memory estimates, figures and charts."""
