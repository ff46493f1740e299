"""Values on their way from a device to the host, which has other work until they arrive."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class Arrival:
    """Copies of tensors of one device, which are started now and waited for when they are read.

    Tensors on the CPU are not copied.
    """

    def __init__(self, *tensors: Tensor) -> None:
        # Into pinned memory, as the copy does not block. The allocator keeps that memory until the copy has ended.
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._event: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensors[0].device))

    def lists(self) -> list[Any]:
        """The values of each tensor."""
        if self._event is not None and not self._event.query():
            self._event.synchronize()
        return [copy.tolist() for copy in self._copies]


def read_late(produced: Iterable[Tensor], late: int) -> Iterator[list[int]]:
    """The values of tensors, each read after `late` more have been produced, or the last."""
    arrivals: deque[Arrival] = deque()
    for tensor in produced:
        arrivals.append(Arrival(tensor))
        if len(arrivals) > late:
            yield arrivals.popleft().lists()[0]
    while arrivals:
        yield arrivals.popleft().lists()[0]
