"""The bandwidth of reading memory, which bounds decoding, measured on the weights of a model."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.gemma2.weights import Weights

_PASSES = 3


def read_bandwidth(weights: Weights) -> float:
    """Bytes per second of reading the embedding, a fifth of a 2.6B model, with all threads: the best of a few passes.

    On the CPU the first pass brings a mapped file into memory. A tiny model is read from a cache.
    """
    return max(_read(weights.embed_tokens) for _ in range(_PASSES))


def _read(tensor: Tensor) -> float:
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.is_cuda:
        return nbytes / _seconds_on_gpu(tensor)
    started = perf_counter()
    _C.read(tensor.data_ptr(), nbytes)
    return nbytes / (perf_counter() - started)


def _seconds_on_gpu(tensor: Tensor) -> float:
    """Seconds of reading a tensor, by events of its device: those of the current one would not enclose the kernel."""
    with torch.cuda.device(tensor.device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).max()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end) / 1e3)
