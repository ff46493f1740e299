"""The slices of a recipe laid against the models: which layers meet at which place of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from arcmerge._C import MAX_OPERANDS
from arcmerge.errors import Problems
from arcmerge.merging.methods.method import Method
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.recipe import Recipe, Slice, Source


def with_layers(
    recipe: Recipe, method: Method, depths: Mapping[ModelReference, int], problems: Problems
) -> list[Slice]:
    """The slices with the layer ranges of whole models filled in, checked against the models and the method."""
    return [_with_layers(recipe, method, number, piece, depths, problems) for number, piece in enumerate(recipe.slices)]


def layers(source: Source) -> tuple[int, int]:
    if source.layer_range is None:
        raise AssertionError("layer ranges are filled in before layers are planned")
    return source.layer_range


def length(piece: Slice) -> int:
    start, end = layers(piece.sources[0])
    return end - start


def are_in_place(slices: Sequence[Slice], depths: Mapping[ModelReference, int]) -> bool:
    """Whether whole models meet, every layer at its own place: all else of them fits together, too."""
    expected = 0
    models = [source.model for source in slices[0].sources]
    for piece in slices:
        if [source.model for source in piece.sources] != models:
            return False
        if any(layers(source)[0] != expected for source in piece.sources):
            return False
        expected += length(piece)
    return all(depths[model] == expected for model in models)


def _with_layers(
    recipe: Recipe,
    method: Method,
    number: int,
    piece: Slice,
    depths: Mapping[ModelReference, int],
    problems: Problems,
) -> Slice:
    sources = []
    for position, source in enumerate(piece.sources):
        depth = depths[source.model]
        start, end = source.layer_range or (0, depth)
        if end > depth:
            problems.add(
                f"slices[{number}].sources[{position}].layer_range: {source.model} has layers 0 to {depth - 1}, "
                f"got [{start}, {end}]; the end is exclusive, so at most {depth}"
            )
        sources.append(Source(source.model, (start, end), source.parameters))
    found = {f"{source.model} {end - start}": end - start for source in sources for start, end in [layers(source)]}
    if len(set(found.values())) > 1:
        listed = all(source.layer_range is None for source in piece.sources)
        place, advice = ("models", "name them under slices and ") if listed else (f"slices[{number}]", "")
        problems.add(
            f"{place}: all must have the same number of layers, got {', '.join(found)}; {advice}give each source a "
            "layer_range of one length"
        )
    if len(sources) > MAX_OPERANDS:
        problems.add(
            f"slices[{number}]: at most {MAX_OPERANDS} models can be merged at once, got {len(sources)}; "
            "merge some of them first, then the result with the rest"
        )
    base = piece.base_model or recipe.base_model
    if method.base != "ignored" and base is not None and len(sources) > 1:
        models = [source.model for source in sources]
        if base not in models:
            problems.add(
                f"slices[{number}]: base_model must be one of its sources {', '.join(map(str, models))}, "
                f"got {base}; add it to them or give the slice a base_model of its own"
            )
    return Slice(tuple(sources), piece.base_model, piece.parameters)
