"""The masks of transformers' eager attention, as intervals of slots.

All layers of a forward are given the same masks. Each mask is read once a forward, by one copy to the host, because
every copy from a GPU waits for all launches before it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Found = TypeVar("Found")


class MaskRuns(NamedTuple):
    """A mask as intervals: query t of sequence b sees the slots from first[b] to end[b], up to its own slot.

    Attributes:
        first, end: [B] int64.
        slots: [T] int64, the slot of each query's own key; they follow one another.
        window: the number of slots up to its own that a query sees; 0: all.
        moved: whether an interval starts behind slot 0.
        late: the first query whose slot is behind the end of an interval; T if none is.
        queries: [n] int64, in order, b * T + t for each query whose slot is in its interval; None: all queries.
    """

    first: Tensor
    end: Tensor
    slots: Tensor
    window: int
    moved: bool
    late: int
    queries: Tensor | None

    @property
    def inside(self) -> Tensor:
        """[B, T] bool, whether the slot of a query is in the interval of its sequence."""
        return (self.slots >= self.first[:, None]) & (self.slots < self.end[:, None])

    @classmethod
    def of(cls, mask: Tensor | None, query: Tensor, key: Tensor, window: int | None) -> MaskRuns | None:
        """The intervals of a mask; None for any other mask.

        Args:
            mask: [B or 1, 1, T, S], added to the scores; None for one query that sees all keys.
            query: [B, H, T, Dh].
            key: [B, Hkv, S, Dh].
            window: of the layer.
        """
        (batch, _, tokens, _), count, device = query.shape, key.shape[2], key.device
        if mask is None:
            first = torch.zeros(batch, dtype=torch.int64, device=device)
            slots = torch.full((1,), count - 1, device=device)
            whole = cls(first, torch.full_like(first, count), slots, 0, moved=False, late=1, queries=None)
            return whole if tokens == 1 else None
        if not mask.is_floating_point() or mask.shape not in ((batch, 1, tokens, count), (1, 1, tokens, count)):
            return None
        scores, indices, steps = mask[:, 0], torch.arange(count, device=device), torch.arange(tokens, device=device)
        visible = scores == 0
        has_two_values = (visible | (scores == torch.finfo(mask.dtype).min)).all()
        seen_at_all = visible.any(dim=1)
        used = seen_at_all.to(torch.uint8)
        first, end = used.argmax(dim=1), count - used.flip(1).argmax(dim=1)
        end = end.where(seen_at_all.any(dim=1), first)
        interval = ((indices >= first[:, None]) & (indices < end[:, None]))[:, None]

        def causal(after: Tensor | int) -> tuple[MaskRuns, Tensor, Tensor]:
            """Intervals if the newest key is in the slot before `after`; if they make the mask; queries inside."""
            runs = cls(first, end, steps + (after - tokens), window or 0, moved=False, late=tokens, queries=None)
            seen = indices <= runs.slots[:, None]
            if window:
                seen &= indices > runs.slots[:, None] - window
            return runs, ((seen & interval) == visible).all(), runs.inside.sum()

        # The newest key is in the last slot, or, where a cache has free slots, in the last one that a sequence sees.
        (at_end, fits, inside), (before, fits_before, inside_before) = causal(count), causal(end.max())
        known, latest, shortest, longest, *found = read(
            has_two_values, first.max(), end.min(), end.max(), fits, inside, fits_before, inside_before
        )
        for runs, after, is_mask, number in (
            (at_end, count, found[0], found[1]),
            (before, longest, found[2], found[3]),
        ):
            if known and is_mask and after >= tokens:
                all_inside = number == len(first) * tokens
                flat = runs.inside.expand(batch, tokens).flatten().to(torch.uint8)
                order = None if all_inside else flat.argsort(descending=True, stable=True)
                return runs._replace(
                    first=first.expand(batch),
                    end=end.expand(batch),
                    moved=latest > 0,
                    late=max(0, min(tokens, shortest - (after - tokens))),
                    queries=None if order is None else order[: number * batch // len(first)],
                )
        return None


def hides_no_key(mask: Tensor | None, keys: int, layer: int) -> bool:
    """Whether a mask of eager attention lets a single query of a layer see all keys."""
    if mask is None:
        return True
    if mask.shape != (1, 1, 1, keys) or not mask.is_floating_point():
        return False
    return once_a_forward(mask, layer, "hides a key", lambda: read(mask.any())) == [0]


def read(*facts: Tensor) -> list[int]:
    """The values of tensors of one integer or truth value each. Waits for their device, once."""
    values: list[int] = torch.stack([fact.to(torch.int64) for fact in facts]).tolist()
    return values


class _Known:
    """What was found in a mask, by question, and the last layer that asked each question."""

    def __init__(self, version: int | None) -> None:
        self.version = version
        self.found: dict[Hashable, object] = {}
        self.last: dict[Hashable, int] = {}


_known = WeakTensorKeyDictionary()


def once_a_forward(mask: Tensor, layer: int | None, question: Hashable, find: Callable[[], Found]) -> Found:
    """find(), or its result for a lower layer of the same forward.

    A layer that is not above the last one is in another forward, and a mask that was changed in place has another
    version, which tensors of the inference mode do not have. layer: None if unknown; then it is always find().
    """
    if layer is None:
        return find()
    version = None if mask.is_inference() else mask._version
    known = _known.get(mask)
    if known is None or known.version != version or known.last.get(question, -1) >= layer:
        known = _known[mask] = _Known(version)
    known.last[question] = layer
    if question not in known.found:
        known.found[question] = find()
    found: Found = known.found[question]
    return found
