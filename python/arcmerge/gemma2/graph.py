"""Greedy decoding that the host does not hold up: a step is captured once as a CUDA graph, then replayed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from arcmerge import ops
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.cache import Batch, Cache
from arcmerge.gemma2.network import Network


class DecodeGraph:
    """The most probable next token of B sequences, step after step.

    network: its steps are plain calls on the CPU and where it is stepwise, as it then asks the host for lengths.
    cache: holds all tokens of the sequences but the newest. batch: those, one for each sequence, none of which rests.
    """

    @torch.inference_mode()
    def __init__(self, network: Network, cache: Cache, batch: Batch) -> None:
        self._network = network
        self._cache = cache
        self._steps_left = cache.length - int(batch.lengths.max()) + 1
        # A graph knows addresses: what changes from step to step stays where it is, and changes on the device.
        self._tokens, self._positions, self._lengths = self._state = [
            tensor.clone() for tensor in (batch.tokens, batch.positions, batch.lengths)
        ]
        self._batch = replace(batch, tokens=self._tokens, positions=self._positions, lengths=self._lengths)
        self._graph = self._captured() if self._tokens.is_cuda and not network.stepwise else None

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The next token of every sequence, [B] int64, in memory that the next step overwrites.

        Raises ArcmergeError when the cache is full.
        """
        if self._steps_left <= 0:
            raise ArcmergeError(f"the cache is full: it was made for {self._cache.length} tokens of a sequence.")
        self._steps_left -= 1
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()
        return self._tokens

    def _advance(self) -> None:
        network = self._network
        hidden = network(self._batch, self._cache)
        head, softcap = network.weights.embed_tokens, network.config.final_logit_softcapping
        self._tokens.copy_(ops.head_argmax(hidden, head, softcap, network.stepwise))
        self._positions += 1
        self._lengths += 1

    def _captured(self) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in self._state]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._tokens.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            # Compiles the kernels, which a capture does not allow. The first real step writes the same to the cache.
            with torch.cuda.stream(side):
                self._advance()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                self._advance()
        for tensor, value in zip(self._state, before, strict=True):
            tensor.copy_(value)
        return graph
