"""The order in which lanes at different places of a program go on.

Lanes that go different ways are groups with a program counter each. The group that is furthest behind goes next, and
groups that meet go on together: what the compiler joins again after a branch joins again here. At a barrier a group
waits until nothing else can run.

Blocks start in random order. Before an access by which blocks may wait for each other, such as an atomic, some of them
are held, at random, while others go on, to their end or to the next such access. Lanes of one warp are held together,
because they wait for one another at shuffles. What happens in between is the same in every order, or else a fault, see
owners.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .formats import Array

WARP = 32


@dataclass(eq=False)
class Group:
    """Lanes at one place of the program.

    waiting: at the barrier number `barrier`, which is of `count` threads; 0: of all. parked: at an mbarrier. held:
    before an access to memory by which blocks communicate. due: held before, and no more. warps: how many have a lane
    among them.
    """

    counter: int
    mask: Array
    waiting: bool = False
    held: bool = False
    due: bool = False
    parked: bool = False
    barrier: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        self.size = int(np.count_nonzero(self.mask))
        self.warps = int(np.count_nonzero(self.mask.reshape(-1, WARP).any(axis=1)))

    def part(self, mask: Array) -> Group:
        """The lanes of this group that are in `mask`."""
        return replace(self, mask=self.mask & mask)

    @property
    def running(self) -> bool:
        return not self.waiting and not self.held and not self.parked


class Schedule:
    """block_of: the block of each lane."""

    def __init__(self, block_of: Array, seed: int) -> None:
        self._block_of = block_of
        self._random = np.random.default_rng(seed)

    def order(self, blocks: int) -> Array:
        return self._random.permutation(blocks)

    def next_of(self, groups: list[Group]) -> tuple[Group, list[Group], int | None]:
        """The group that goes next, the others, and where the first of these is, which it must not pass.

        The group takes up those that are at its place.
        """
        group = min((group for group in groups if group.running), key=lambda group: group.counter)
        here = [other for other in groups if other.running and other.counter == group.counter]
        for other in here:
            group.mask = group.mask | other.mask
        group.__post_init__()
        others = [other for other in groups if other not in here]
        return group, others, min((other.counter for other in others if other.running), default=None)

    def holds(self, group: Group, groups: list[Group]) -> bool:
        """Hold some of the blocks of a group that is not due. If so, `groups`, the others, gets its parts."""
        blocks = np.unique(self._block_of[group.mask])
        if group.due or (blocks.size == 1 and not groups):
            return False
        held = self._random.random(blocks.size) < 0.5
        if not held.any():
            return False
        later = group.mask & np.isin(self._block_of, blocks[held])
        same_warps = _of_same_warps(later)
        for other in [other for other in groups if other.running and (other.mask & same_warps).any()]:
            groups.remove(other)
            groups += [replace(other.part(same_warps), held=True)]
            groups += [part for part in [other.part(~same_warps)] if part.size]
        groups.append(Group(group.counter, later, held=True))
        if not held.all():
            groups.append(Group(group.counter, group.mask & ~later, due=True))
        return True

    def stopped(self, groups: list[Group]) -> tuple[list[Group], list[Group]]:
        """Every group waits or is held: those whose barriers may open, and the others, of which one may go on.

        Barriers may open for blocks of which no lane is held.
        """
        held = [group for group in groups if group.held]
        waiting = [group for group in groups if group.waiting]
        if not held:
            return waiting, [group for group in groups if group.parked]
        stopped = np.isin(self._block_of, np.unique(self._block_of[np.any([group.mask for group in held], axis=0)]))
        ready = [part for group in waiting if (part := group.part(~stopped)).size]
        if ready and self._random.random() < 0.5:
            rest = [part for group in waiting if (part := group.part(stopped)).size]
            return ready, held + rest + [group for group in groups if group.parked]
        chosen = held[self._random.integers(len(held))]
        same_warps = _of_same_warps(chosen.mask)
        for group in held:
            if (group.mask & same_warps).any():
                group.held, group.due = False, True
        return [], groups


def _of_same_warps(mask: Array) -> Array:
    """The lanes of all warps that have a lane in `mask`."""
    return mask.reshape(-1, WARP).any(axis=1).repeat(WARP)
