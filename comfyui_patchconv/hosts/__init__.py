"""What both hosts share: halves of a VAE, streaming, estimates, figures and charts. Imports no host."""
