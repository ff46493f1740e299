"""arcmerge inside transformers: `accelerate` a loaded Gemma-2, or `register_attention` under a name."""

from arcmerge.integrations.transformers.acceleration import accelerate, register_attention

__all__ = ["accelerate", "register_attention"]
