"""The number of threads. csrc/cpu/system/default_threads.cpp decides the default."""

from __future__ import annotations

import operator
import sys

from arcmerge import _C


def get_num_threads() -> int:
    """The number of threads that merges and the operations of a model on the CPU use.

    By default it is the number of processors that the process may run on, at most the CPU quota of its control group
    (rounded up), and at most OMP_NUM_THREADS where that is set.
    """
    return _C.threads()


def set_num_threads(threads: int) -> None:
    """Set the number of threads that merges and the operations of a model on the CPU use.

    Results do not depend on it. PyTorch's own operations have :func:`torch.set_num_threads`.

    Args:
        threads: a whole number from 1 to 1024.

    Raises:
        ValueError: for anything else.
    """
    try:
        if isinstance(threads, bool):
            raise TypeError
        _C.set_threads(operator.index(threads))
    except TypeError:
        raise ValueError(f"'threads' must be a whole number from 1 to {_C.MAX_THREADS}, got {threads!r:.80}") from None


def use_threads(threads: int | None) -> None:
    """Set the threads of a command, PyTorch's included. None gives PyTorch at most the default."""
    if threads is not None:
        set_num_threads(threads)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads or min(torch.get_num_threads(), get_num_threads()))
