"""Decoding steps without the overhead of Python: the first step is captured, later ones replay it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from arcmerge.dispatch.recording import recorded
from arcmerge.gemma2.runtime.kv_cache import Batch, KVCache

if TYPE_CHECKING:
    from arcmerge.gemma2.runtime.network import Network


class DecodeGraph:
    """Runs one more token of at most `count` sequences each through the network, with all tensors at fixed addresses.

    Tokens and lengths stay on the device from step to step: no step waits for the host, nor the host for a step.

    On a GPU it replays a CUDA graph of the whole step, on the CPU a recording of native calls: 182 for a 2.6B. Between
    two of them Python would take 100 us, as the weights evict its own data from the caches. Where neither is possible,
    as with stepwise numerics, which call torch, it calls the layers.

    Args:
        network: the model, which may keep the graph; the graph does not keep it.
        cache: of the sequences.
        count: the maximum number of sequences.

    Attributes:
        cache: of the sequences.
    """

    @torch.inference_mode()
    def __init__(self, network: Network, cache: KVCache, count: int) -> None:
        device = network.weights.norm.device
        self._network = cast("Network", weakref.proxy(network))
        self.cache = cache
        self._residual = network.embed(torch.zeros(count, dtype=torch.int64, device=device))
        self._batch = Batch(
            tokens=torch.zeros(count, dtype=torch.int64, device=device),
            positions=torch.zeros(count, dtype=torch.int64, device=device),
            sequences=torch.arange(count, device=device),
            starts=torch.arange(count + 1, dtype=torch.int32, device=device),
            lengths=torch.zeros(count, dtype=torch.int32, device=device),
            longest=1,
        )
        self._more = torch.zeros_like(self._batch.lengths)  # what a step adds to the lengths: 1, or 0 for a skipped one
        self._running: list[bool] = []
        self._chosen = self._batch.tokens
        self._hidden: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, of the residual stream, and of the memory that captured steps use."""
        return self.cache.nbytes + self._residual.nbytes + self._pool_bytes

    @torch.inference_mode()
    def start(self, lengths: Sequence[int]) -> None:
        """Begin with `count` sequences or fewer, of each of which so many tokens are in the cache."""
        self._chosen = self._batch.tokens[: len(lengths)]
        self._running = [True] * len(lengths)
        self._fill(self._more, self._running)
        self._fill(self._batch.lengths, lengths)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, running: Sequence[bool], greedy: bool = False) -> Tensor:
        """Run one step.

        Args:
            tokens: [B] int64, on the device, one token per sequence; for example the result of a greedy step.
            running: whether each sequence goes on; one that does not is skipped in this and all later steps.
            greedy: choose the most probable next tokens within the step.

        Returns:
            The tokens [B] int64 of a greedy step, else hidden states [B, hidden_size]; undefined for sequences
            that are skipped. The next step overwrites both.
        """
        if tokens is not self._chosen:
            self._chosen.copy_(tokens)
        if list(running) != self._running:
            self._running = list(running)
            self._fill(self._more, running)
            self._batch.lengths.mul_(self._more)
        if not self._residual.is_cuda or self._network.stepwise:
            result = self._plain(greedy)
        else:
            result = self._replayed(greedy) if greedy in self._graphs else self._captured(greedy)
        return self._chosen if greedy else result[: len(self._running)]

    @staticmethod
    def _fill(out: Tensor, values: Sequence[int]) -> None:
        """Fill out [count] int32 with values, and zeros after them."""
        padded = torch.zeros(len(out), dtype=torch.int32)
        padded[: len(values)] = torch.tensor(values)
        # From memory that is not pinned the driver takes the values before the call returns, and waits for nothing.
        out.copy_(padded, non_blocking=True)

    def _plain(self, greedy: bool) -> Tensor:
        self._advance()
        if self._hidden is None:
            self._hidden = hidden = self._recorded()
        elif self._replay is None:
            hidden = self._layers()
        else:
            self._replay()
            hidden = self._hidden
        return self._choose(hidden) if greedy else hidden

    def _advance(self) -> None:
        """Everything before the layers."""
        self._batch.lengths.add_(self._more)
        torch.sub(self._batch.lengths, 1, out=self._batch.positions)
        self._residual.copy_(self._network.embed(self._batch.tokens))

    def _layers(self) -> Tensor:
        return self._network.layers(self._residual, self._batch, self.cache)

    def _choose(self, hidden: Tensor) -> Tensor:
        return self._batch.tokens.copy_(self._network.most_probable(hidden))

    def _recorded(self) -> Tensor:
        with recorded() as recording:
            hidden = self._layers()
        if recording.whole:
            self._replay = recording.replay
        return hidden

    def _replayed(self, greedy: bool) -> Tensor:
        graph, result = self._graphs[greedy]
        graph.replay()
        return result

    def _captured(self, greedy: bool) -> Tensor:
        """Run a step by plain calls and capture another one, which does not run."""

        def step() -> Tensor:
            self._advance()
            hidden = self._layers()
            return self._choose(hidden) if greedy else hidden

        device = self._residual.device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            # By default torch captures every graph on one stream, which is on the device of the first graph.
            side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
            side.wait_stream(current)
            # Compiles the kernels, which is not allowed in a capture.
            with torch.cuda.stream(side):
                first = step()
            current.wait_stream(side)
            first.record_stream(current)
            # In this mode other threads may allocate and synchronize during the capture.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved(device)
                result = step()
                self._pool_bytes += torch.cuda.memory_reserved(device) - before
        self._graphs[greedy] = graph, result
        return first
