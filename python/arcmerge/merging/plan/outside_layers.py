"""Jobs of the tensors that a checkpoint has in addition to its decoder.

Layers for multi-token prediction are merged if whole models are merged. Towers for other media, their projectors, and
buffers come unchanged from one model, because parts of two models do not fit together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from arcmerge.errors import counted
from arcmerge.merging.plan.job_maker import JobMaker, Part
from arcmerge.merging.plan.tensor_job import Job
from arcmerge.merging.plan.tensor_names import TensorNames, kind_of, tower_of
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.recipe import Slice


@dataclass(frozen=True)
class OutsideLayers:
    """Makes the jobs of the tensors outside the decoder.

    Args:
        names: the tensor names of each model.
        donor: the model that unchanged tensors come from.
        jobs: maker of the jobs.
        notes: sentences about tensors that are not merged like the decoder.
    """

    names: Mapping[ModelReference, TensorNames]
    donor: ModelReference
    jobs: JobMaker
    notes: list[str] = field(default_factory=list)

    def prediction(self, slice_: Slice, depth: int, in_place: bool) -> Iterator[Part | None]:
        """Layers for multi-token prediction: merged if whole models are merged and all have them, else the donor's."""
        of_donor = self._prediction_names(self.donor)
        found = {source.model: self._prediction_names(source.model) for source in slice_.sources}
        merged = in_place and all(names.keys() == of_donor.keys() for names in found.values())
        for key, name in of_donor.items():
            output = name if key[0] is None else self.names[self.donor].in_layer(depth + key[0], key[1])
            vocabulary = self.names[self.donor].is_vocabulary(name)
            if merged:
                names = [found[source.model][key] for source in slice_.sources]
                yield self.jobs.merged(output, slice_, names, 1.0, vocabulary=vocabulary)
            else:
                yield self.jobs.whole(output, self.donor, name, vocabulary=vocabulary)
        what = "multi-token prediction"
        if merged:
            self._note(what, of_donor.values(), "merged like a layer after the last one")
        else:
            self._note_whole(
                what, {self.donor: list(of_donor.values()), **{m: list(n.values()) for m, n in found.items()}}
            )

    def _prediction_names(self, model: ModelReference) -> dict[tuple[int | None, str], str]:
        """Stored names by (layer counted from the end of the decoder, name in the layer), or by (None, role)."""
        names = self.names[model]
        layers: dict[tuple[int | None, str], str] = {
            (layer - names.depth, rest): names.in_layer(layer, rest)
            for layer, rests in sorted(names.prediction_layers.items())
            for rest in sorted(rests)
        }
        return {**layers, **{(None, names.role(name)): name for name in names.prediction}}

    def whole(self) -> Iterator[Job]:
        """Towers, projectors and buffers: unchanged from the donor."""
        donor = self.names[self.donor]
        for name in donor.towers:
            yield self.jobs.whole(name, self.donor, name)
        for name in donor.outer_buffers:
            yield self.jobs.whole(name, self.donor, name, as_stored=True)
        towers = {model: names.towers for model, names in self.names.items()}
        self._note_whole(", ".join(dict.fromkeys(map(tower_of, chain(*towers.values())))), towers)
        buffers = {model: [*names.outer_buffers, *names.layer_buffers()] for model, names in self.names.items()}
        self._note_whole(", ".join(dict.fromkeys(map(kind_of, chain(*buffers.values())))), buffers)

    def _note_whole(self, what: str, found: Mapping[ModelReference, Sequence[str]]) -> None:
        if of_donor := found[self.donor]:
            self._note(what, of_donor, f"copied from {self.donor}")
        else:
            self._note(what, next(filter(None, found.values()), ()), f"left out, because {self.donor} has none")

    def _note(self, what: str, names: Collection[str], outcome: str) -> None:
        if names and len(self.names) > 1:
            self.notes.append(f"{what} ({counted(len(names), 'tensor')}) {outcome}")
