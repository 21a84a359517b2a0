"""The diffusion mathematics: plain PyTorch, no Ray."""
