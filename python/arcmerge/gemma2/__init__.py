"""Gemma-2 from a safetensors folder: config, weights, cache, network, generation, scores."""
