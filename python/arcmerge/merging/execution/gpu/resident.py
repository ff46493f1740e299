"""Weighted sums of tensors that all lie in GPU memory, at addresses that do not change: few launches and one wait."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from arcmerge.kernels.segments import Launch

# The kernel takes so many inputs at once.
MOST_INPUTS = 8
# A table has 48 bytes for 16,384 elements of a pair: 8 MB for all tensors of Gemma-2 2.6B.
_MOST_TABLES = 4


class WeightedSum(NamedTuple):
    """out = the sum of coefficients[i] * inputs[i]; 1 to MOST_INPUTS inputs, all contiguous and of one length."""

    inputs: Sequence[torch.Tensor]
    coefficients: NDArray[np.float64]
    out: torch.Tensor


class ResidentSums:
    """Computes weighted sums whose outputs lie in one allocation.

    The kernel's tables, which hold addresses, are made on the GPU at the first call for some tensors and kept for the
    next. Such a call copies the coefficients to the GPU, launches one kernel for each combination of dtypes, copies the
    counts back, and waits once. All of it is on the caller's current stream, so that it is in order with work there.

    Args:
        result: the allocation, on the device of all tensors.
    """

    def __init__(self, result: torch.Tensor) -> None:
        self._result = result
        self._tables: OrderedDict[object, tuple[object, list[list[Launch]]]] = OrderedDict()

    def compute(self, sums: Sequence[WeightedSum]) -> list[int]:
        """Fill the outputs; returns for each the number of elements that are NaN or infinite."""
        import torch

        order = sorted(range(len(sums)), key=lambda index: len(sums[index].inputs))
        with self._on_device():
            found = self.launch([sums[index] for index in order]).to("cpu", non_blocking=True)
            if self._result.is_cuda:
                done = torch.cuda.Event()
                done.record()
                done.synchronize()
        counts = dict(zip(order, found.tolist(), strict=True))
        return [counts[index] for index in range(len(sums))]

    def launch(self, sums: Sequence[WeightedSum]) -> torch.Tensor:
        """The same without the wait, for sums in ascending order of their number of inputs.

        Returns:
            The counts, int64 on the device.
        """
        import torch

        from arcmerge.kernels.combine import combine_segments

        groups = [[*same] for _, same in groupby(sums, lambda each: len(each.inputs))]
        with self._on_device():
            values = np.concatenate([each.coefficients for group in groups for each in group]).astype(np.float32)
            # One copy writes the counts, zero, and the coefficients.
            packed = np.concatenate([np.zeros(8 * len(sums), np.uint8), values.view(np.uint8)])
            pinned = torch.from_numpy(packed)
            if self._result.is_cuda:
                pinned = pinned.pin_memory()
            copied = pinned.to(self._result.device, non_blocking=True)
            counts, factors = copied[: 8 * len(sums)].view(torch.int64), copied[8 * len(sums) :].view(torch.float32)
            first = used = 0
            for group, launches in zip(groups, self._launches(groups), strict=True):
                k, last = len(group[0].inputs), first + len(group)
                rows = factors[used : used + k * len(group)].view(-1, k)
                for launch in launches:
                    combine_segments(launch, rows, counts[first:last])
                first, used = last, used + rows.numel()
        return counts

    def _on_device(self) -> AbstractContextManager[object]:
        import torch

        return torch.cuda.device(self._result.device) if self._result.is_cuda else nullcontext()

    def _launches(self, groups: Sequence[Sequence[WeightedSum]]) -> list[list[Launch]]:
        """The launches of each group."""
        from arcmerge.kernels.segments import tabulated

        operands = [[(*each.inputs, each.out) for each in group] for group in groups]
        key = tuple([tuple(map(id, each)) for group in operands for each in group])
        if key not in self._tables:
            # The operands are kept with their table: no other tensor gets their ids, or their memory.
            self._tables[key] = operands, [[*tabulated(group, self._result)] for group in operands]
            if len(self._tables) > _MOST_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key][1]
