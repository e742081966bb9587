"""The ways in which a VAE can run."""

MODES = ("patch", "stream")
"""What users choose between: each large convolution in strips, or all of a decoder or encoder."""
