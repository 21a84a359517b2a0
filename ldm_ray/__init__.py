"""Latent diffusion for small grayscale images, on Ray. Start reading at ``train.py``."""

__version__ = "0.1.0"
