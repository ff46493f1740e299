"""Threads and processes that share a model: one call at a time, a forked process that computes on, an end in peace."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakSet

import torch

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Shared")


# Seconds that the end of a process waits for the step of a daemon thread: a prompt of some thousand tokens.
_LONGEST_STEP = 30.0


class Shared:
    """What threads share. turn: a lock that its calls hold, so that each sees one state; a thread may take it again."""

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self._stands_still = threading.Event()
        _all.add(self)

    def stand_still_at_end(self) -> None:
        """For calls, between their steps: does not return to a daemon thread whose process is at its end.

        Python takes such a thread off in the middle of whatever it computes, while what it uses is taken down.
        """
        if _ending.is_set() and threading.current_thread() is not threading.main_thread():
            self._stands_still.set()
            threading.Event().wait()

    def await_end(self, deadline: float) -> None:
        """Returns when no other thread is in the middle of a step, or at the deadline. No call begins after it."""
        while not self.turn.acquire(timeout=0.01):
            if self._stands_still.is_set() or time.monotonic() > deadline:
                return


def in_turn(function: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """The function, which waits for the turn of its first argument."""

    @wraps(function)
    def call(shared: S, /, *arguments: P.args, **named: P.kwargs) -> R:
        with shared.turn:
            return function(shared, *arguments, **named)

    return call


_all: WeakSet[Shared] = WeakSet()
_ending = threading.Event()


@atexit.register
def _end() -> None:
    """Only daemon threads are left: Python has waited for the others."""
    if threading.active_count() == 1:
        return
    _ending.set()
    deadline = time.monotonic() + _LONGEST_STEP
    for shared in list(_all):
        shared.await_end(deadline)
    time.sleep(0.05)  # those between two calls come to the one that does not begin


def _after_fork() -> None:
    """A forked process has one of its parent's threads alone: nobody else is left to give a turn back, and PyTorch's
    operations would wait for ever for OpenMP's threads, unless they are told to use none.
    """
    if _all:
        torch.set_num_threads(1)
    for shared in _all:
        shared.turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
