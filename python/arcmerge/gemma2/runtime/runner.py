"""Runs sequences through the network: prompts in passes of bounded size, then one token at a time.

The passes of prompts are not captured in CUDA graphs, although one of a few hundred tokens takes less time on a GPU
than its 290 launches take in Python, some 10 ms by estimate. An answer has one such pass, and then some hundred steps
of 2 ms, which are captured. A capture takes as long as twenty steps, so that it would pay after several prompts of the
same bucket of lengths, each of which keeps the activations of its pass. Its rows would be padded to the bucket, and
kernels choose tiles by the count of rows, so that logits would depend on the bucket. Scores, of which there are many,
are computed in passes of 2,048 tokens, which are not bound by launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.runtime.decode_graph import DecodeGraph
from arcmerge.gemma2.runtime.kept_graphs import PASS_TOKENS
from arcmerge.gemma2.runtime.kv_cache import Batch, KVCache
from arcmerge.gemma2.runtime.network import Network


class Runner:
    """B sequences and their cache.

    Args:
        network: the model.
        count: of the sequences.
        capacity: the maximum number of tokens of a sequence.
        transient: all tokens go through in one pass, and no more follow.
        decodes: a `decoder` will be asked for.

    Raises:
        ArcmergeError: if the capacity exceeds the model's max_position_embeddings.
    """

    def __init__(
        self, network: Network, count: int, capacity: int, transient: bool = False, decodes: bool = False
    ) -> None:
        config = network.config
        if capacity > config.max_position_embeddings:
            raise ArcmergeError(
                f"'prompt' must have at most {config.max_position_embeddings} tokens, the model's "
                f"max_position_embeddings, got {capacity}"
            )
        self._network = network
        self._device = network.weights.norm.device
        self._graph = network.graphs.take(network, count, capacity) if decodes else None
        if self._graph is not None:
            self._cache = self._graph.cache.first(count)
        else:
            chunk = capacity if transient else max(1, PASS_TOKENS // max(count, 1))
            dtype = network.weights.norm.dtype
            self._cache = network.graphs.make_room_for(
                lambda: KVCache(config, count, capacity, chunk, dtype, self._device, transient)
            )
        self._transient = transient
        self._lengths = [0] * count

    def feed(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[Batch, Tensor]]:
        """Append tokens, or none, to every sequence; yields each pass and its hidden states [T, hidden_size]."""
        chunk = max(map(len, prompts)) if self._transient else self._cache.chunk
        for start in range(0, max(map(len, prompts)), chunk):
            chunks = [prompt[start : start + chunk] for prompt in prompts]
            batch = Batch.of(chunks, self._lengths, self._device)
            self._lengths = [before + len(tokens) for before, tokens in zip(self._lengths, chunks, strict=True)]
            yield batch, self._network(batch, self._cache)

    def copy_rows(self, sources: Sequence[int]) -> None:
        """Replace every sequence b in the cache by a copy of sequence sources[b], which may be b itself."""
        for row, source in enumerate(sources):
            if source != row:
                for layer in self._cache.layers:
                    for states in layer:
                        states[row].copy_(states[source])
        self._lengths = [self._lengths[source] for source in sources]

    def feed_for_last(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Append prompts, none of which is empty; returns the hidden states [B, hidden_size] of their last tokens."""
        last: list[Tensor | None] = [None] * len(prompts)
        for batch, hidden in self.feed(prompts):
            end = 0
            for row, span in enumerate(batch.spans):
                end += len(span)
                if span:
                    last[row] = hidden[end - 1]
        return torch.stack([states for states in last if states is not None])

    def decoder(self) -> DecodeGraph:
        """The steps that append one token after another to each sequence."""
        assert self._graph is not None
        self._graph.start(self._lengths)
        return self._graph
