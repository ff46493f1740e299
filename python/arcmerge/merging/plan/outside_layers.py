"""What a checkpoint holds beside its decoder, and what becomes of it: it is merged, or comes whole from one parent.

Layers for multi-token prediction stand on top of the decoder and are merged with it where whole models meet. Towers for
other media, what connects them, and buffers are not: halves of two do not fit together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain

from arcmerge.merging.plan.job_maker import JobMaker
from arcmerge.merging.plan.tensor_job import Job
from arcmerge.merging.plan.tensor_names import Names, kind_of, tower_of
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.recipe import Slice


class Beside:
    """notes: what was not merged as the decoder is, and what became of it."""

    def __init__(self, names: Mapping[ModelReference, Names], donor: ModelReference, jobs: JobMaker) -> None:
        self._names = names
        self._donor = donor
        self._jobs = jobs
        self.notes: list[str] = []

    def prediction(self, piece: Slice, depth: int, in_place: bool) -> Iterator[Job | None]:
        """Layers for multi-token prediction: merged where whole models meet that all have them, else the donor's."""
        donors = self._prediction_names(self._donor)
        found = {source.model: self._prediction_names(source.model) for source in piece.sources}
        merged = in_place and all(names.keys() == donors.keys() for names in found.values())
        for place, name in donors.items():
            output = name if place[0] is None else self._names[self._donor].in_layer(depth + place[0], place[1])
            vocabulary = self._names[self._donor].is_vocabulary(name)
            if merged:
                names = [found[source.model][place] for source in piece.sources]
                yield self._jobs.merged(output, piece, names, 1.0, vocabulary=vocabulary)
            else:
                yield self._jobs.whole(output, self._donor, name, vocabulary=vocabulary)
        what = "multi-token prediction"
        if merged:
            self._note(what, donors.values(), "merged like a layer behind the last")
        else:
            self._note_whole(
                what, {self._donor: list(donors.values()), **{m: list(n.values()) for m, n in found.items()}}
            )

    def _prediction_names(self, model: ModelReference) -> dict[tuple[int | None, str], str]:
        """Stored names by place: the layer behind the last and the name within it, or None and the role."""
        names = self._names[model]
        behind: dict[tuple[int | None, str], str] = {
            (number - names.depth, rest): names.in_layer(number, rest)
            for number, rests in sorted(names.prediction_layers.items())
            for rest in sorted(rests)
        }
        return {**behind, **{(None, names.role(name)): name for name in names.prediction}}

    def whole(self) -> Iterator[Job]:
        """Towers, what connects them, and buffers: the donor's, as they are."""
        donor = self._names[self._donor]
        for name in donor.towers:
            yield self._jobs.whole(name, self._donor, name)
        for name in donor.outer_buffers:
            yield self._jobs.whole(name, self._donor, name, as_stored=True)
        towers = {model: names.towers for model, names in self._names.items()}
        self._note_whole(", ".join(dict.fromkeys(map(tower_of, chain(*towers.values())))), towers)
        buffers = {model: [*names.outer_buffers, *names.layer_buffers()] for model, names in self._names.items()}
        self._note_whole(", ".join(dict.fromkeys(map(kind_of, chain(*buffers.values())))), buffers)

    def _note_whole(self, what: str, found: Mapping[ModelReference, Sequence[str]]) -> None:
        if donors := found[self._donor]:
            self._note(what, donors, f"taken whole from {self._donor}")
        else:
            self._note(what, next(filter(None, found.values()), ()), f"left out, as {self._donor} has none")

    def _note(self, what: str, names: Collection[str], fate: str) -> None:
        if names and len(self._names) > 1:
            self.notes.append(f"{what} ({len(names)} tensor{'s' * (len(names) > 1)}) {fate}")
