"""Decoding steps without the overhead of Python: the first step is captured, later ones replay it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arcmerge.dispatch.recording import recorded
from arcmerge.gemma2.runtime.kv_cache import Batch, KVCache
from arcmerge.gemma2.runtime.network import Network


class DecodeGraph:
    """Runs one more token of each of `count` sequences through the layers, with all tensors at fixed addresses.

    On a GPU it replays a CUDA graph, on the CPU a recording of native calls: 182 for a 2.6B. Between two of them Python
    would take 100 us, as the weights evict its own data from the caches. Where neither is possible, as with stepwise
    numerics, which call torch, it calls the layers.

    Args:
        network: the model.
        cache: of the sequences.
        count: of the sequences.
    """

    @torch.inference_mode()
    def __init__(self, network: Network, cache: KVCache, count: int) -> None:
        device = network.weights.norm.device
        self._network = network
        self._cache = cache
        self._residual = network.embed(torch.zeros(count, dtype=torch.int64, device=device))
        self._batch = Batch(
            tokens=torch.zeros(count, dtype=torch.int64, device=device),
            positions=torch.zeros(count, dtype=torch.int64, device=device),
            sequences=torch.arange(count, device=device),
            starts=torch.arange(count + 1, dtype=torch.int32, device=device),
            lengths=torch.zeros(count, dtype=torch.int32, device=device),
            longest=1,
        )
        self._hidden: Tensor | None = None
        self._replay: Callable[[], None] | None = None

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Run one step.

        Args:
            tokens: [count] int64, one token per sequence.
            lengths: [count], the tokens of each sequence including the new one; 0: the sequence is skipped.

        Returns:
            Hidden states [count, hidden_size], which the next step overwrites.
        """
        self._batch.tokens.copy_(tokens)
        self._batch.lengths.copy_(lengths)
        torch.sub(self._batch.lengths, 1, out=self._batch.positions)
        self._residual.copy_(self._network.embed(self._batch.tokens))
        if self._hidden is None:
            on_gpu = self._residual.is_cuda and not self._network.stepwise
            self._hidden = self._captured() if on_gpu else self._recorded()
        elif self._replay is None:
            return self._layers()
        else:
            self._replay()
        return self._hidden

    def _layers(self) -> Tensor:
        return self._network.layers(self._residual, self._batch, self._cache)

    def _recorded(self) -> Tensor:
        with recorded() as recording:
            hidden = self._layers()
        if recording.whole:
            self._replay = recording.replay
        return hidden

    def _captured(self) -> Tensor:
        device = self._residual.device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            # By default torch captures every graph on one stream, which is on the device of the first graph.
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            # Compiles the kernels, which is not allowed in a capture. The replay writes the same values to the cache.
            with torch.cuda.stream(side):
                self._layers()
            torch.cuda.current_stream(device).wait_stream(side)
            # In this mode other threads may allocate and synchronize during the capture.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                hidden = self._layers()
            self._replay = graph.replay
            graph.replay()
        return hidden
