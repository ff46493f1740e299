"""Settings: the values a recipe gives to a method's parameters, layer by layer and tensor by tensor.

    parameters:
      t: 0.3                                  # a value
      t: [0, 0.5, 1]                          # a gradient over the layers of the slice
      t:                                      # rules: the first whose filter is part of the tensor's name decides
        - {filter: self_attn, value: [0, 1]}
        - {value: 0.5}

Such blocks stand at up to four levels (source, slice, module, recipe). The first level that has a matching rule for the
tensor gives the value, then the method's default. The semantics are mergekit's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Literal

from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.yaml_document import Findings, shown

Scalar = bool | int | float | str
Kind = type[float] | type[int] | type[bool]


class Required(Enum):
    """The type of REQUIRED, the `default` of a parameter that has none."""

    REQUIRED = "required"


REQUIRED: Final = Required.REQUIRED


@dataclass(frozen=True)
class Parameter:
    """A number or switch that a merge method reads.

    scope: `shared` is one value for an output tensor, `input` one for each input, `non_base` one for each input but the
    base. The last two may also be set on a source, and their filters look at the name of the input tensor.
    extension: mergekit does not know it, so its name must be one that no recipe written for mergekit has.
    """

    name: str
    kind: Kind = float
    scope: Literal["shared", "input", "non_base"] = "shared"
    default: float | Required = REQUIRED
    extension: bool = False


@dataclass(frozen=True)
class Rule:
    """One value or gradient for the tensors that have `filter` in their name (None: for all).

    values: empty where the recipe has an empty list: the tensors then have no value at this level.
    """

    filter: str | None
    values: tuple[Scalar, ...]

    def matches(self, tensor_name: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in tensor_name


@dataclass(frozen=True)
class Settings:
    """One `parameters:` block. place: where it stands, as `slices[0].parameters`; rules: by parameter name."""

    place: str = field(compare=False)
    rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)


# The block of a level that the form of the recipe does not have, as slices in a list of models.
NO_SETTINGS: Final = Settings("")


def resolve(
    parameter: Parameter, levels: Sequence[Settings], tensor_name: str, u: float, ignored: Sequence[Settings] = ()
) -> float:
    """The value of `parameter` for a tensor, of the parameter's kind.

    levels: from the highest precedence to the lowest.
    tensor_name: of the output tensor for a shared parameter, of the input tensor for any other.
    u: the depth of the layer in its slice, 0 first to 1 last; 0 for tensors outside the layers.
    ignored: blocks that are not asked, so that the error can say so if the value stands there.

    Raises ArcmergeError if no level gives a value and the parameter is required.
    """
    for settings in levels:
        rule = next((rule for rule in settings.rules.get(parameter.name, ()) if rule.matches(tensor_name)), None)
        if rule is not None and rule.values:
            return evaluate(rule.values, u, parameter.kind, f"{settings.place}.{parameter.name}")
    if parameter.default is REQUIRED:
        raise ArcmergeError(
            f"`{parameter.name}` has no value for {tensor_name}: {_cause(parameter.name, levels, ignored)}"
        )
    return parameter.default


def evaluate(values: Sequence[Scalar], u: float, kind: Kind, place: str) -> float:
    """The value of a gradient at depth u in [0, 1]: numbers are interpolated linearly, switches picked.

    The entries lie at equal distances from u = 0 to u = 1; of switches, the one at or before u is taken.
    """
    position = u * (len(values) - 1)
    index = int(position)
    fraction = position - index
    here = convert(values[index], kind, place)
    if kind is bool:
        return here
    after = convert(values[min(index + 1, len(values) - 1)], kind, place)
    return convert((1 - fraction) * here + fraction * after, kind, place)


def finite(value: Any) -> float | None:
    """The finite number that `value` is or spells; None if there is none, as of a whole number beyond any float."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def convert(value: Scalar, kind: Kind, place: str) -> float:
    """`value` as a `kind`. Text that spells one is taken: YAML reads `1e-3` as text. Raises ArcmergeError."""
    if kind is bool:
        switch = _SWITCHES.get(str(value).strip().lower())
        if switch is None:
            raise ArcmergeError(f"{place}: must be true or false, got {shown(value)}")
        return switch
    number = finite(value)
    if number is None:
        raise ArcmergeError(f"{place}: must be a finite number, got {shown(value)}")
    if kind is int:
        if not number.is_integer():
            raise ArcmergeError(f"{place}: must be a whole number, got {shown(value)}")
        return int(number)
    return number


_SWITCHES = {
    **dict.fromkeys(("true", "yes", "on", "y", "t", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "off", "n", "f", "0", "0.0"), False),
}


def read_settings(value: Any, place: str, findings: Findings) -> Settings:
    """The `parameters:` block that YAML gave as `value` (None: none). Kinds are checked where the method is known."""
    if value is None:
        return Settings(place)
    entries = findings.mapping(value, place)
    return Settings(place, {name: _read_rules(entry, f"{place}.{name}", findings) for name, entry in entries.items()})


def _read_rules(value: Any, place: str, findings: Findings) -> tuple[Rule, ...]:
    if isinstance(value, Mapping):
        return _read_rule(value, place, findings)
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        rules = [rule for index, entry in enumerate(value) for rule in _read_rule(entry, f"{place}[{index}]", findings)]
        if any(rule.filter in (None, "*") for rule in rules[:-1]):
            findings.warning(place, "entries after one without a filter are never reached; put that one last")
        return tuple(rules)
    return (Rule(None, _read_values(value, place, findings)),)


def _read_rule(value: Mapping[Any, Any], place: str, findings: Findings) -> tuple[Rule, ...]:
    entry = findings.mapping(value, place, known=("filter", "value"))
    pattern = entry.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        findings.problem(f"{place}.filter", f"must be text to look for in tensor names, got {shown(pattern)}; quote it")
        return ()
    if "value" not in entry:
        findings.problem(place, f"must have a `value`, got {shown(dict(value))}; add `value: ...`")
        return ()
    return (Rule(pattern, _read_values(entry["value"], f"{place}.value", findings)),)


def _read_values(value: Any, place: str, findings: Findings) -> tuple[Scalar, ...]:
    values = tuple(value) if isinstance(value, list) else (value,)
    if not values:
        findings.warning(place, "an empty list sets nothing; give a number or remove the key")
    elif not all(isinstance(entry, bool | int | float | str) for entry in values):
        if isinstance(value, list):
            rule = "must be a list of numbers only or of `{filter, value}` entries only"
        else:
            rule = "must be a number, a list of numbers, or a list of `{filter, value}` entries"
        findings.problem(place, f"{rule}, got {shown(value)}")
        return ()
    return values


def _cause(name: str, levels: Sequence[Settings], ignored: Sequence[Settings]) -> str:
    """Why no level gave a value, and what to do."""
    setting = [settings for settings in levels if name in settings.rules]
    if setting and not any(rule.values for settings in setting for rule in settings.rules[name]):
        return f"{_named(name, setting)} is an empty list; put a number in it"
    if setting:
        return (
            f"no filter in {_named(name, setting)} is part of its name; "
            "add a last entry without a filter, `- value: ...`, for all other tensors"
        )
    places = " or ".join(settings.place for settings in levels if settings.place)
    if misplaced := _named(name, (settings for settings in ignored if name in settings.rules)):
        return f"{misplaced} is not read because `{name}` holds for all inputs at once; move it to {places}"
    return f"the merge method needs it and nothing sets it; set `{name}: ...` in {places}"


def _named(name: str, levels: Iterable[Settings]) -> str:
    return " or ".join(f"{settings.place}.{name}" for settings in levels)
