"""Small programs for the fake CUDA runtime."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from emulation.cuda import Fault, cuda, is_possible

needs_fake_devices = pytest.mark.skipif(
    torch.cuda.is_available() or not is_possible(), reason="torch has a CUDA of its own, which cannot be replaced"
)


def range_on(device: str, count: int = 8) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32, device=device)


def busy(device: str = "cuda") -> tuple[torch.cuda.Stream, torch.Tensor]:
    """A stream of its own with a tensor that it has just written."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        return stream, range_on(device)


def refused(match: str, order: str, program: Callable[[], object]) -> None:
    """The program is a fault, at the latest when everything has been executed."""
    with pytest.raises(Fault, match=match), cuda(devices=2, order=order):
        program()


def copied_to_pinned() -> torch.Tensor:
    """Pinned memory under a copy from a device."""
    pinned = torch.zeros(8, pin_memory=True)
    pinned.copy_(range_on("cuda"), non_blocking=True)
    return pinned
