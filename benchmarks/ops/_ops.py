"""Timings of an op, in this process, on one thread, next to a copy of the same tensors, which is the roof."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _bench import append, interleaved, provenance, spread
from arcmerge import _C

ROUNDS = 15


@dataclass(frozen=True)
class Call:
    """An implementation of an op, and the bytes that it must move for each element."""

    name: str
    function: Callable[[], object]
    bytes_per_element: int


def one_thread() -> None:
    """Let torch use one thread, as the native ops do in one call."""
    torch.set_num_threads(1)


def noise(elements: int, seed: int) -> torch.Tensor:
    """bf16 normal noise."""
    return torch.empty(elements, dtype=torch.bfloat16).normal_(generator=torch.Generator().manual_seed(seed))


def copy_of(source: torch.Tensor) -> Call:
    """The roof: memcpy of one input, its bytes counted once read and once written."""
    out = torch.empty_like(source)
    size = source.element_size()
    return Call("copy", lambda: _C.copy(out.data_ptr(), source.data_ptr(), source.numel() * size), 2 * size)


def agree(name: str, error: float, bound: float) -> None:
    """Raises SystemExit if the error of a provider is above its bound."""
    if not error <= bound:
        sys.exit(f"{name} disagrees with the reference by {error:.2e}, more than {bound:.0e}; nothing was timed")


def record_op(op: str, elements: int, calls: Sequence[Call]) -> None:
    """Time calls interleaved, print GB/s and the share of the first one's, which is the roof, and append the rows."""
    seconds: dict[str, list[float]] = {call.name: [] for call in calls}
    for number, call in interleaved(calls, ROUNDS + 1):
        started = time.perf_counter()
        call.function()
        if number:  # the first round warms up
            seconds[call.name].append(time.perf_counter() - started)
    origin, rows, roof = provenance("arcmerge", "torch"), [], None
    for call in calls:
        rates = spread([call.bytes_per_element * elements / one / 1e9 for one in seconds[call.name]])
        roof = roof or rates["median"]
        share = round(100 * rates["median"] / roof)
        rates = {f"gb_per_s_{key}": round(rate, 2) for key, rate in rates.items()}
        rows.append({**origin, "elements": elements, "provider": call.name, **rates, "percent_of_copy": share})
        print(f"{op} {call.name:<20}{rates['gb_per_s_median']:8.2f} GB/s{share:5d} % of copy")
    print(f"recorded in {append(op, rows)}")
