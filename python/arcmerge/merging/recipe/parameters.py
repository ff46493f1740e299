"""Values of a method's parameters for each layer and tensor, as the `parameters:` blocks of a recipe set them.

    parameters:
      t: 0.3                                  # a value
      t: [0, 0.5, 1]                          # a gradient over the layers of the slice
      t:                                      # rules: the first one whose filter is part of the tensor's name applies
        - {filter: self_attn, value: [0, 1]}
        - {value: 0.5}

There are blocks at up to four levels (source, slice, module, recipe). The first level with a matching rule for the
tensor gives the value; if there is none, the method's default does. The semantics are mergekit's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Literal

from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.yaml_document import Reader, did_you_mean, shown

Scalar = bool | int | float | str
Kind = type[float] | type[int] | type[bool] | type[str]


class Required(Enum):
    """The type of REQUIRED, which is the `default` of a parameter without a default."""

    REQUIRED = "required"


REQUIRED: Final = Required.REQUIRED


@dataclass(frozen=True)
class Parameter:
    """A number, a switch or a word of a merge method.

    Args:
        name: name in recipes.
        kind: float, int, bool, or str for one of `choices`.
        scope: "shared" for one value for an output tensor, "input" for one value for each input, "non_base" for one
            value for each input except the base. The last two can also be set on a source, and their filters match the
            name of the input tensor.
        default: value if no level sets it.
        extension: whether mergekit does not have the parameter. Its name must then not occur in recipes for mergekit.
        low, high: the smallest and the largest value that recipes can set; None for no bound.
        choices: the words that recipes can set.
    """

    name: str
    kind: Kind = float
    scope: Literal["shared", "input", "non_base"] = "shared"
    default: float | str | Required = REQUIRED
    extension: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def read(self, value: Scalar, location: str) -> Any:
        """`value` as a value of this parameter; ArcmergeError if it is of another kind, or out of range."""
        number = convert(value, self.kind, location)
        if self.kind is str:
            if number not in self.choices:
                hint = did_you_mean(number, self.choices)
                raise ArcmergeError(f"'{location}' must be {' or '.join(self.choices)}, got {shown(value)}{hint}")
            return number
        if (self.low is None or number >= self.low) and (self.high is None or number <= self.high):
            return number
        if self.low is None or self.high is None:
            bounds = f"{self.high:g} or less" if self.low is None else f"{self.low:g} or more"
        else:
            bounds = f"between {self.low:g} and {self.high:g}"
        # From 10 up a share is meant in percent; 2 may be any mistake.
        percent = (self.low, self.high) == (0, 1) and 10 <= number <= 100
        advice = f"; write {number / 100:g} for {number:g} %" if percent else ""
        raise ArcmergeError(f"'{location}' must be {bounds}, got {shown(value)}{advice}")


@dataclass(frozen=True)
class Rule:
    """One value or gradient for the tensors whose name contains `filter`.

    Args:
        filter: part of a name; None or "*" for all tensors.
        values: the value, or the values of the gradient. Empty if the recipe has an empty list: the tensors then have
            no value at this level.
    """

    filter: str | None
    values: tuple[Scalar, ...]

    def matches(self, tensor_name: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in tensor_name


@dataclass(frozen=True)
class Settings:
    """One `parameters:` block.

    Args:
        location: path of the block in the recipe, such as `slices[0].parameters`.
        rules: rules by the name of the parameter.
    """

    location: str = field(compare=False)
    rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)


# The block of a level that does not exist in this form of recipe, such as slices if there is a list of models.
NO_SETTINGS: Final = Settings("")


def resolve(
    parameter: Parameter, levels: Sequence[Settings], tensor_name: str, u: float, ignored: Sequence[Settings] = ()
) -> Any:
    """Find the value of a parameter for a tensor.

    Args:
        parameter: the parameter.
        levels: blocks from the highest precedence to the lowest.
        tensor_name: name of the output tensor for a shared parameter, of the input tensor for any other.
        u: depth of the layer in its slice, from 0 for the first to 1 for the last; 0 for tensors outside the layers.
        ignored: blocks that are not read. The error message mentions them if they set the parameter.

    Returns:
        The value, of the parameter's kind.

    Raises:
        ArcmergeError: if no level gives a value and the parameter is required.
    """
    for settings in levels:
        rule = next((rule for rule in settings.rules.get(parameter.name, ()) if rule.matches(tensor_name)), None)
        if rule is not None and rule.values:
            return evaluate(rule.values, u, parameter.kind, f"{settings.location}.{parameter.name}")
    if parameter.default is REQUIRED:
        raise ArcmergeError(
            f"'{parameter.name}' must have a value for {tensor_name}, got none{_cause(parameter.name, levels, ignored)}"
        )
    return parameter.default


def evaluate(values: Sequence[Scalar], u: float, kind: Kind, location: str) -> Any:
    """The value of a gradient at depth u in [0, 1].

    The entries are evenly spaced from u = 0 to u = 1. Numbers are interpolated linearly; of switches and words, the one
    at or before u is taken.
    """
    position = u * (len(values) - 1)
    index = int(position)
    fraction = position - index
    here = convert(values[index], kind, location)
    if kind in (bool, str):
        return here
    after = convert(values[min(index + 1, len(values) - 1)], kind, location)
    return convert((1 - fraction) * here + fraction * after, kind, location)


def finite(value: Any) -> float | None:
    """`value` as a finite float; None if it is not a number, does not spell one, or does not fit into a float."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def convert(value: Scalar, kind: Kind, location: str) -> Any:
    """`value` as a `kind`; ArcmergeError if it is of another kind.

    Text that spells a value is accepted, because YAML reads `1e-3` as text.
    """
    if kind is str:
        return str(value)
    if kind is bool:
        switch = _SWITCHES.get(str(value).strip().lower())
        if switch is None:
            raise ArcmergeError(f"'{location}' must be true or false, got {shown(value)}")
        return switch
    number = finite(value)
    if number is None:
        raise ArcmergeError(f"'{location}' must be a finite number, got {shown(value)}")
    if kind is int:
        if not number.is_integer():
            raise ArcmergeError(f"'{location}' must be a whole number, got {shown(value)}")
        return int(number)
    return number


