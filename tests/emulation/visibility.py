"""Whether a program of the interpreter may read what another one has stored in the same launch.

It may if its own atomic acquired what an atomic of the other one released, on the same address, with `tl.debug_barrier`
between the stores and that atomic. An atomic is made by one thread of a program; without the barrier the stores of
other threads may come after it, although the barriers that a compiler inserts for its own sake often hide this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from triton._C.libtriton import ir

from .intervals import Intervals

Program = tuple[int, int, int]

_ACQUIRING = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_RELEASING = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)


class _Event(NamedTuple):
    """A load, store, barrier or atomic of a program, the bytes that it touches and, of an atomic, its order."""

    kind: str
    program: Program
    touched: Intervals | None = None
    order: Any = None


class Visibility:
    """What the programs of a launch do, in the order in which they run."""

    def __init__(self) -> None:
        self._events: list[_Event] = []

    def load(self, program: Program, touched: Intervals) -> None:
        self._events.append(_Event("load", program, touched))

    def store(self, program: Program, touched: Intervals) -> None:
        self._events.append(_Event("store", program, touched))

    def barrier(self, program: Program) -> None:
        self._events.append(_Event("barrier", program))

    def atomic(self, program: Program, touched: Intervals, order: Any) -> None:
        self._events.append(_Event("atomic", program, touched, order))

    def early(self) -> Iterator[tuple[Program, Program, Intervals]]:
        """The loads of what another program stored and the reader may not know: reader, writer, what is loaded."""
        stores: list[int] = []
        fresh: dict[Program, set[int]] = defaultdict(set)  # stores since the last barrier
        known: dict[Program, set[int]] = defaultdict(set)
        released: dict[int, set[int]] = defaultdict(set)  # by address
        for number, (kind, program, touched, order) in enumerate(self._events):
            if kind == "barrier":
                known[program] |= fresh.pop(program, set())
                continue
            assert touched is not None
            if kind == "store":
                stores.append(number)
                fresh[program].add(number)
            elif kind == "atomic":
                for address in touched.starts.tolist():
                    if order in _ACQUIRING:
                        known[program] |= released[address]
                    if order in _RELEASING:
                        released[address] |= known[program]
            else:
                for store in stores:
                    _, writer, stored, _ = self._events[store]
                    assert stored is not None
                    if writer != program and store not in known[program] and touched.shared(stored):
                        yield program, writer, touched
