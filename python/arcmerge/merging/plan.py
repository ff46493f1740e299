"""Recipe and headers -> a job per output tensor.

Everything that can be known before a weight is read is decided and checked here: which tensors meet, under which
parameters, in which type, and which of them need no arithmetic at all. Problems are collected and raised together,
one line each; nothing has been written by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from arcmerge._C import MAX_OPERANDS
from arcmerge.checkpoint.layout import OutputTensor
from arcmerge.checkpoint.reader import Checkpoint, TensorInfo
from arcmerge.dtypes import promote
from arcmerge.errors import ArcmergeError
from arcmerge.merging.job import Input, Job
from arcmerge.merging.method import Coefficients, Inputs, Method
from arcmerge.merging.names import EMBEDDING, HEAD, Names, is_vocabulary
from arcmerge.merging.problems import Problems
from arcmerge.merging.recipe import ModelReference, Recipe, Slice, Source


@dataclass(frozen=True)
class Plan:
    """All jobs in the order of the network, and what the output's config.json has to say of them.

    source_layers: for every output layer the model and its layer that it descends from, the donor's where it has one.
    tied: whether the head is the embedding, None where there is neither.
    """

    recipe: Recipe
    method: Method
    donor: ModelReference
    jobs: tuple[Job, ...]
    source_layers: tuple[tuple[ModelReference, int], ...]
    tied: bool | None


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
        self.truncate_embeddings = truncate_embeddings
        self.mix_architectures = mix_architectures
        self.names = {model: Names(checkpoint) for model, checkpoint in checkpoints.items()}
        self.donor = recipe.base_model or recipe.slices[0].sources[0].model
        self.problems = Problems()

    def plan(self) -> Plan:
        for model in self.checkpoints:
            self._check_architecture(model)
        self.problems.raise_if_any()
        slices = [self._with_layers(number, piece) for number, piece in enumerate(self.recipe.slices)]
        self.problems.raise_if_any()

        jobs: list[Job | None] = []
        source_layers: list[tuple[ModelReference, int]] = []
        before, after = self._outer_names(slices)
        jobs += [self._job(name, slices[0], [name] * len(slices[0].sources), 0.0) for name in before]
        for piece in slices:
            length = _length(piece.sources[0])
            origin = _donor_source(piece, self.donor)
            for step in range(length):
                u = step / (length - 1) if length > 1 else 1.0
                jobs += self._layer(piece, step, u, len(source_layers))
                source_layers.append((origin.model, _layers(origin)[0] + step))
        jobs += [self._job(name, slices[-1], [name] * len(slices[-1].sources), 0.0) for name in after]
        head, tied = self._head(slices[-1])
        jobs.append(head)
        self._check_vocabulary([job.output for job in jobs if job is not None])
        self.problems.raise_if_any()
        return Plan(
            recipe=self.recipe,
            method=self.method,
            donor=self.donor,
            jobs=tuple(job for job in jobs if job is not None),
            source_layers=tuple(source_layers),
            tied=tied,
        )

    def _check_vocabulary(self, tensors: Iterable[OutputTensor]) -> None:
        """One vocabulary for the whole network: its embedding comes from the first slice, its head from the last."""
        rows = {tensor.name: tensor.shape[0] for tensor in tensors if is_vocabulary(tensor.name)}
        if not rows and self.vocabulary_rows is not None:
            self.problems.add(
                f"tokenizer: no tensor is called '...{EMBEDDING}', so none can be aligned by token; "
                "leave the tokenizer block out"
            )
        if len(set(rows.values())) > 1:
            found = ", ".join(f"{name} {count}" for name, count in rows.items())
            self.problems.add(
                f"the embedding and the head must have a row for each token, got rows {found}; "
                "add 'tokenizer_source: union' (or base), or end in a slice of models with the vocabulary of the first"
            )

    def _check_architecture(self, model: ModelReference) -> None:
        """One stack of layers, as deep as config.json says, of the donor's architecture."""
        checkpoint, names = self.checkpoints[model], self.names[model]
        if len(names.prefixes) != 1:
            found = ", ".join(f"'{prefix}N'" for prefix in names.prefixes) or "none"
            self.problems.add(
                f"{model}: a decoder with one stack of '...layers.N....' tensors is needed, found {found}; "
                "take the text model out of the checkpoint first"
            )
            return
        depth = checkpoint.config.get("num_hidden_layers")
        present = sorted(names.layers)
        if present != list(range(len(present))) or (depth is not None and depth != len(present)):
            self.problems.add(
                f"{model}: config.json says num_hidden_layers {depth} but the weights hold layers "
                f"{present[0]} to {present[-1]} ({len(present)} of them); the checkpoint is incomplete, fetch it again"
            )
        ours, theirs = (self.checkpoints[name].config.get("architectures") for name in (self.donor, model))
        if ours != theirs and not self.mix_architectures:
            self.problems.add(
                f"{model} is a {_listed(theirs)} and {self.donor} a {_listed(ours)}; models of one architecture can be "
                "merged (--allow-crimes tries all the same)"
            )

    def _with_layers(self, number: int, piece: Slice) -> Slice:
        """`piece` with the layer ranges of whole models filled in, checked against the models and the method."""
        sources = []
        for position, source in enumerate(piece.sources):
            depth = len(self.names[source.model].layers)
            start, end = source.layer_range or (0, depth)
            if end > depth:
                self.problems.add(
                    f"slices[{number}].sources[{position}].layer_range: {source.model} has layers 0 to {depth - 1}, "
                    f"got [{start}, {end}]; the end is exclusive, so at most {depth}"
                )
            sources.append(Source(source.model, (start, end), source.parameters))
        lengths = {_length(source) for source in sources}
        if len(lengths) > 1:
            found = ", ".join(f"{source.model} {_length(source)}" for source in sources)
            self.problems.add(
                f"slices[{number}]: all sources of a slice must have the same number of layers, got {found}; "
                "give each source a layer_range of one length"
            )
        if len(sources) > MAX_OPERANDS:
            self.problems.add(
                f"slices[{number}]: at most {MAX_OPERANDS} models can be merged at once, got {len(sources)}; "
                "merge some of them first, then the result with the rest"
            )
        base = piece.base_model or self.recipe.base_model
        if self.method.base != "ignored" and base is not None and len(sources) > 1:
            models = [source.model for source in sources]
            if base not in models:
                self.problems.add(
                    f"slices[{number}]: base_model must be one of its sources {', '.join(map(str, models))}, "
                    f"got {base}; add it to them or give the slice a base_model of its own"
                )
        return Slice(tuple(sources), piece.base_model, piece.parameters)

    def _outer_names(self, slices: Sequence[Slice]) -> tuple[list[str], list[str]]:
        """Names of the tensors before and after the layers, the head left out."""
        first = [source.model for source in slices[0].sources]
        last = [source.model for source in slices[-1].sources]
        before = [name for name in self._union(first) if "embed" in name]
        after = [name for name in self._union(last) if "embed" not in name and name != HEAD]
        return before, after

    def _union(self, models: Iterable[ModelReference]) -> list[str]:
        return list(dict.fromkeys(name for model in models for name in self.names[model].outer))

    def _layer(self, piece: Slice, step: int, u: float, output_layer: int) -> list[Job | None]:
        layers = [(self.names[source.model], _layers(source)[0] + step) for source in piece.sources]
        rests = dict.fromkeys(rest for names, layer in layers for rest in sorted(names.layers[layer]))
        output = self.names[self.donor]
        return [
            self._job(
                output.in_layer(output_layer, rest),
                piece,
                [names.in_layer(layer, rest) for names, layer in layers],
                u,
            )
            for rest in rests
        ]

    def _head(self, piece: Slice) -> tuple[Job | None, bool | None]:
        """The job of the output head and whether the result's head is tied to its embedding.

        A head is a tensor of its own only where some parent has one that differs from its embedding; the tied
        parents then stand in with their embedding. (None, None) for networks without either name.
        """
        models = [source.model for source in piece.sources]
        untied = [self._has_own_head(model) for model in models]
        if not any(untied):
            has_embedding = any(self.names[model].embedding() for model in models)
            return None, True if has_embedding else None
        names = [
            HEAD if own else self.names[model].embedding() or HEAD for model, own in zip(models, untied, strict=True)
        ]
        # An embedding that stands in for a head is set as the head it is here, filters of the recipe included.
        return self._job(HEAD, piece, names, 0.0, asked=[HEAD] * len(names)), False

    def _has_own_head(self, model: ModelReference) -> bool:
        checkpoint, embedding = self.checkpoints[model], self.names[model].embedding()
        if HEAD not in checkpoint.tensors:
            return False
        if embedding is None or checkpoint.tensors[HEAD].shape != checkpoint.tensors[embedding].shape:
            return True
        return not _same_bytes(checkpoint.tensor_bytes(HEAD), checkpoint.tensor_bytes(embedding))

    def _job(
        self, output_name: str, piece: Slice, names: Sequence[str], u: float, asked: Sequence[str] | None = None
    ) -> Job | None:
        """The job of one output tensor, None where a problem was noted.

        names: of its inputs. asked: those that filters of parameters look at, where they are not the same.
        """
        inputs = self._inputs(output_name, piece, names)
        if inputs is None or (shape := self._shape(output_name, inputs)) is None:
            return None
        if not all(item.info.dtype.mergeable for item in inputs):
            return self._copied_job(output_name, inputs, shape)
        base = self._base_position(piece)
        try:
            values = self._values(piece, output_name, asked or names, u, base)
        except ArcmergeError as error:
            for sentence in error.problems:
                self.problems.add(sentence, kind=sentence.replace(output_name, ""))
            return None
        if sentences := self.method.check(values):
            for sentence in sentences:
                self.problems.add(f"{output_name}: {sentence}", kind=sentence)
            return None
        vocabulary = self.vocabulary_rows is not None and is_vocabulary(output_name)
        result = promote(item.dtype for item in inputs)
        constant = self.method.constant(values)
        if len({(item.model, item.info.name) for item in inputs}) == 1 and self.method.between_inputs:
            constant = Coefficients(np.eye(len(inputs))[0], "copy")
        if vocabulary:  # a row that one model lacks may come from any other, in its type
            inputs = tuple(replace(item, cast=result if result != item.info.dtype else None) for item in inputs)
        elif constant is not None:
            inputs, constant = _used(inputs, constant)
        return Job(
            output=OutputTensor(output_name, self.recipe.out_dtype or result, shape),
            inputs=inputs,
            method=self.method,
            values=values,
            result=result,
            constant=constant,
            vocabulary=vocabulary,
        )

    def _inputs(self, output_name: str, piece: Slice, names: Sequence[str]) -> tuple[Input, ...] | None:
        inputs = []
        for source, name in zip(piece.sources, names, strict=True):
            checkpoint = self.checkpoints[source.model]
            if (info := checkpoint.tensors.get(name)) is None:
                owners = [s.model for s, n in zip(piece.sources, names, strict=True) if n in self._tensors(s.model)]
                self.problems.add(
                    f"{output_name}: every model must have this tensor, {source.model} has no '{name}' while "
                    f"{owners[0]} has; the two are not of one architecture",
                    kind=f"missing in {source.model}",
                )
                return None
            cast = self.recipe.dtype if self.recipe.dtype != info.dtype and info.dtype.mergeable else None
            inputs.append(Input(source.model, checkpoint, info, cast))
        return tuple(inputs)

    def _tensors(self, model: ModelReference) -> Mapping[str, TensorInfo]:
        return self.checkpoints[model].tensors

    def _shape(self, output_name: str, inputs: Sequence[Input]) -> tuple[int, ...] | None:
        shapes = [item.info.shape for item in inputs]
        if is_vocabulary(output_name) and len({shape[1:] for shape in shapes}) == 1:
            if self.vocabulary_rows is not None:
                return (self.vocabulary_rows, *shapes[0][1:])
            if self.truncate_embeddings:
                return (min(shape[0] for shape in shapes), *shapes[0][1:])
        if len(set(shapes)) == 1:
            return shapes[0]
        found = ", ".join(f"{list(item.info.shape)} in {item.model}" for item in inputs)
        if is_vocabulary(output_name) and len({shape[1:] for shape in shapes}) == 1:
            self.problems.add(
                f"{output_name}: the vocabularies differ in length: {found}; add 'tokenizer_source: union' (or base) "
                "so that rows are matched by token, or --unsafe-truncate-embeddings to cut to the common rows"
            )
        else:
            self.problems.add(
                f"{output_name}: all models must have one shape, got {found}; models of different size cannot be "
                "merged",
                kind="shape",
            )
        return None

    def _copied_job(self, output_name: str, inputs: tuple[Input, ...], shape: tuple[int, ...]) -> Job | None:
        """A buffer that is not of floating point cannot be mixed: the base's is kept."""
        if any(item.info.dtype != inputs[0].info.dtype for item in inputs):
            self.problems.add(
                f"{output_name}: stored as {_listed(sorted({item.info.dtype.name for item in inputs}))}; "
                "only bfloat16, float16 and float32 can be merged",
                kind="dtype",
            )
            return None
        if inputs[0].info.dtype.name.startswith("float"):
            self.problems.add(
                f"{output_name}: stored as {inputs[0].info.dtype.name}; only bfloat16, float16 and float32 can be "
                "merged, convert the checkpoint first",
                kind="dtype",
            )
            return None
        kept = next((item for item in inputs if item.model == self.donor), inputs[0])
        dtype = kept.info.dtype
        values = Inputs(count=1, base=None, shared={}, per_input={})
        return Job(OutputTensor(output_name, dtype, shape), (kept,), self.method, values, dtype, None)

    def _base_position(self, piece: Slice) -> int | None:
        base = piece.base_model or self.recipe.base_model
        return next((position for position, source in enumerate(piece.sources) if source.model == base), None)

    def _values(self, piece: Slice, output_name: str, names: Sequence[str], u: float, base: int | None) -> Inputs:
        shared: dict[str, Any] = {}
        per_input: dict[str, tuple[Any, ...]] = {}
        for parameter in self.method.parameters:
            if parameter.scope == "shared":
                shared[parameter.name] = self.recipe.value(parameter, piece, None, output_name, u)
            else:
                per_input[parameter.name] = tuple(
                    None
                    if position == base and parameter.scope == "non_base"
                    else self.recipe.value(parameter, piece, source, name, u)
                    for position, (source, name) in enumerate(zip(piece.sources, names, strict=True))
                )
        return Inputs(count=len(names), base=base, shared=shared, per_input=per_input)


def _used(inputs: tuple[Input, ...], constant: Coefficients) -> tuple[tuple[Input, ...], Coefficients]:
    """Only the inputs that count: one with the coefficient zero need not be read, whatever it holds."""
    kept = np.flatnonzero(constant.values) if constant.values.any() else np.array([0])
    return tuple(inputs[place] for place in kept), Coefficients(constant.values[kept], constant.branch)


def _layers(source: Source) -> tuple[int, int]:
    if source.layer_range is None:
        raise AssertionError("layer ranges are filled in before layers are planned")
    return source.layer_range


def _length(source: Source) -> int:
    start, end = _layers(source)
    return end - start


def _donor_source(piece: Slice, donor: ModelReference) -> Source:
    return next((source for source in piece.sources if source.model == donor), piece.sources[0])


def _listed(words: Sequence[str] | None) -> str:
    return ", ".join(words) if words else "model without a named architecture"


def _same_bytes(a: memoryview, b: memoryview, step: int = 1 << 24) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(np.frombuffer(a[at : at + step], np.uint8), np.frombuffer(b[at : at + step], np.uint8))
        for at in range(0, len(a), step)
    )
