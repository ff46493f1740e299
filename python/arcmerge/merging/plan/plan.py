"""The plan of a merge: one job for each output tensor, from the recipe and the headers of the checkpoints.

The planner decides and checks everything that can be known before a weight is read: which tensors are merged, with
which parameters, in which dtype, and which of them need no arithmetic. Problems are collected and raised together, one
line each, before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.errors import Problems
from arcmerge.merging.methods.method import Method
from arcmerge.merging.plan.config_layers import at, change_layers, levels
from arcmerge.merging.plan.job_maker import JobMaker, Part
from arcmerge.merging.plan.model_checks import check_model, says_tied
from arcmerge.merging.plan.outside_layers import OutsideLayers
from arcmerge.merging.plan.slices import are_in_place, layers, length, with_layers
from arcmerge.merging.plan.tensor_job import Job
from arcmerge.merging.plan.tensor_names import TensorNames, is_before
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.recipe import Recipe, Slice


@dataclass(frozen=True)
class Plan:
    """The jobs of a merge, and the facts that config.json of the result needs.

    Args:
        recipe: the recipe.
        method: its merge method.
        donor: the model that config.json and tensors that are not merged come from: the base model, or else the first.
        jobs: one job for each output tensor, in the order of the network.
        parts: what each job follows from.
        maker: makes the jobs from the parts.
        source_layers: for each output layer the model and the layer it comes from; the donor's if the donor is one of
            the sources.
        depth: number of layers of the donor.
        vocab_size: number of rows of the embedding; None if it is that of the donor.
        tied: whether the head is the embedding; None if it is as the donor's config.json says.
        notes: sentences about tensors that are not merged, and where they come from.
        config_warnings: sentences about doubtful entries of config.json.
    """

    recipe: Recipe
    method: Method
    donor: ModelReference
    jobs: tuple[Job, ...]
    parts: tuple[Part, ...]
    maker: JobMaker
    source_layers: tuple[tuple[ModelReference, int], ...]
    depth: int
    vocab_size: int | None
    tied: bool | None
    notes: tuple[str, ...]
    config_warnings: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about config.json, and about parameters."""
        return (*self.config_warnings, *_advice(self.jobs))

    def with_recipe(self, recipe: Recipe) -> Plan:
        """The plan of a recipe that differs in its parameters only."""
        maker = replace(self.maker, recipe=recipe, problems=Problems())
        jobs = tuple(job for job in map(maker.job, self.parts) if job is not None)
        maker.problems.raise_if_any()
        return replace(self, recipe=recipe, maker=maker, jobs=jobs)

    @property
    def seed(self) -> int | None:
        """The seed of the random numbers; None if the method draws none."""
        return self.recipe.seed if self.method.random else None


