"""Reading and writing checkpoints: safetensors headers, shards, the index, and the output folder.

This package moves bytes. It does not import ops, recipes or torch.
"""
