"""Recordings of the native calls of ops, to replay them without Python: on the CPU what CUDA graphs are on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from arcmerge import _C


class Recording:
    """The native calls of the ops in `with recorded() as recording`, and the tensors that they read and write.

    Attributes:
        whole: whether every op was one native call on its arguments, without copies. replay() then computes all outputs
            again, in place, from the values of the arguments at that time. Operations of torch in between are not
            repeated.
    """

    def __init__(self) -> None:
        self.whole = True
        self._calls = _C.Recording()
        self._kept: list[object] = []

    def replay(self) -> None:
        """Repeat the calls. The recording must be whole, or some outputs would stay as they are."""
        assert self.whole
        self._calls.replay()

    def keep(self, tensor: Tensor) -> None:
        """Keep a tensor that the calls read, but that is no argument of an op."""
        self._kept.append(tensor)

    def call(self, name: str, function: Callable[..., Any], arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Call and record function(*arguments, **named), an implementation of the op `name`."""
        before = len(self._calls.names)
        self._calls.begin()
        try:
            result = function(*arguments, **named)
        finally:
            self._calls.end()
        self._kept += [arguments, named, result]
        # Calls of torch, of other ops and copies of arguments inside an op are not recorded.
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
    """The recording of this thread, or None."""
    return _thread.recording


@contextmanager
def recorded() -> Iterator[Recording]:
    """Context manager: records the ops that this thread calls inside."""
    _thread.recording = recording = Recording()
    try:
        yield recording
    finally:
        _thread.recording = None
