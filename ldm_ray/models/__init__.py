"""Networks: plain PyTorch, no Ray."""
