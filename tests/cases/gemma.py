"""The shapes of the three Gemma-2 models, by the names of their configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes in config.json. layers: num_hidden_layers. Scores are divided by the root of query_pre_attn_scalar."""

    name: str
    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate_size: int
    query_pre_attn_scalar: int
    vocabulary: int = 256000
    sliding_window: int = 4096
    softcap: float = 50.0
    final_softcap: float = 30.0
    epsilon: float = 1e-6
    theta: float = 10000.0

    def elements(self) -> list[int]:
        """The elements of every tensor of a checkpoint."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        attention = [queries * hidden, keys * hidden, keys * hidden, queries * hidden]
        return [self.vocabulary * hidden, *(attention + [inner * hidden] * 3 + [hidden] * 4) * self.layers, hidden]


GEMMA_2 = (
    Shape("2.6B", 2304, 26, 8, 4, 256, 9216, 256),
    Shape("9B", 3584, 42, 16, 8, 256, 14336, 256),
    Shape("27B", 4608, 46, 32, 16, 128, 36864, 144),
)
