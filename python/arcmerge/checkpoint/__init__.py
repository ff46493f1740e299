"""Checkpoints in and out: safetensors headers, shards, the index, an output folder that appears whole or not at all.

This room moves bytes. It knows no ops, no recipes and no torch.
"""
