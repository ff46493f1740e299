"""Sequences on their way through the network: prompts in passes of bounded size, then one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.runtime.decode_graph import DecodeGraph
from arcmerge.gemma2.runtime.kv_cache import Batch, KVCache
from arcmerge.gemma2.runtime.network import Network

# Tokens of one pass: enough to keep matrix products busy, few enough that what lies between two ops stays small (2.6B:
# 2,048 tokens of 2 * 9,216 values in bf16 are 75 MB).
PASS_TOKENS = 2048


class Runner:
    """B sequences and their cache.

    capacity: the most tokens that each may come to. transient: all tokens come in one pass, and no more after it.
    Raises ArcmergeError when the capacity is beyond what the model was made for.
    """

    def __init__(self, network: Network, count: int, capacity: int, transient: bool = False) -> None:
        config = network.config
        if capacity > config.max_position_embeddings:
            raise ArcmergeError(
                f"{capacity} tokens are more than the {config.max_position_embeddings} of the model's "
                "max_position_embeddings: give fewer."
            )
        self._network = network
        self._device = network.weights.norm.device
        self._chunk = max(1, PASS_TOKENS // max(count, 1))
        dtype = network.weights.norm.dtype
        chunk = capacity if transient else self._chunk
        self._cache = KVCache(config, count, capacity, chunk, dtype, self._device, transient)
        self._transient = transient
        self._lengths = [0] * count
        self._step: DecodeGraph | None = None

    def feed(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[Batch, Tensor]]:
        """The next tokens of every sequence, some perhaps of none: each pass and its hidden states [T, hidden_size]."""
        chunk = max(map(len, prompts)) if self._transient else self._chunk
        for start in range(0, max(map(len, prompts)), chunk):
            pieces = [prompt[start : start + chunk] for prompt in prompts]
            batch = Batch.of(pieces, self._lengths, self._device)
            self._lengths = [before + len(piece) for before, piece in zip(self._lengths, pieces, strict=True)]
            yield batch, self._network(batch, self._cache)

    def fork(self, sources: Sequence[int]) -> None:
        """Let every sequence be where another is: sources[b] is that of sequence b, which may be b itself."""
        for number, source in enumerate(sources):
            if source != number:
                for layer in self._cache.layers:
                    for kept in layer:
                        kept[number].copy_(kept[source])
        self._lengths = [self._lengths[source] for source in sources]

    def feed_for_last(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states [B, hidden_size] of the last token of each prompt, none of which is empty."""
        last: list[Tensor | None] = [None] * len(prompts)
        for batch, hidden in self.feed(prompts):
            starts = batch.starts.tolist()
            for number, (start, end) in enumerate(pairwise(starts)):
                if end > start:
                    last[number] = hidden[end - 1]
        return torch.stack([row for row in last if row is not None])

    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """Hidden states [B, hidden_size] after one more token of each, which the next step overwrites.

        None: the sequence rests, and its row means nothing.
        """
        awake = [token is not None for token in tokens]
        self._lengths = [length + more for length, more in zip(self._lengths, awake, strict=True)]
        lengths = torch.tensor([length * more for length, more in zip(self._lengths, awake, strict=True)])
        if self._step is None:
            self._step = DecodeGraph(self._network, self._cache, len(tokens))
        return self._step(torch.tensor([token or 0 for token in tokens]), lengths)
