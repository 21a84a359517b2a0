"""Training loops: plain PyTorch (torch.distributed for several workers), no Ray."""
