"""The cache of keys and values, allocated once, and the batches of tokens that go through the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from arcmerge.gemma2.config import Gemma2Config

# Kernels read keys in tiles of up to 128 slots, which must not wrap around in a ring buffer.
SLOT_MULTIPLE = 128


@dataclass(frozen=True)
class Batch:
    """T tokens of B sequences, one sequence after another without padding.

    Attributes:
        tokens: [T] int64, token ids.
        positions: [T] int64, of each token in its sequence, from 0.
        sequences: [T] int64, the sequence of each token.
        starts: [B + 1] int32, the offsets of the sequences in these.
        lengths: [B] int32, the tokens of each sequence up to and including these; 0: the sequence is skipped.
        longest: the maximum number of tokens of a sequence in this batch.
        spans: the positions of the tokens of each sequence, for the host, which needs not wait for the tensors.
    """

    tokens: Tensor
    positions: Tensor
    sequences: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int
    spans: Sequence[range] = ()

    @property
    def places(self) -> Iterator[tuple[int, int]]:
        """The sequence and the position of each token."""
        return ((sequence, position) for sequence, span in enumerate(self.spans) for position in span)

    @classmethod
    def of(cls, chunks: Sequence[Sequence[int]], before: Sequence[int], device: torch.device) -> Batch:
        """The next tokens of each sequence; `before`: how many of its tokens are in the cache."""
        counts = torch.tensor([len(chunk) for chunk in chunks])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        sequences = torch.arange(len(chunks)).repeat_interleave(counts)
        past = torch.tensor(list(before), dtype=torch.int64)
        positions = torch.arange(int(starts[-1])) - starts[sequences] + past[sequences]
        tokens = torch.tensor([token for chunk in chunks for token in chunk], dtype=torch.int64)
        return cls(
            # Copies from memory that is not pinned wait for all earlier work, unless they are allowed not to.
            tokens=tokens.to(device, non_blocking=True),
            positions=positions.to(device, non_blocking=True),
            sequences=sequences.to(device, non_blocking=True),
            starts=starts.int().to(device, non_blocking=True),
            lengths=(past + counts).int().to(device, non_blocking=True),
            longest=int(counts.max()),
            spans=[range(start, start + len(chunk)) for start, chunk in zip(before, chunks, strict=True)],
        )


class KVCache:
    """Keys and values of every layer: [batch, num_key_value_heads, slots, head_dim] each.

    A layer with full attention has a slot for every position. A layer with a sliding window is a ring buffer: position
    p is in slot p % slots, and there are slots for the window and for one chunk.

    Args:
        config: of the model.
        batch: the number of sequences.
        length: the maximum number of tokens of a sequence.
        chunk: the maximum number of tokens of a sequence in a pass.
        dtype, device: of the cache.
        transient: all layers share one buffer, for sequences that go through the network in a single pass.

    Attributes:
        chunk: as given.
    """

    def __init__(
        self,
        config: Gemma2Config,
        batch: int,
        length: int,
        chunk: int,
        dtype: torch.dtype,
        device: torch.device,
        transient: bool = False,
    ) -> None:
        self.chunk = chunk

        def allocate(window: int) -> tuple[Tensor, Tensor]:
            slots = min(length, window + chunk - 1) if window else length
            slots = -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE
            shape = (batch, config.num_key_value_heads, slots, config.head_dim)
            return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)

        self.layers = (
            [allocate(0)] * len(config.windows) if transient else [allocate(window) for window in config.windows]
        )

    @property
    def nbytes(self) -> int:
        return sum(states.nbytes for layer in self.layers for states in layer)

    def first(self, count: int) -> KVCache:
        """The part of the first sequences, in the same memory."""
        part = copy(self)
        part.layers = [(keys[:count], values[:count]) for keys, values in self.layers]
        return part
