"""Gemma-2 models: opened from safetensors or merged in memory, run and scored."""
