"""What both hosts share: halves of a VAE, streaming, the memory a host is told of, figures, charts. Imports none."""
