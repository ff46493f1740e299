"""From the names of the tensors that meet to a job: their types and shapes checked, their parameters resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from arcmerge.checkpoint.layout import OutputTensor
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.dtypes import promote
from arcmerge.errors import ArcmergeError, Problems
from arcmerge.merging.methods.method import Arguments, Coefficients, Method
from arcmerge.merging.plan.tensor_job import Input, Job
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.recipe import Recipe, Slice


class JobMaker:
    """vocabulary_rows: rows that tensors with one for each token get, None where rows meet by their number.
    truncate_embeddings: cut those of unequal length to their common rows. problems: where what is wrong is noted.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        checkpoints: Mapping[ModelReference, Checkpoint],
        donor: ModelReference,
        vocabulary_rows: int | None,
        truncate_embeddings: bool,
        problems: Problems,
    ) -> None:
        self._recipe = recipe
        self._method = method
        self._checkpoints = checkpoints
        self._donor = donor
        self._vocabulary_rows = vocabulary_rows
        self._truncate_embeddings = truncate_embeddings
        self._problems = problems

    def merged(
        self,
        output_name: str,
        piece: Slice,
        names: Sequence[str],
        u: float,
        *,
        asked: Sequence[str] | None = None,
        vocabulary: bool = False,
    ) -> Job | None:
        """The job of one output tensor, None where a problem was noted.

        names: of its inputs. asked: those that filters of parameters look at, where they are not the same.
        vocabulary: whether rows are tokens.
        """
        inputs = self._inputs(output_name, piece, names)
        if inputs is None or (shape := self._shape(output_name, inputs, vocabulary)) is None:
            return None
        if not all(item.info.dtype.mergeable for item in inputs):
            return self._of_donor(output_name, inputs)
        base = self._base_position(piece)
        try:
            values = self._values(piece, output_name, asked or names, u, base)
        except ArcmergeError as error:
            for sentence in error.problems:
                self._problems.add(sentence, kind=sentence.replace(output_name, ""))
            return None
        if sentences := self._method.check(values):
            for sentence in sentences:
                self._problems.add(f"{output_name}: {sentence}", kind=sentence)
            return None
        vocabulary = vocabulary and self._vocabulary_rows is not None
        result = promote(item.dtype for item in inputs)
        constant = self._method.constant(values)
        if len({(item.model, item.info.name) for item in inputs}) == 1 and self._method.idempotent:
            constant = Coefficients(np.eye(len(inputs))[0], "copy")
        if vocabulary:  # a row that one model lacks may come from any other, in its type
            inputs = tuple(replace(item, cast=result if result != item.info.dtype else None) for item in inputs)
        elif constant is not None:
            inputs, constant = _used(inputs, constant)
        return Job(
            output=OutputTensor(output_name, self._recipe.out_dtype or result, shape),
            inputs=inputs,
            method=self._method,
            values=values,
            result=result,
            constant=constant,
            vocabulary=vocabulary,
        )

    def whole(
        self, output_name: str, model: ModelReference, name: str, *, vocabulary: bool = False, as_stored: bool = False
    ) -> Job:
        """The job of a tensor that comes from one model, whatever the method. as_stored: and in the type it has."""
        item = self._input(model, name)
        dtype, count = item.info.dtype, item.info.count
        rows = self._vocabulary_rows if vocabulary else None
        shape = item.info.shape if rows is None else (rows, *item.info.shape[1:])
        if as_stored or not dtype.mergeable:
            item = replace(item, cast=None)
        else:
            dtype = self._recipe.out_dtype or item.dtype
        return Job(
            output=OutputTensor(output_name, dtype, shape),
            inputs=(item,),
            method=self._method,
            values=Arguments(count=1, base=None),
            result=item.dtype,
            constant=Coefficients(np.ones(1), "copy") if dtype.mergeable else None,
            vocabulary=rows is not None,
            setting=as_stored or count == 1,
        )

    def _inputs(self, output_name: str, piece: Slice, names: Sequence[str]) -> tuple[Input, ...] | None:
        for source, name in zip(piece.sources, names, strict=True):
            if name not in self._checkpoints[source.model].tensors:
                owner = next(
                    other.model
                    for other, owned in zip(piece.sources, names, strict=True)
                    if owned in self._checkpoints[other.model].tensors
                )
                self._problems.add(
                    f"{output_name}: every model must have this tensor, {source.model} has no '{name}' while "
                    f"{owner} has; a file of {source.model} is missing, or the two are not of one architecture",
                    kind=f"missing in {source.model}",
                )
                return None
        return tuple(self._input(source.model, name) for source, name in zip(piece.sources, names, strict=True))

    def _input(self, model: ModelReference, name: str) -> Input:
        checkpoint = self._checkpoints[model]
        info = checkpoint.tensors[name]
        cast = self._recipe.dtype if self._recipe.dtype != info.dtype and info.dtype.mergeable else None
        return Input(model, checkpoint, info, cast)

    def _shape(self, output_name: str, inputs: Sequence[Input], vocabulary: bool) -> tuple[int, ...] | None:
        shapes = [item.info.shape for item in inputs]
        if vocabulary and len({shape[1:] for shape in shapes}) == 1:
            if self._vocabulary_rows is not None:
                return (self._vocabulary_rows, *shapes[0][1:])
            if self._truncate_embeddings:
                return (min(shape[0] for shape in shapes), *shapes[0][1:])
        if len(set(shapes)) == 1:
            return shapes[0]
        found = ", ".join(f"{list(item.info.shape)} in {item.model}" for item in inputs)
        if vocabulary and len({shape[1:] for shape in shapes}) == 1:
            self._problems.add(
                f"{output_name}: the vocabularies differ in length: {found}; match rows by token with "
                "'tokenizer_source: union' (or base) in the recipe, or cut to the common rows with "
                "--unsafe-truncate-embeddings"
            )
        else:
            self._problems.add(
                f"{output_name}: all models must have one shape, got {found}; models of different size cannot be "
                "merged",
                kind="shape",
            )
        return None

    def _of_donor(self, output_name: str, inputs: tuple[Input, ...]) -> Job | None:
        """A buffer that is not of floating point cannot be mixed: the base's is kept."""
        if any(item.info.dtype != inputs[0].info.dtype for item in inputs):
            self._problems.add(
                f"{output_name}: stored as {', '.join(sorted({item.info.dtype.name for item in inputs}))}; "
                "only bfloat16, float16 and float32 can be merged",
                kind="dtype",
            )
            return None
        if inputs[0].info.dtype.name.startswith("float"):
            self._problems.add(
                f"{output_name}: stored as {inputs[0].info.dtype.name}; only bfloat16, float16 and float32 can be "
                "merged, convert the checkpoint first",
                kind="dtype",
            )
            return None
        kept = next((item for item in inputs if item.model == self._donor), inputs[0])
        return self.whole(output_name, kept.model, kept.info.name, as_stored=True)

    def _base_position(self, piece: Slice) -> int | None:
        base = piece.base_model or self._recipe.base_model
        return next((position for position, source in enumerate(piece.sources) if source.model == base), None)

    def _values(self, piece: Slice, output_name: str, names: Sequence[str], u: float, base: int | None) -> Arguments:
        shared: dict[str, Any] = {}
        per_input: dict[str, tuple[Any, ...]] = {}
        for parameter in self._method.parameters:
            if parameter.scope == "shared":
                shared[parameter.name] = self._recipe.value(parameter, piece, None, output_name, u)
            else:
                per_input[parameter.name] = tuple(
                    None
                    if position == base and parameter.scope == "non_base"
                    else self._recipe.value(parameter, piece, source, name, u)
                    for position, (source, name) in enumerate(zip(piece.sources, names, strict=True))
                )
        models = tuple(str(source.model) for source in piece.sources)
        return Arguments(len(names), base, shared, per_input, models)


def _used(inputs: tuple[Input, ...], constant: Coefficients) -> tuple[tuple[Input, ...], Coefficients]:
    """Only the inputs that count: one with the coefficient zero need not be read, whatever it holds."""
    kept = np.flatnonzero(constant.values) if constant.values.any() else np.array([0])
    return tuple(inputs[place] for place in kept), Coefficients(constant.values[kept], constant.branch)
