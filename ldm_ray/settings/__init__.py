"""Frozen, checked groups of settings; flags are made from them."""
