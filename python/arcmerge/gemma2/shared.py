"""Threads and processes that share a model: one call at a time, and a forked process that computes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakSet

import torch

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Shared")


class Shared:
    """What threads share. turn: a lock that its calls hold, so that each sees one state; a thread may take it again."""

    def __init__(self) -> None:
        self.turn = threading.RLock()
        _all.add(self)


def in_turn(function: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """The function, which waits for the turn of its first argument."""

    @wraps(function)
    def call(shared: S, /, *arguments: P.args, **named: P.kwargs) -> R:
        with shared.turn:
            return function(shared, *arguments, **named)

    return call


_all: WeakSet[Shared] = WeakSet()


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
