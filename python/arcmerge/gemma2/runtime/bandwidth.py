"""How fast memory can be read, measured where the weights lie: what decoding one token after another comes to."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.gemma2.weights import Weights

_READINGS = 3


def read_bandwidth(weights: Weights) -> float:
    """Bytes a second, the best of a few readings of the embedding, a fifth of a 2.6B model, by all threads.

    On the CPU from memory, as the first reading brings the file there. A tiny model's is that of a cache.
    """
    return max(_read(weights.embed_tokens) for _ in range(_READINGS))


def _read(tensor: Tensor) -> float:
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.is_cuda:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).max()
        end.record()
        end.synchronize()
        return float(nbytes / (start.elapsed_time(end) / 1e3))
    started = perf_counter()
    _C.read(tensor.data_ptr(), nbytes)
    return nbytes / (perf_counter() - started)
