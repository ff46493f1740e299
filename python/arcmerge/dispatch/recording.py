"""Native calls of ops, made once and then again without Python: what a CUDA graph is on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from arcmerge import _C


class Recording:
    """The native calls of the ops in `with recorded() as recording`, and the tensors that they read and write.

    whole: every op was one native call on its arguments as they lie, so that replay() computes all outputs anew, in
    place, from what the arguments hold then. Operations of torch in between are not repeated.
    """

    def __init__(self) -> None:
        self.whole = True
        self._calls = _C.Recording()
        self._kept: list[object] = []

    def replay(self) -> None:
        assert self.whole, "a recording that is not whole would leave outputs as they are"
        self._calls.replay()

    def keep(self, tensor: Tensor) -> None:
        """Keep a tensor that the calls read although no op was given it."""
        self._kept.append(tensor)

    def call(self, name: str, function: Callable[..., Any], arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """function(*arguments, **named), which serves the op `name`; recorded."""
        before = len(self._calls.names)
        self._calls.begin()
        try:
            result = function(*arguments, **named)
        finally:
            self._calls.end()
        self._kept += [arguments, named, result]
        # An op that calls torch or another op, or copies an argument first, does more than is recorded.
        self.whole &= self._calls.names[before:] == [name] and all(
            map(Tensor.is_contiguous, _tensors([*arguments, *named.values()]))
        )
        return result


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


class _Thread(threading.local):
    recording: Recording | None = None


_thread = _Thread()


def current() -> Recording | None:
    """What this thread records to."""
    return _thread.recording


@contextmanager
def recorded() -> Iterator[Recording]:
    """Records the ops that this thread calls inside."""
    _thread.recording = recording = Recording()
    try:
        yield recording
    finally:
        _thread.recording = None
