"""Datasets of generated images: what was asked for, shards, their commit, the card, verification. Without Ray."""
