"""arcmerge inside transformers: `accelerate` for a loaded Gemma-2, `register_attention` for its attention by name."""

from arcmerge.integrations.transformers.acceleration import accelerate, register_attention

__all__ = ["accelerate", "register_attention"]