@dataclass
class Planner:
    """Plans the merge of a recipe.

    Args:
        recipe: the recipe.
        method: its merge method.
        checkpoints: a checkpoint for each model of the recipe.
        vocabulary_rows: number of rows that inputs are aligned to; None if rows are matched by index.
        truncate_embeddings: truncate vocabularies of different sizes instead of refusing them.
        mix_architectures: accept checkpoints of different architectures (mergekit's --allow-crimes).
    """

    recipe: Recipe
    method: Method
    checkpoints: Mapping[ModelReference, Checkpoint]
    vocabulary_rows: int | None = None
    truncate_embeddings: bool = False
    mix_architectures: bool = False

    def __post_init__(self) -> None:
        self.names = {model: TensorNames(checkpoint) for model, checkpoint in self.checkpoints.items()}
        self.donor = self.recipe.base_model or self.recipe.slices[0].sources[0].model
        self.problems = Problems()
        self.warnings: list[str] = []
        self.jobs = JobMaker(
            self.recipe,
            self.method,
            self.checkpoints,
            self.donor,
            self.vocabulary_rows,
            self.truncate_embeddings,
            self.problems,
        )

    def plan(self) -> Plan:
        """Decide every output tensor. Raises ArcmergeError with one sentence for each problem."""
        for model in self.checkpoints:
            self._check_model(model)
        self.problems.raise_if_any()
        depths = {model: names.depth for model, names in self.names.items()}
        slices = with_layers(self.recipe, self.method, depths, self.problems)
        self.problems.raise_if_any()
        in_place = are_in_place(slices, depths)

        found: list[Part | None] = []
        source_layers: list[tuple[ModelReference, int]] = []
        found += self._outer(slices[0], before=True)
        for slice_ in slices:
            count = length(slice_)
            origin = next((source for source in slice_.sources if source.model == self.donor), slice_.sources[0])
            for step in range(count):
                u = step / (count - 1) if count > 1 else 1.0
                source_layers.append((origin.model, layers(origin)[0] + step))
                found += self._layer(slice_, step, u, len(source_layers) - 1, source_layers[-1][1])
        found += self._outer(slices[-1], before=False)
        head, tied = self._head(slices[-1])
        found.append(head)
        outside = OutsideLayers(self.names, self.donor, self.jobs)
        found += outside.prediction(slices[-1], len(source_layers), in_place)
        found += outside.whole()
        self._check_layers(source_layers, in_place)
        parts = tuple(part for part in found if part is not None)
        jobs = tuple(job for job in map(self.jobs.job, parts) if job is not None)
        vocab_size = self._check_vocabulary(jobs)
        self.problems.raise_if_any()
        return Plan(
            recipe=self.recipe,
            method=self.method,
            donor=self.donor,
            jobs=jobs,
            parts=parts,
            maker=self.jobs,
            source_layers=tuple(source_layers),
            depth=depths[self.donor],
            vocab_size=vocab_size,
            tied=tied,
            notes=tuple(outside.notes),
            config_warnings=tuple(self.warnings),
        )

    def _check_model(self, model: ModelReference) -> None:
        if not check_model(model, self.checkpoints[model], self.names[model], self.problems):
            return
        ours, theirs = (self.checkpoints[name].config.get("architectures") for name in (self.donor, model))
        if ours != theirs and not self.mix_architectures:
            self.problems.add(
                f"{model} must have the architecture of {self.donor}, {_listed(ours)}, got {_listed(theirs)}; merge "
                "models of one architecture, or pass --allow-crimes to try it anyway"
            )

    def _check_layers(self, source_layers: Sequence[tuple[ModelReference, int]], in_place: bool) -> None:
        """Check that entries for single layers in the donor's config.json, and shared tensors, fit these layers."""
        donor = self.names[self.donor]
        if not in_place and (names := donor.of_each_layer()):
            self.problems.add(
                f"'{names[0]}' must not be in models that are merged in slices, because it serves several of the "
                f"{donor.depth} layers, got one in {self.donor}; leave the layer ranges out to merge whole models"
            )
        for layer, name, has in self._misplaced(source_layers):
            self.problems.add(
                f"{self.donor}: 'layer_range' must keep layer {layer} at its end of the network, once, because only "
                f"this layer {'has' if has else 'lacks'} '{name}', got slices that move or repeat it; give other layer "
                "ranges"
            )
        config = self.checkpoints[self.donor].config
        kinds = (
            [frozenset(rests) for _, rests in sorted(donor.layers.items())],
            [frozenset(self.names[model].layers[layer]) for model, layer in source_layers],
        )
        for path in levels(config):
            sources = [(at(self.checkpoints[model].config, path), layer) for model, layer in source_layers]
            change = change_layers(at(config, path), donor.depth, sources, kinds)
            for key, rule, got in change.problems:
                self.problems.add(
                    f"config.json of {self.donor}: '{key}' must {rule}, got {got}; give other layer ranges"
                )
            self.warnings += [f"config.json of {self.donor}: {sentence}" for sentence in change.warnings]

    def _misplaced(self, source_layers: Sequence[tuple[ModelReference, int]]) -> list[tuple[int, str, bool]]:
        """First and last layers that these slices move or repeat although their tensors differ from all other layers'.

        Each with the name of a tensor that only this layer has (True) or lacks (False).
        """
        donor = self.names[self.donor]
        inner = [donor.layers[layer] for layer in range(1, donor.depth - 1)]
        if not inner or any(rests != inner[0] for rests in inner):
            return []
        found = []
        for end, expected in ((0, 0), (donor.depth - 1, len(source_layers) - 1)):
            indices = [index for index, (_, layer) in enumerate(source_layers) if layer == end]
            more, less = donor.layers[end] - inner[0], inner[0] - donor.layers[end]
            if bool(more) != bool(less) and indices != [expected]:
                found.append((end, donor.in_layer(end, min(more or less)), bool(more)))
        return found

    def _check_vocabulary(self, jobs: Iterable[Job]) -> int | None:
        """Check that embedding and head have the same rows: the one is from the first slice, the other from the last.

        Returns the number of rows of the embedding, None if it is that of the donor.
        """
        donor, tensors = self.names[self.donor], self.checkpoints[self.donor].tensors
        rows = {
            job.output.name: job.output.shape[0]
            for job in jobs
            if any(self.names[item.model].is_vocabulary(item.info.name) for item in job.inputs)
        }
        # Some embeddings have further rows, such as for images, prompts, or the start of the text.
        ends = [tensors[name].shape[0] for name in (donor.embedding, donor.head) if name]
        more = len(set(ends)) > 1
        if self.vocabulary_rows is not None and not rows:
            self.problems.add(
                "'tokenizer' must not be set for models without an embedding, got no tensor '...embed_tokens.weight' "
                "or with another name of an embedding; leave the tokenizer block out"
            )
        if len(set(rows.values())) > 1 and not more:
            found = ", ".join(f"{name} {count}" for name, count in rows.items())
            self.problems.add(
                f"'embedding' and 'head' must have one row for each token, got rows {found}; add 'tokenizer_source: "
                "union' (or base), or end with a slice of models with the vocabulary of the first slice"
            )
        unlike = [name for name in donor.outer.values() if "embed" in name and "per_layer" in name]
        unlike += [donor.embedding] if donor.embedding and more else []
        if self.vocabulary_rows is not None and unlike:
            self.problems.add(
                f"'{unlike[0]}' must have one row for each token to be aligned by token, got other rows; "
                "leave the tokenizer block out"
            )
        count = rows.get(donor.embedding or donor.head or "")
        return None if not ends or count == ends[0] else count

    def _outer(self, slice_: Slice, *, before: bool) -> Iterator[Part | None]:
        """The parts of the tensors before or after the layers, without the head."""
        stored: dict[str, tuple[ModelReference, str]] = {}
        for model in dict.fromkeys([self.donor, *(source.model for source in slice_.sources)]):
            for role, name in self.names[model].outer.items():
                stored.setdefault(role, (model, name))
        used = {role for source in slice_.sources for role in self.names[source.model].outer}
        for role, (owner, name) in stored.items():
            if role in used and is_before(name) == before:
                names = [self.names[source.model].stored(role, name) for source in slice_.sources]
                output = self.names[self.donor].stored(role, name)
                vocabulary = self.names[owner].is_vocabulary(name)
                yield self.jobs.merged(output, slice_, names, 0.0, vocabulary=vocabulary)

    def _layer(self, slice_: Slice, step: int, u: float, output_layer: int, origin: int) -> Iterator[Part | None]:
        found = [(self.names[source.model], layers(source)[0] + step) for source in slice_.sources]
        rests = dict.fromkeys(rest for names, layer in found for rest in sorted(names.layers[layer]))
        donor = self.names[self.donor]
        for rest in rests:
            names = [names.in_layer(layer, rest) for names, layer in found]
            yield self.jobs.merged(donor.in_layer(output_layer, rest), slice_, names, u)
        for rest in sorted(donor.buffers.get(origin, ())):
            name = donor.in_layer(origin, rest)
            yield self.jobs.whole(donor.in_layer(output_layer, rest), self.donor, name, as_stored=True)

    def _head(self, slice_: Slice) -> tuple[Part | None, bool | None]:
        """The part of the output head, and `tie_word_embeddings` of the result, None to keep the donor's entry.

        The result has a head only if some model has one that differs from its embedding. Models with tied embeddings
        then take part with their embedding.
        """
        donor = self.names[self.donor]
        says = says_tied(self.checkpoints[self.donor].config)
        models = [source.model for source in slice_.sources]
        own = [self._has_own_head(model) for model in models]
        # The embedding of the result comes from these. That of a model with its own head cannot be used as a head.
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
        # An embedding that takes part as a head has the parameters of the head, including filters by name.
        job = self.jobs.merged(output, slice_, names, 0.0, filter_names=[output] * len(names), vocabulary=True)
        # The key does not apply to a head with another shape than the embedding, as in CPM-Ant, nor to those of
        # BigBird-Pegasus, whose checkpoints say that they are tied and store heads that are not.
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


def _advice(jobs: Sequence[Job]) -> list[str]:
    """The warning of the method that applies to every tensor of several inputs, if there is one."""
    found = {job.method.advice(job.values) for job in jobs if job.values.count > 1}
    (sentence,) = found if len(found) == 1 else (None,)
    return [sentence] if sentence else []


def _listed(words: Sequence[str] | None) -> str:
    return ", ".join(words) if words else "no named architecture"


def _same_bytes(a: memoryview, b: memoryview, step: int = 1 << 24) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(np.frombuffer(a[at : at + step], np.uint8), np.frombuffer(b[at : at + step], np.uint8))
        for at in range(0, len(a), step)
    )
