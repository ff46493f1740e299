"""Vector clocks: how far each stream has come, as far as a stream or the host knows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


class Clock(dict[int, int]):
    """The last tick of each stream, by its id, that has happened before; streams that are missing have 0."""

    def join(self, other: Mapping[int, int]) -> None:
        """Add everything that `other` knows."""
        for stream, tick in other.items():
            if tick > self.get(stream, 0):
                self[stream] = tick

    def array(self, streams: int) -> NDArray[np.int32]:
        """The ticks of streams 0 to `streams`; stream 0 stands for none."""
        ticks = np.zeros(streams + 1, np.int32)
        for stream, tick in self.items():
            ticks[stream] = tick
        return ticks
