"""How good samples are: plain PyTorch, no Ray."""
