"""One lock per model: threads take turns, forked processes start unlocked, and daemon threads pause at exit."""

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
S = TypeVar("S", bound="LockedModel")

# How long, in seconds, the exit of a process waits for the step of a daemon thread: a prompt of some thousand tokens.
_EXIT_TIMEOUT = 30.0


class LockedModel:
    """Base class of a model that several threads may share.

    Attributes:
        lock: reentrant; a call holds it from beginning to end, so that it sees one state of the weights.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._paused = threading.Event()
        _models.add(self)

    def pause_if_exiting(self) -> None:
        """Blocks forever in a daemon thread whose process is exiting; calls run it between their steps.

        Python stops such a thread in the middle of a computation while the memory it uses is being freed.
        """
        if _exiting.is_set() and threading.current_thread() is not threading.main_thread():
            self._paused.set()
            threading.Event().wait()

    def wait_until_idle(self, deadline: float) -> None:
        """Wait until no other thread is in a step, or for the deadline (time.monotonic); no later call starts."""
        while not self.lock.acquire(timeout=0.01):
            if self._paused.is_set() or time.monotonic() > deadline:
                return


def with_lock(function: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Decorator: the function holds the lock of its first argument."""

    @wraps(function)
    def call(model: S, /, *arguments: P.args, **named: P.kwargs) -> R:
        with model.lock:
            return function(model, *arguments, **named)

    return call


_models: WeakSet[LockedModel] = WeakSet()
_exiting = threading.Event()


@atexit.register
def _at_exit() -> None:
    """Stop the daemon threads, the only ones left: Python has waited for the others."""
    if threading.active_count() == 1:
        return
    _exiting.set()
    deadline = time.monotonic() + _EXIT_TIMEOUT
    for model in list(_models):
        model.wait_until_idle(deadline)
    time.sleep(0.05)  # for threads between two calls to reach the next call, which blocks


def _after_fork() -> None:
    """Unlock the models of a forked process, which has only one of its parent's threads.

    No other thread is left to release a lock, and PyTorch's operations would wait forever for OpenMP's threads unless
    they are told to use none.
    """
    if _models:
        torch.set_num_threads(1)
    for model in _models:
        model.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
