"""Makes jobs: checks dtypes and shapes of the tensors that are merged, and resolves the parameters of the method."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from arcmerge.checkpoint.layout import OutputTensor
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.dtypes import BF16, DType, promote
from arcmerge.errors import ArcmergeError, Problems
from arcmerge.merging.methods.method import Arguments, Method
from arcmerge.merging.methods.rule import Coefficients
from arcmerge.merging.plan.tensor_job import Input, Job
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.recipe import Recipe, Slice

# Shared parameters, those of each input, and the names of the models.
_Values = tuple[Mapping[str, Any], Mapping[str, tuple[Any, ...]], tuple[str, ...]]


@dataclass(frozen=True)
class MergedTensor:
    """What the job of a merged tensor follows from, apart from the parameters of the method.

    Args:
        output: name, dtype and shape of the output tensor.
        inputs: the input tensors.
        slice_index: the index of the slice of the recipe.
        names: for each input the name that the filters of parameters match.
        u: depth of the layer in its slice, see `Recipe.value`.
        base: index of the base among the inputs, None if it is not one of them.
        result: dtype of the method's result.
        vocabulary: whether rows are aligned by token.
        elements: the number of elements.
        alike: whether all inputs are one and the same tensor.
    """

    output: OutputTensor
    inputs: tuple[Input, ...]
    slice_index: int
    names: tuple[str, ...]
    u: float
    base: int | None
    result: DType
    vocabulary: bool
    elements: int
    alike: bool


# A job that depends on no parameter is its own part.
Part = MergedTensor | Job


@dataclass(frozen=True)
class JobMaker:
    """Makes the jobs of a plan.

    Args:
        recipe: the recipe.
        method: the merge method.
        checkpoints: a checkpoint for each model.
        donor: the model that config.json and tensors that are not merged come from.
        vocabulary_rows: number of rows of tensors that are aligned by token; None if rows are matched by index.
        truncate_embeddings: truncate embeddings of different lengths to the shortest.
        problems: collector of error messages.
    """

    recipe: Recipe
    method: Method
    checkpoints: Mapping[ModelReference, Checkpoint]
    donor: ModelReference
    vocabulary_rows: int | None
    truncate_embeddings: bool
    problems: Problems
    _known: dict[Hashable, _Values] = field(default_factory=dict, init=False, repr=False, compare=False)

    def merged(
        self,
        output_name: str,
        slice_: Slice,
        names: Sequence[str],
        u: float,
        *,
        filter_names: Sequence[str] | None = None,
        vocabulary: bool = False,
    ) -> Part | None:
        """Make what the job of a merged tensor follows from.

        Args:
            output_name: name of the output tensor.
            slice_: the slice, whose sources give the inputs.
            names: names of the input tensors.
            u: depth of the layer in its slice, see `Recipe.value`.
            filter_names: names that the filters of parameters match, if not `names`.
            vocabulary: whether the tensor has one row for each token.

        Returns:
            The part; None if a problem was added.
        """
        inputs = self._inputs(output_name, slice_, names)
        if inputs is None or (shape := self._shape(output_name, inputs, vocabulary)) is None:
            return None
        if not all(item.info.dtype.mergeable for item in inputs):
            return self._of_donor(output_name, inputs)
        result, vocabulary = promote(item.dtype for item in inputs), vocabulary and self.vocabulary_rows is not None
        if vocabulary:  # a row that one model does not have may come from any other model, in that model's dtype
            inputs = tuple(replace(item, cast=result if result != item.info.dtype else None) for item in inputs)
        return MergedTensor(
            output=OutputTensor(output_name, self.recipe.out_dtype or result, shape),
            inputs=inputs,
            slice_index=slice_.index,
            names=tuple(filter_names or names),
            u=u,
            base=self._base_index(slice_),
            result=result,
            vocabulary=vocabulary,
            elements=prod(shape),
            alike=len({(item.model, item.info.name) for item in inputs}) == 1,
        )

    def job(self, part: Part) -> Job | None:
        """Make the job of a tensor with the parameters of the recipe; None if a problem was added."""
        if isinstance(part, Job):
            return part
        name = part.output.name
        try:
            shared, per_input, models = self._values(part)
        except ArcmergeError as error:
            for sentence in error.problems:
                self.problems.add(sentence, kind=sentence.replace(name, ""))
            return None
        values = Arguments(
            len(part.names),
            part.base,
            shared,
            per_input,
            models,
            name,
            self.recipe.seed,
            rounded=part.result == BF16,
            matrix=len(part.output.shape) > 1,
            elements=part.elements,
        )
        if sentences := self.method.check(values):
            for sentence in sentences:
                message = f"{name}: {sentence}"
                self.problems.add(message, kind=sentence)
            return None
        inputs, constant = part.inputs, self.method.constant(values)
        if part.alike and self.method.idempotent:
            constant = Coefficients(np.eye(len(inputs))[0], "copy")
        if constant is not None and not part.vocabulary:
            inputs, constant = _used(inputs, constant)
        return Job(part.output, inputs, self.method, values, part.result, constant, part.vocabulary)

    def whole(
        self, output_name: str, model: ModelReference, name: str, *, vocabulary: bool = False, as_stored: bool = False
    ) -> Job:
        """Make the job of a tensor that is copied from one model.

        Args:
            output_name: name of the output tensor.
            model: the model.
            name: name of the tensor there.
            vocabulary: whether the tensor has one row for each token.
            as_stored: keep the stored dtype.
        """
        item = self._input(model, name)
        dtype, count = item.info.dtype, item.info.count
        rows = self.vocabulary_rows if vocabulary else None
        shape = item.info.shape if rows is None else (rows, *item.info.shape[1:])
        if as_stored or not dtype.mergeable:
            item = replace(item, cast=None)
        else:
            dtype = self.recipe.out_dtype or item.dtype
        return Job(
            output=OutputTensor(output_name, dtype, shape),
            inputs=(item,),
            method=self.method,
            values=Arguments(count=1, base=None),
            result=item.dtype,
            constant=Coefficients(np.ones(1), "copy") if dtype.mergeable else None,
            vocabulary=rows is not None,
            setting=as_stored or count == 1,
        )

    def _inputs(self, output_name: str, slice_: Slice, names: Sequence[str]) -> tuple[Input, ...] | None:
        for source, name in zip(slice_.sources, names, strict=True):
            if name not in self.checkpoints[source.model].tensors:
                owner = next(
                    other.model
                    for other, owned in zip(slice_.sources, names, strict=True)
                    if owned in self.checkpoints[other.model].tensors
                )
                self.problems.add(
                    f"'{output_name}' must be in every model, got no '{name}' in {source.model} but one in {owner}; "
                    f"a file of {source.model} is missing, or the two are of different architectures",
                    kind=f"missing in {source.model}",
                )
                return None
        return tuple(self._input(source.model, name) for source, name in zip(slice_.sources, names, strict=True))

    def _input(self, model: ModelReference, name: str) -> Input:
        checkpoint = self.checkpoints[model]
        info = checkpoint.tensors[name]
        cast = self.recipe.dtype if self.recipe.dtype != info.dtype and info.dtype.mergeable else None
        return Input(model, checkpoint, info, cast)

    def _shape(self, output_name: str, inputs: Sequence[Input], vocabulary: bool) -> tuple[int, ...] | None:
        shapes = [item.info.shape for item in inputs]
        if vocabulary and len({shape[1:] for shape in shapes}) == 1:
            if self.vocabulary_rows is not None:
                return (self.vocabulary_rows, *shapes[0][1:])
            if self.truncate_embeddings:
                return (min(shape[0] for shape in shapes), *shapes[0][1:])
        if len(set(shapes)) == 1:
            return shapes[0]
        found = ", ".join(f"{list(item.info.shape)} in {item.model}" for item in inputs)
        if vocabulary and len({shape[1:] for shape in shapes}) == 1:
            self.problems.add(
                f"'{output_name}' must have the same number of rows in all models, got {found}; align the rows by "
                "token with 'tokenizer_source: union' (or base) in the recipe, or truncate to the smallest vocabulary "
                "with --unsafe-truncate-embeddings"
            )
        else:
            self.problems.add(
                f"'{output_name}' must have the same shape in all models, got {found}; models of different sizes "
                "cannot be merged",
                kind="shape",
            )
        return None

    def _of_donor(self, output_name: str, inputs: tuple[Input, ...]) -> Job | None:
        """Tensors of integers cannot be mixed: the base's is kept."""
        dtypes = sorted({item.info.dtype.name for item in inputs})
        if len(dtypes) > 1 or dtypes[0].startswith("float"):
            self.problems.add(
                f"'{output_name}' must be stored as bfloat16, float16 or float32 to be merged, "
                f"got {', '.join(dtypes)}; convert the checkpoint first",
                kind="dtype",
            )
            return None
        kept = next((item for item in inputs if item.model == self.donor), inputs[0])
        return self.whole(output_name, kept.model, kept.info.name, as_stored=True)

    def _base_index(self, slice_: Slice) -> int | None:
        base = slice_.base_model or self.recipe.base_model
        return next((index for index, source in enumerate(slice_.sources) if source.model == base), None)

    def _values(self, part: MergedTensor) -> _Values:
        """The parameters of a tensor; tensors with equal ones have the same mappings."""
        names = (part.output.name, *part.names)
        matches = tuple([pattern in name for pattern in self.recipe.filters for name in names])
        key = part.slice_index, part.u, part.base, matches
        if key not in self._known:
            found = self._read_values(part)
            self._known[key] = self._known.setdefault(repr(found), found)
        return self._known[key]

    def _read_values(self, part: MergedTensor) -> _Values:
        slice_, u = self.recipe.slices[part.slice_index], part.u
        shared: dict[str, Any] = {}
        per_input: dict[str, tuple[Any, ...]] = {}
        for parameter in self.method.parameters:
            if parameter.scope == "shared":
                shared[parameter.name] = self.recipe.value(parameter, slice_, None, part.output.name, u)
            else:
                per_input[parameter.name] = tuple(
                    None
                    if index == part.base and parameter.scope == "non_base"
                    else self.recipe.value(parameter, slice_, source, name, u)
                    for index, (source, name) in enumerate(zip(slice_.sources, part.names, strict=True))
                )
        return shared, per_input, tuple(str(source.model) for source in slice_.sources)


def _used(inputs: tuple[Input, ...], constant: Coefficients) -> tuple[tuple[Input, ...], Coefficients]:
    """The inputs whose coefficient is not zero, and these coefficients. Other inputs need not be read."""
    kept = np.flatnonzero(constant.values) if constant.values.any() else np.array([0])
    return tuple(inputs[index] for index in kept), Coefficients(constant.values[kept], constant.branch)
