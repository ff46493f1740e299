"""Random masks that the statistics pass drew, kept as bits for passes that write, which need not draw them again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arcmerge.merging.execution import work_units
from arcmerge.merging.execution.work_units import Piece
from arcmerge.merging.methods.measure import Selection

# Two masks of the embedding of Gemma-2 2B take 147 MB. Pieces that find no room are drawn twice.
MASK_BYTES = 192 << 20
# Elements whose bits lie together, and the bytes of these bits (_C.Selection.masks).
_BLOCK, _BLOCK_BYTES = 256, 32


@dataclass
class _Masks:
    """The masks of the inputs of a piece, uint8 (inputs, bytes)."""

    selection: Selection
    bits: NDArray[np.uint8]
    missing: int  # elements that no rule has used yet

    def addresses(self, first: int) -> list[int]:
        """The addresses at which the masks of whole tensors would start."""
        return [mask.ctypes.data - first // _BLOCK * _BLOCK_BYTES for mask in self.bits]


@dataclass(frozen=True)
class Part:
    """A part of a piece, and the addresses of the masks of its inputs (_C.Selection.masks), if there are any."""

    first: int
    count: int
    masks: list[int]


class MaskStore:
    """The masks of pieces of up to PIECE_ELEMENTS elements, from multiples of it on. Any thread may call it.

    Args:
        room: the bytes of all masks together; None for MASK_BYTES.
        keeps: whether masks stay for further passes; otherwise they are dropped once all elements of theirs have been
            part of a piece.
    """

    def __init__(self, room: int | None = None, *, keeps: bool = False) -> None:
        self._of: dict[tuple[int, int], _Masks] = {}
        self._room = MASK_BYTES if room is None else room
        self._keeps = keeps
        self._lock = threading.Lock()

    def new(self, piece: Piece, selection: Selection) -> list[int]:
        """The addresses to which the masks of a piece are to be written; none if they are not to be kept."""
        if not selection.random or piece.first % _BLOCK or piece.first % work_units.PIECE_ELEMENTS:
            return []
        size = -(-piece.count // _BLOCK) * _BLOCK_BYTES
        bits = np.empty((len(selection.keys), size), np.uint8)
        with self._lock:
            self._drop((piece.job, piece.first))
            if bits.nbytes > self._room:
                return []
            self._room -= bits.nbytes
            masks = self._of[piece.job, piece.first] = _Masks(selection, bits, piece.count)
        return masks.addresses(piece.first)

    def parts(self, piece: Piece, selection: Selection) -> Iterator[Part]:
        """The parts of a piece, each with its masks if the selection draws the same ones."""
        first, end = piece.first, piece.first + piece.count
        while first < end:
            start = first // work_units.PIECE_ELEMENTS * work_units.PIECE_ELEMENTS
            count = min(end, start + work_units.PIECE_ELEMENTS) - first if selection.random else end - first
            with self._lock:
                masks = self._of.get((piece.job, start))
            known = masks is not None and _draws_alike(masks.selection, selection)
            yield Part(first, count, masks.addresses(start) if masks is not None and known else [])
            if masks is not None and not self._keeps:
                with self._lock:
                    masks.missing -= count
                    if masks.missing <= 0 and self._of.get((piece.job, start)) is masks:
                        self._drop((piece.job, start))
            first += count

    def _drop(self, key: tuple[int, int]) -> None:
        if (masks := self._of.pop(key, None)) is not None:
            self._room += masks.bits.nbytes


def _draws_alike(first: Selection, second: Selection) -> bool:
    """Whether random numbers keep the same elements."""
    return (first.keys, first.probabilities, first.joint, first.rounded) == (
        second.keys,
        second.probabilities,
        second.joint,
        second.rounded,
    )