_SWITCHES = {
    **dict.fromkeys(("true", "yes", "on", "y", "t", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "off", "n", "f", "0", "0.0"), False),
}


def read_settings(value: Any, location: str, reader: Reader) -> Settings:
    """Read a `parameters:` block; None gives an empty one. `Recipe.check_parameters` checks the values."""
    if value is None:
        return Settings(location)
    entries = reader.mapping(value, location)
    return Settings(
        location, {name: _read_rules(entry, f"{location}.{name}", reader) for name, entry in entries.items()}
    )


def _read_rules(value: Any, location: str, reader: Reader) -> tuple[Rule, ...]:
    if isinstance(value, Mapping):
        return _read_rule(value, location, reader)
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        rules = [
            rule for index, entry in enumerate(value) for rule in _read_rule(entry, f"{location}[{index}]", reader)
        ]
        if any(rule.filter in (None, "*") for rule in rules[:-1]):
            reader.warning(location, "entries after one without a filter are never used; put that one last")
        return tuple(rules)
    return (Rule(None, _read_values(value, location, reader)),)


def _read_rule(value: Mapping[Any, Any], location: str, reader: Reader) -> tuple[Rule, ...]:
    entry = reader.mapping(value, location, known=("filter", "value"))
    pattern = entry.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        reader.problem(f"{location}.filter", f"must be text to find in tensor names, got {shown(pattern)}; quote it")
        return ()
    if "value" not in entry:
        reader.problem(location, f"must have a `value`, got {shown(dict(value))}; add `value: ...`")
        return ()
    return (Rule(pattern, _read_values(entry["value"], f"{location}.value", reader)),)


def _read_values(value: Any, location: str, reader: Reader) -> tuple[Scalar, ...]:
    values = tuple(value) if isinstance(value, list) else (value,)
    if not values:
        reader.warning(location, "an empty list sets nothing; give a number or remove the key")
    elif not all(isinstance(entry, bool | int | float | str) for entry in values):
        rule = "a number, a list of numbers only, or a list of `{filter, value}` entries only"
        reader.problem(location, f"must be {rule}, got {shown(value)}")
        return ()
    return values


def _cause(name: str, levels: Sequence[Settings], ignored: Sequence[Settings]) -> str:
    """The part of a message that tells why no level gave a value, and what to do."""
    setting = [settings for settings in levels if name in settings.rules]
    if setting and not any(rule.values for settings in setting for rule in settings.rules[name]):
        return f" because {_named(name, setting)} is an empty list; put a number in it"
    if setting:
        return (
            f" because no filter of {_named(name, setting)} matches its name; "
            "add a last entry without a filter, `- value: ...`, for all other tensors"
        )
    locations = " or ".join(settings.location for settings in levels if settings.location)
    if misplaced := _named(name, (settings for settings in ignored if name in settings.rules)):
        return f" because {misplaced} is not read for a value that all inputs share; move it to {locations}"
    return f"; set `{name}: ...` in {locations}"


def _named(name: str, levels: Iterable[Settings]) -> str:
    return " or ".join(f"{settings.location}.{name}" for settings in levels)
