"""Reading untrusted checkpoints, their format, where runs keep them."""
