"""Decoding steps without the overhead of Python: the first step is captured, later ones replay it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from arcmerge.dispatch.recording import recorded
from arcmerge.gemma2.runtime.kv_cache import Batch, KVCache
from arcmerge.ops.attention_decode import clear_counters

if TYPE_CHECKING:
    from arcmerge.gemma2.generation.sampler import Kind, Sampler
    from arcmerge.gemma2.runtime.network import Network


class DecodeGraph:
    """Runs one more token of at most `count` sequences each through the network, with all tensors at fixed addresses.

    Tokens, lengths and the state of sampling stay on the device from step to step: no step waits for the host, nor the
    host for a step.

    On a GPU it replays a CUDA graph of the whole step, with the choice of tokens: one for each kind of sampler, which
    reads the numbers of the sampler from memory. On the CPU a recording of native calls: 182 for a 2.6B. Between
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
        self._sampler: Sampler | None = None  # that of the current sequences
        self._samplers: dict[Kind, Sampler] = {}  # what graphs read
        self._graphs: dict[Kind | None, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, of the residual stream, and of the memory that captured steps use."""
        return self.cache.nbytes + self._residual.nbytes + self._pool_bytes

    @torch.inference_mode()
    def start(self, lengths: Sequence[int]) -> None:
        """Begin with `count` sequences or fewer, of each of which so many tokens are in the cache."""
        self._sampler = None
        self._chosen = self._batch.tokens[: len(lengths)]
        self._running = [True] * len(lengths)
        self._fill(self._more, self._running)
        self._fill(self._batch.lengths, lengths)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, running: Sequence[bool], sampler: Sampler | None = None) -> Tensor:
        """Run one step.

        Args:
            tokens: [B] int64, on the device, one token per sequence; for example the result of the step before.
            running: whether each sequence goes on; one that does not is skipped in this and all later steps.
            sampler: chooses the next tokens, the same one in all steps of these sequences; None for hidden states. A
                graph goes on with a copy of it.

        Returns:
            The next tokens [B] int64, or hidden states [B, hidden_size]; undefined for sequences that are skipped. The
            next step overwrites both.
        """
        if tokens is not self._chosen:
            self._chosen.copy_(tokens)
        if list(running) != self._running:
            self._running = list(running)
            self._fill(self._more, running)
            self._batch.lengths.mul_(self._more)
        if not self._residual.is_cuda or self._network.stepwise:
            hidden = self._plain()
        elif sampler is not None and sampler.is_capturable:
            self._run(self._own(sampler))
            return self._chosen
        else:
            hidden = self._run(None)
        hidden = hidden[: len(self._running)]
        return hidden if sampler is None else self._chosen.copy_(sampler.choose(hidden))

    @staticmethod
    def _fill(out: Tensor, values: Sequence[int]) -> None:
        """Fill out [count] int32 with values, and zeros after them."""
        padded = torch.zeros(len(out), dtype=torch.int32)
        padded[: len(values)] = torch.tensor(values)
        # From memory that is not pinned the driver takes the values before the call returns, and waits for nothing.
        out.copy_(padded, non_blocking=True)

    def _own(self, sampler: Sampler) -> Sampler:
        """The sampler whose tensors the graphs of its kind read, loaded with the state of `sampler`."""
        own = self._samplers.get(sampler.kind)
        if own is None:
            own = self._samplers[sampler.kind] = sampler.blank(len(self._batch.tokens))
        if self._sampler is not sampler:
            own.load(sampler)
            self._sampler = sampler
        return own

    def _plain(self) -> Tensor:
        self._advance()
        if self._hidden is None:
            self._hidden = hidden = self._recorded()
        elif self._replay is None:
            hidden = self._layers()
        else:
            self._replay()
            hidden = self._hidden
        return hidden

    def _advance(self) -> None:
        """Everything before the layers."""
        self._batch.lengths.add_(self._more)
        torch.sub(self._batch.lengths, 1, out=self._batch.positions)
        self._residual.copy_(self._network.embed(self._batch.tokens))

    def _layers(self) -> Tensor:
        return self._network.layers(self._residual, self._batch, self.cache)

    def _recorded(self) -> Tensor:
        with recorded() as recording:
            hidden = self._layers()
        if recording.whole:
            self._replay = recording.replay
        return hidden

    def _run(self, sampler: Sampler | None) -> Tensor:
        """Hidden states, or with a sampler the next tokens."""
        kind = None if sampler is None else sampler.kind
        return self._replayed(kind) if kind in self._graphs else self._captured(kind, sampler)

    def _replayed(self, kind: Kind | None) -> Tensor:
        graph, result = self._graphs[kind]
        graph.replay()
        return result

    def _captured(self, kind: Kind | None, sampler: Sampler | None) -> Tensor:
        """Run a step by plain calls and capture another one, which does not run."""

        def step() -> Tensor:
            clear_counters([keys for keys, _ in self.cache.layers])
            self._advance()
            hidden = self._layers()
            return hidden if sampler is None else self._batch.tokens.copy_(sampler.choose(hidden))

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
        self._graphs[kind] = graph, result
        return first
