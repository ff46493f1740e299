"""The cache of keys and values, allocated once; and the batches of tokens that go through the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arcmerge.gemma2.config import Gemma2Config

# Kernels read keys in tiles of up to 128 slots, which must not wrap round the end of a ring.
SLOT_MULTIPLE = 128


@dataclass(frozen=True)
class Batch:
    """Tokens of several sequences, one sequence after another without padding: T tokens of B sequences.

    tokens, positions, sequences: [T] int64; a token's number, its place in its sequence from 0, the sequence it is of.
    starts: [B + 1] int32, where in these the tokens of a sequence begin; lengths: [B] int32, tokens of a sequence up
    to and including these, 0 for one that rests. longest: the most tokens that a sequence has here.
    """

    tokens: Tensor
    positions: Tensor
    sequences: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int

    @classmethod
    def of(cls, chunks: Sequence[Sequence[int]], before: Sequence[int], device: torch.device) -> Batch:
        """The next tokens of each sequence, of which `before` have gone through the network already."""
        counts = torch.tensor([len(chunk) for chunk in chunks])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        sequences = torch.arange(len(chunks)).repeat_interleave(counts)
        past = torch.tensor(list(before), dtype=torch.int64)
        positions = torch.arange(int(starts[-1])) - starts[sequences] + past[sequences]
        tokens = torch.tensor([token for chunk in chunks for token in chunk], dtype=torch.int64)
        return cls(
            tokens=tokens.to(device),
            positions=positions.to(device),
            sequences=sequences.to(device),
            starts=starts.to(device, torch.int32),
            lengths=(past + counts).to(device, torch.int32),
            longest=int(counts.max()),
        )


class KVCache:
    """Keys and values of every layer: [batch, num_key_value_heads, slots, head_dim] each.

    A layer that sees all has a slot for every position up to `length`. One with a window is a ring: position p lies in
    slot p % slots, and there are slots for the window and for the `chunk` of tokens written before they are read.
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
        self.length = length

        def allocate(window: int) -> tuple[Tensor, Tensor]:
            slots = min(length, window + chunk - 1) if window else length
            slots = -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE
            shape = (batch, config.num_key_value_heads, slots, config.head_dim)
            return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)

        self.layers = (
            [allocate(0)] * len(config.windows) if transient else [allocate(window) for window in config.windows]
        )
