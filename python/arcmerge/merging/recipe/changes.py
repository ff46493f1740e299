"""Changes of a recipe's parameters, as sweeps and merges in memory make them.

A change has a key and a value. The keys:

    density             the parameter for the whole model, instead of all values that the recipe has for it
    weight[1]           the parameter of the second model (of `models:`, or of the sources of every slice)
    weight[org/name]    the same by the model's name, or by the last parts of its path
    t:self_attn         the parameter for the tensors whose names contain `self_attn`; other tensors keep their values
    weight[1]:mlp       both
    seed                the seed of a random method, which has one for the whole recipe
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from arcmerge.errors import ArcmergeError
from arcmerge.merging.methods import registry
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.parameters import Parameter
from arcmerge.merging.recipe.recipe import Recipe, plain, recipe_of
from arcmerge.merging.recipe.yaml_document import did_you_mean

_KEY = re.compile(r"(?P<name>[^\[\]:]+)(?:\[(?P<model>[^\[\]]+)\])?(?::(?P<filter>.+))?")


@dataclass(frozen=True)
class Key:
    """The place of a change.

    Args:
        name: the name of the parameter.
        model: the index or the name of a model; None for all models.
        filter: part of the names of the tensors; None for all tensors.
    """

    name: str
    model: str | None = None
    filter: str | None = None

    @classmethod
    def read(cls, text: str) -> Key:
        """Read `name`, `name[model]`, `name:filter` or `name[model]:filter`; ArcmergeError for another text."""
        match = _KEY.fullmatch(text)
        if match is None:
            raise ArcmergeError(f"'{text}' must be a parameter as weight, weight[1] or weight:mlp, got another form")
        return cls(**match.groupdict())

    def __str__(self) -> str:
        return self.name + (f"[{self.model}]" if self.model else "") + (f":{self.filter}" if self.filter else "")


def changed_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other parameters.

    Args:
        recipe: the recipe.
        changes: for each key a value as under `parameters:`, that is a number, a gradient, or a list of
            `{filter, value}`. The value of one model is written into its own `parameters:`. The more specific key
            decides; of two filters, the first that matches.

    Raises:
        ArcmergeError: the method has no such parameter, the recipe has no such model, or a value is wrong.
    """
    document: dict[str, Any] = plain(recipe.document)
    if "seed" in changes and not registry.get(recipe.method).random:
        raise ArcmergeError(f"'seed' must be set for a random method alone, got '{recipe.method}'; leave it out")
    document |= {"seed": plain(changes["seed"])} if "seed" in changes else {}
    keys = {text: Key.read(text) for text in changes if text != "seed"}
    for text in sorted(reversed(keys), key=lambda text: (keys[text].filter is not None, keys[text].model is not None)):
        key, value = keys[text], plain(changes[text])
        find_parameter(recipe, key)
        if not all(_as_list(rule.get("value")) for rule in _rules(value)):
            raise ArcmergeError(f"'{text}' must have a value, got an empty list; give it a number")
        if key.filter is not None:
            value = [{"filter": key.filter, "value": value}]
        for parameters in _places(document, recipe, key):
            own = _rules(parameters[key.name]) if key.filter is not None and key.name in parameters else []
            parameters[key.name] = [*value, *own] if key.filter is not None else value
    changed = recipe_of(document)
    changed.check_parameters(registry.get(recipe.method).parameters)
    return changed


def find_parameter(recipe: Recipe, key: Key) -> Parameter:
    """The parameter that a key names.

    Raises:
        ArcmergeError: the method has no such parameter, or the recipe no such model.
    """
    method = registry.get(recipe.method)
    known = {parameter.name: parameter for parameter in method.parameters}
    if key.name not in known:
        names = ", ".join(f"'{name}'" for name in known) or "none"
        raise ArcmergeError(
            f"'parameters' must be those of '{method.name}' ({names}), got '{key.name}'{did_you_mean(key.name, known)}"
        )
    parameter = known[key.name]
    if key.model is not None:
        if parameter.scope == "shared":
            raise ArcmergeError(f"'{key}' must be a parameter of each model, got one that they share; leave out [...]")
        others = [
            source
            for slice_, chosen in zip(recipe.slices, _chosen(recipe, key), strict=True)
            for source in chosen.values()
            if source != (slice_.base_model or recipe.base_model)
        ]
        if parameter.scope == "non_base" and not others:
            raise ArcmergeError(f"'{key}' must be of another model than the base, got the base; name another model")
    return parameter


def own_rules(recipe: Recipe, key: Key) -> list[dict[str, Any]]:
    """The values that the recipe has at the place of a key, as `{filter, value: [...]}`; an empty list for none."""
    for parameters in _places(plain(recipe.document), recipe, key):
        found = [
            {**rule, "value": _as_list(rule["value"])}
            for rule in _rules(parameters.get(key.name, []))
            if rule["value"] != [] and (key.filter is None or rule.get("filter") == key.filter)
        ]
        if found:
            return found
    return []


def models_with(recipe: Recipe, name: str) -> list[int]:
    """The indices of the models that have a value of their own for a parameter."""
    lists = [slice_.sources for slice_ in recipe.slices]
    return sorted({index for sources in lists for index, one in enumerate(sources) if name in one.parameters.rules})


def _places(document: dict[str, Any], recipe: Recipe, key: Key) -> Iterator[dict[str, Any]]:
    """The blocks of parameters that a change writes to. A change for the whole model removes all other values first."""
    module, lists = _sources(document)
    if key.model is not None:
        for entries, chosen in zip(lists, _chosen(recipe, key), strict=True):
            for index in chosen:
                yield _block(entries[index])
        return
    inner = [entry for entries in lists for entry in entries] + (module.get("slices") or [])
    for entry in inner + ([module] if module is not document else []):
        if key.name in (entry.get("parameters") or {}):
            if key.filter is not None:
                yield _block(entry)
            else:
                del _block(entry)[key.name]
    yield _block(document)


def _sources(document: Mapping[str, Any]) -> tuple[Any, list[list[Any]]]:
    """The mapping that has `models` or `slices`, and the sources of each slice."""
    module = (document.get("modules") or {}).get("default") or document
    return module, [module["models"]] if module.get("models") else [one["sources"] for one in module["slices"]]


def _chosen(recipe: Recipe, key: Key) -> list[dict[int, ModelReference]]:
    """The sources of each slice that a key names, by index.

    Raises:
        ArcmergeError: if there is no such model, or a name fits several.
    """
    lists = [  # a base that the recipe does not list has no place for parameters
        [source.model for source in slice_.sources[: len(entries)]]
        for slice_, entries in zip(recipe.slices, _sources(recipe.document)[1], strict=True)
    ]
    model = key.model or ""
    found = [
        {
            index: one
            for index, one in enumerate(sources)
            if (index == int(model) if model.isdecimal() else str(one) == model or str(one).endswith(f"/{model}"))
        }
        for sources in lists
    ]
    different = {one for chosen in found for one in chosen.values()}
    if not different or (len(different) > 1 and not model.isdecimal()):
        names = ", ".join(dict.fromkeys(str(one) for sources in lists for one in sources))
        raise ArcmergeError(f"'{key}' must have the index or the name of one model ({names}), got '{model}'")
    return found


def _block(entry: dict[str, Any]) -> dict[str, Any]:
    """The parameters of an entry of the document, which are added if it has none."""
    if not entry.get("parameters"):
        entry["parameters"] = {}
    block: dict[str, Any] = entry["parameters"]
    return block


def _rules(value: Any) -> list[dict[str, Any]]:
    """A value as a list of `{filter, value}`."""
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return value
    return [{"value": value}]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
