"""The slices of a recipe with explicit layer ranges, checked against the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from arcmerge.errors import Problems
from arcmerge.merging.methods.method import Method
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.recipe import Recipe, Slice, Source


def with_layers(
    recipe: Recipe, method: Method, depths: Mapping[ModelReference, int], problems: Problems
) -> list[Slice]:
    """The slices with the layer ranges of whole models filled in, checked against the models and the method."""
    return [_with_layers(recipe, method, index, slice_, depths, problems) for index, slice_ in enumerate(recipe.slices)]


def layers(source: Source) -> tuple[int, int]:
    if source.layer_range is None:
        raise AssertionError("layer ranges are filled in before layers are planned")
    return source.layer_range


def length(slice_: Slice) -> int:
    start, end = layers(slice_.sources[0])
    return end - start


def are_in_place(slices: Sequence[Slice], depths: Mapping[ModelReference, int]) -> bool:
    """Whether whole models are merged, every layer at its own index. All their other tensors then match, too."""
    expected = 0
    models = [source.model for source in slices[0].sources]
    for slice_ in slices:
        if [source.model for source in slice_.sources] != models:
            return False
        if any(layers(source)[0] != expected for source in slice_.sources):
            return False
        expected += length(slice_)
    return all(depths[model] == expected for model in models)


def _with_layers(
    recipe: Recipe,
    method: Method,
    index: int,
    slice_: Slice,
    depths: Mapping[ModelReference, int],
    problems: Problems,
) -> Slice:
    sources = []
    for position, source in enumerate(slice_.sources):
        depth = depths[source.model]
        start, end = source.layer_range or (0, depth)
        if end > depth:
            problems.add(
                f"'slices[{index}].sources[{position}].layer_range' must be within the layers 0 to {depth - 1} of "
                f"{source.model}, got [{start}, {end}]; the end is exclusive, so at most {depth}"
            )
        sources.append(Source(source.model, (start, end), source.parameters))
    found = {f"{source.model} {end - start}": end - start for source in sources for start, end in [layers(source)]}
    if len(set(found.values())) > 1:
        listed = all(source.layer_range is None for source in slice_.sources)
        location, advice = ("models", "list them under slices and ") if listed else (f"slices[{index}]", "")
        problems.add(
            f"'{location}' must have the same number of layers in all sources, got {', '.join(found)}; {advice}give "
            "the sources layer ranges of the same length"
        )
    base = slice_.base_model or recipe.base_model
    if method.base != "ignored" and base is not None and len(sources) > 1:
        models = [source.model for source in sources]
        if base not in models:
            problems.add(
                f"slices[{index}]: 'base_model' must be one of the sources {', '.join(map(str, models))}, "
                f"got {base}; add it to the sources or set another base_model in the slice"
            )
    return replace(slice_, sources=tuple(sources))
