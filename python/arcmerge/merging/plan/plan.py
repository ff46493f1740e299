"""Recipe and headers -> a job per output tensor.

Everything that can be known before a weight is read is decided and checked here: which tensors meet, under which
parameters, in which type, and which of them need no arithmetic at all. Problems are collected and raised together,
one line each; nothing has been written by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.errors import Problems
from arcmerge.merging.methods.method import Method
from arcmerge.merging.plan.config_layers import at, change_layers, levels
from arcmerge.merging.plan.job_maker import JobMaker
from arcmerge.merging.plan.outside_layers import Beside
from arcmerge.merging.plan.parents import fault, says_tied
from arcmerge.merging.plan.slices import are_in_place, layers, length, with_layers
from arcmerge.merging.plan.tensor_job import Job
from arcmerge.merging.plan.tensor_names import Names, is_before
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.recipe import Recipe, Slice


@dataclass(frozen=True)
class Plan:
    """All jobs in the order of the network, and what the output's config.json has to say of them.

    source_layers: for every output layer the model and its layer that it descends from, the donor's where it has one.
    depth: layers of the donor. vocab_size: rows of the embedding, None for as many as the donor's. tied: whether the
    head is the embedding, None for as the donor says. notes: what was not merged, and what became of it.
    """

    recipe: Recipe
    method: Method
    donor: ModelReference
    jobs: tuple[Job, ...]
    source_layers: tuple[tuple[ModelReference, int], ...]
    depth: int
    vocab_size: int | None
    tied: bool | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def make_plan(
    recipe: Recipe,
    method: Method,
    checkpoints: Mapping[ModelReference, Checkpoint],
    *,
    vocabulary_rows: int | None = None,
    truncate_embeddings: bool = False,
    mix_architectures: bool = False,
) -> Plan:
    """Decide every output tensor of `recipe`.

    checkpoints: one for every model the recipe names.
    vocabulary_rows: rows of the vocabulary the inputs are aligned to, None where rows meet by their number.
    truncate_embeddings: cut vocabularies of unequal length to their common rows instead of refusing them.
    mix_architectures: let checkpoints of different architectures meet (mergekit's --allow-crimes).

    Raises ArcmergeError with one line per problem.
    """
    return _Planner(recipe, method, checkpoints, vocabulary_rows, truncate_embeddings, mix_architectures).plan()


class _Planner:
    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        checkpoints: Mapping[ModelReference, Checkpoint],
        vocabulary_rows: int | None,
        truncate_embeddings: bool,
        mix_architectures: bool,
    ) -> None:
        self.recipe = recipe
        self.method = method
        self.checkpoints = checkpoints
        self.vocabulary_rows = vocabulary_rows
        self.mix_architectures = mix_architectures
        self.names = {model: Names(checkpoint) for model, checkpoint in checkpoints.items()}
        self.donor = recipe.base_model or recipe.slices[0].sources[0].model
        self.problems = Problems()
        self.warnings: list[str] = []
        self.jobs = JobMaker(
            recipe, method, checkpoints, self.donor, vocabulary_rows, truncate_embeddings, self.problems
        )

    def plan(self) -> Plan:
        for model in self.checkpoints:
            self._check_parent(model)
        self.problems.raise_if_any()
        depths = {model: names.depth for model, names in self.names.items()}
        slices = with_layers(self.recipe, self.method, depths, self.problems)
        self.problems.raise_if_any()
        in_place = are_in_place(slices, depths)

        jobs: list[Job | None] = []
        source_layers: list[tuple[ModelReference, int]] = []
        jobs += self._outer(slices[0], before=True)
        for piece in slices:
            count = length(piece)
            origin = next((source for source in piece.sources if source.model == self.donor), piece.sources[0])
            for step in range(count):
                u = step / (count - 1) if count > 1 else 1.0
                source_layers.append((origin.model, layers(origin)[0] + step))
                jobs += self._layer(piece, step, u, len(source_layers) - 1, source_layers[-1][1])
        jobs += self._outer(slices[-1], before=False)
        head, tied = self._head(slices[-1])
        jobs.append(head)
        beside = Beside(self.names, self.donor, self.jobs)
        jobs += beside.prediction(slices[-1], len(source_layers), in_place)
        jobs += beside.whole()
        self._check_layers(source_layers, in_place)
        made = tuple(job for job in jobs if job is not None)
        vocab_size = self._check_vocabulary(made)
        self.problems.raise_if_any()
        return Plan(
            recipe=self.recipe,
            method=self.method,
            donor=self.donor,
            jobs=made,
            source_layers=tuple(source_layers),
            depth=depths[self.donor],
            vocab_size=vocab_size,
            tied=tied,
            notes=tuple(beside.notes),
            warnings=tuple(self.warnings),
        )

    def _check_parent(self, model: ModelReference) -> None:
        if sentence := fault(self.checkpoints[model], self.names[model]):
            self.problems.add(f"{model}: {sentence}")
            return
        ours, theirs = (self.checkpoints[name].config.get("architectures") for name in (self.donor, model))
        if ours != theirs and not self.mix_architectures:
            self.problems.add(
                f"{model} is a {_listed(theirs)} and {self.donor} a {_listed(ours)}; models of one architecture can be "
                "merged (--allow-crimes tries all the same)"
            )

    def _check_layers(self, source_layers: Sequence[tuple[ModelReference, int]], in_place: bool) -> None:
        """What the donor's config.json and tensors outside the layers say of single layers must hold for these."""
        donor = self.names[self.donor]
        if not in_place and (names := donor.of_each_layer()):
            self.problems.add(
                f"{names[0]}: serves several of the {donor.depth} layers of {self.donor}, so that whole models can be "
                "merged, but no slices of them; leave the layer ranges out"
            )
        for name, has in self._misplaced(source_layers):
            found = "no layer between the ends of {} has such a tensor" if has else "only this layer of {} has none"
            self.problems.add(
                f"{name}: {found.format(self.donor)}, so its layer must stay where it is, and be there once; "
                "give other layer ranges"
            )
        config = self.checkpoints[self.donor].config
        kinds = (
            [frozenset(rests) for _, rests in sorted(donor.layers.items())],
            [frozenset(self.names[model].layers[layer]) for model, layer in source_layers],
        )
        for path in levels(config):
            sources = [(at(self.checkpoints[model].config, path), layer) for model, layer in source_layers]
            change = change_layers(at(config, path), donor.depth, sources, kinds)
            for sentence in change.problems:
                self.problems.add(f"{self.donor}: config.json's {sentence}; give other layer ranges")
            self.warnings += [f"{self.donor}: config.json's {sentence}" for sentence in change.warnings]

    def _misplaced(self, source_layers: Sequence[tuple[ModelReference, int]]) -> list[tuple[str, bool]]:
        """Tensors that the first or last layer of the donor has beside those of all others, or has not, and whether.

        Of layers that are not where they were.
        """
        donor = self.names[self.donor]
        inner = [donor.layers[layer] for layer in range(1, donor.depth - 1)]
        if not inner or any(rests != inner[0] for rests in inner):
            return []
        found = []
        for end, place in ((0, 0), (donor.depth - 1, len(source_layers) - 1)):
            places = [position for position, (_, layer) in enumerate(source_layers) if layer == end]
            more, less = donor.layers[end] - inner[0], inner[0] - donor.layers[end]
            if bool(more) != bool(less) and places != [place]:
                found.append((donor.in_layer(end, min(more or less)), bool(more)))
        return found

    def _check_vocabulary(self, jobs: Iterable[Job]) -> int | None:
        """One vocabulary for the whole network: its embedding comes from the first slice, its head from the last.

        Returns the rows of the embedding, None for as many as the donor's.
        """
        donor, tensors = self.names[self.donor], self.checkpoints[self.donor].tensors
        rows = {
            job.output.name: job.output.shape[0]
            for job in jobs
            if any(self.names[item.model].is_vocabulary(item.info.name) for item in job.inputs)
        }
        # Some embeddings have rows for more than tokens: images, prompts, a start of the text.
        ends = [tensors[name].shape[0] for name in (donor.embedding, donor.head) if name]
        more = len(set(ends)) > 1
        if self.vocabulary_rows is not None and not rows:
            self.problems.add(
                "tokenizer: no tensor is called '...embed_tokens.weight' or by another name of an embedding, so none "
                "can be aligned by token; leave the tokenizer block out"
            )
        if len(set(rows.values())) > 1 and not more:
            found = ", ".join(f"{name} {count}" for name, count in rows.items())
            self.problems.add(
                f"the embedding and the head must have a row for each token, got rows {found}; "
                "add 'tokenizer_source: union' (or base), or end in a slice of models with the vocabulary of the first"
            )
        unlike = [name for name in donor.outer.values() if "embed" in name and "per_layer" in name]
        unlike += [donor.embedding] if donor.embedding and more else []
        if self.vocabulary_rows is not None and unlike:
            self.problems.add(
                f"tokenizer: {unlike[0]} has other rows than one for each token, which cannot be aligned; leave the "
                "tokenizer block out"
            )
        count = rows.get(donor.embedding or donor.head or "")
        return None if not ends or count == ends[0] else count

    def _outer(self, piece: Slice, *, before: bool) -> Iterator[Job | None]:
        """The tensors before or after the layers, the head left out."""
        stored: dict[str, tuple[ModelReference, str]] = {}
        for model in dict.fromkeys([self.donor, *(source.model for source in piece.sources)]):
            for role, name in self.names[model].outer.items():
                stored.setdefault(role, (model, name))
        used = {role for source in piece.sources for role in self.names[source.model].outer}
        for role, (owner, name) in stored.items():
            if role in used and is_before(name) == before:
                names = [self.names[source.model].stored(role, name) for source in piece.sources]
                output = self.names[self.donor].stored(role, name)
                vocabulary = self.names[owner].is_vocabulary(name)
                yield self.jobs.merged(output, piece, names, 0.0, vocabulary=vocabulary)

    def _layer(self, piece: Slice, step: int, u: float, output_layer: int, origin: int) -> Iterator[Job | None]:
        found = [(self.names[source.model], layers(source)[0] + step) for source in piece.sources]
        rests = dict.fromkeys(rest for names, layer in found for rest in sorted(names.layers[layer]))
        donor = self.names[self.donor]
        for rest in rests:
            names = [names.in_layer(layer, rest) for names, layer in found]
            yield self.jobs.merged(donor.in_layer(output_layer, rest), piece, names, u)
        for rest in sorted(donor.buffers.get(origin, ())):
            name = donor.in_layer(origin, rest)
            yield self.jobs.whole(donor.in_layer(output_layer, rest), self.donor, name, as_stored=True)

    def _head(self, piece: Slice) -> tuple[Job | None, bool | None]:
        """The job of the output head, and what config.json has to say of it, None for what it says.

        A head is a tensor of its own only where some parent has one that differs from its embedding; the tied
        parents then stand in with their embedding.
        """
        donor = self.names[self.donor]
        says = says_tied(self.checkpoints[self.donor].config)
        models = [source.model for source in piece.sources]
        own = [self._has_own_head(model) for model in models]
        # Where the embedding of the result comes from. A model with a head of its own has none that is a head.
        first = [source.model for source in self.recipe.slices[0].sources]
        if not any(own) and not any(map(self._has_own_head, first)):
            left_out = donor.head is not None and donor.embedding is not None
            return None, True if left_out and says is not True else None
        heads = [self.names[model].head for model in dict.fromkeys([self.donor, *models, *first])]
        output = next(head for head in heads if head)
        names = [
            (self.names[model].head if of_its_own else self.names[model].embedding) or output
            for model, of_its_own in zip(models, own, strict=True)
        ]
        # An embedding that stands in for a head is set as the head it is here, filters of the recipe included.
        job = self.jobs.merged(output, piece, names, 0.0, asked=[output] * len(names), vocabulary=True)
        # A head of other shape than the embedding, as of CPM-Ant, is none that the key speaks of. Nor are those of
        # BigBird-Pegasus, whose parents all say that they are tied and store heads that are not.
        tensors = self.checkpoints[self.donor].tensors
        alike = donor.head and donor.embedding and tensors[donor.head].shape == tensors[donor.embedding].shape
        untied = any(says_tied(self.checkpoints[model].config) is not True for model in models)
        made = not self._has_own_head(self.donor) or (says is True and alike and untied)
        return job, False if made and says is not False and donor.embedding is not None else None

    def _has_own_head(self, model: ModelReference) -> bool:
        checkpoint, names = self.checkpoints[model], self.names[model]
        head, embedding = names.head, names.embedding
        if head is None or embedding is None:
            return head is not None
        if checkpoint.tensors[head].shape != checkpoint.tensors[embedding].shape:
            return True
        return not _same_bytes(checkpoint.tensor_bytes(head), checkpoint.tensor_bytes(embedding))


def _listed(words: Sequence[str] | None) -> str:
    return ", ".join(words) if words else "model without a named architecture"


def _same_bytes(a: memoryview, b: memoryview, step: int = 1 << 24) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(np.frombuffer(a[at : at + step], np.uint8), np.frombuffer(b[at : at + step], np.uint8))
        for at in range(0, len(a), step)
    )
