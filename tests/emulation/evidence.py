"""The evidence that a case gives when its launch runs in the interpreter or as emulated PTX."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cases import Call, Case, Random, disagreement

from .traffic import Traffic

Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Evidence:
    """error: the maximum error of the outputs, as a share of its tolerance. ratio: bytes moved over the minimum."""

    outputs: dict[str, Tensor]
    error: float
    ratio: float | None = None


def interpreted(case: Case) -> Evidence:
    """Run a case in the interpreter of this process, which raises a fault for accesses outside of tensors."""
    call = case.build(Random())
    traffic, error = _run(call, Traffic(*call.reachable))
    moved = traffic.loaded + traffic.stored
    return Evidence(dict(call.outputs), error, moved / call.minimum_bytes if call.minimum_bytes else None)


def emulated(case: Case, target: str) -> Evidence:
    """Run a case as the PTX for `target`, in a process that does not interpret."""
    from .emulator import emulating

    call = case.build(Random())
    _, error = _run(call, emulating(target, reachable=call.reachable))
    return Evidence(dict(call.outputs), error)


def _run(call: Call, surroundings: AbstractContextManager[Seen]) -> tuple[Seen, float]:
    truths = call.expected()  # first, because a launch may change its inputs
    with surroundings as seen:
        call.launch()
    return seen, max(disagreement(call.outputs[name], truth) for name, truth in truths.items())


def same_values(one: Tensor, other: Tensor) -> bool:
    """Equal element for element, the sign of a zero included; a NaN equals any other."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    both_nan = one.isnan() & other.isnan()
    return bool(((one.view(bits) == other.view(bits)) | both_nan).all())
