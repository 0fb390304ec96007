"""Quantized checkpoints, made once, a tensor at a time."""
