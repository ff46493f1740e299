"""The YAML document of a recipe, and a reader that collects all of its problems and warnings.

A recipe is checked as a whole: each function that reads a part adds the problems it finds and continues with an empty
value, so that one run reports everything that is wrong.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import yaml

from arcmerge.errors import ArcmergeError, Problems

_SHOWN_CHARACTERS = 60
_MAX_NODES = 1_000_000

# Visits no more of a value than a message can show, because mappings from Python may be deep or contain themselves.
_BRIEFLY = reprlib.Repr()
_BRIEFLY.maxlevel = 4
_BRIEFLY.maxlist = _BRIEFLY.maxtuple = _BRIEFLY.maxdict = 12
_BRIEFLY.maxstring = _BRIEFLY.maxother = _BRIEFLY.maxlong = 2 * _SHOWN_CHARACTERS


def parse(text: str) -> Mapping[Any, Any]:
    """Parse a YAML document that is a mapping.

    Raises:
        ArcmergeError: for a syntax error, a duplicate key, more than one document, or another type than a mapping.
    """
    try:
        document = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = error.problem or error.context or "not valid YAML"
        raise ArcmergeError(f"'recipe' must be one valid YAML document, got {position}{problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise ArcmergeError(f"'recipe' must be one valid YAML document, got {problem}") from error
    if not isinstance(document, Mapping):
        raise ArcmergeError(
            f"'recipe' must be a mapping that starts with lines like `merge_method: slerp`, got {shown(document)}"
        )
    return document


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses duplicate keys and aliases that contain themselves or multiply."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        _check_size(node, {})
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key `{key.value}` twice; keep one", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


def _check_size(node: yaml.Node | None, sizes: dict[yaml.Node, int]) -> int:
    """The number of nodes of `node` with its aliases written out.

    sizes: the numbers for the nodes visited before, 0 for those that contain this one.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if node not in sizes:
        sizes[node] = 0
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes[node] = 1 + sum(_check_size(part, sizes) for part in parts)
    if not 0 < sizes[node] <= _MAX_NODES:
        fault = f"more than {_MAX_NODES:,} values" if sizes[node] else "a value that contains an alias of itself"
        raise yaml.composer.ComposerError(None, None, f"{fault}; write it without aliases", node.start_mark)
    return sizes[node]


def shown(value: object) -> str:
    """`value` as a message quotes it: short, on one line, with YAML's words for the constants."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    text = " ".join(_BRIEFLY.repr(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def did_you_mean(word: object, known: Collection[str]) -> str:
    """`; did you mean X?` if one of `known` is close to `word`, else the empty text."""
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


class Reader:
    """Reads values of a YAML document and collects the problems and the warnings.

    The methods return the value if it has the right type. Otherwise they add a problem and return an empty value.

    Attributes:
        problems: errors that forbid the merge.
        warnings: sentences about parts that have no effect.
    """

    def __init__(self) -> None:
        self.problems = Problems()
        self.warnings: list[str] = []

    def problem(self, location: str, rule: str) -> None:
        """Add a problem.

        Args:
            location: path of the value in the document, such as `slices[0].sources[1].model`.
            rule: the rest of the message, such as "must be text, got 7".
        """
        message = f"'{location}' {rule}"
        self.problems.add(message)

    def extend(self, error: ArcmergeError) -> None:
        """Add the problems of an error."""
        for problem in error.problems:
            self.problems.add(problem)

    def warning(self, location: str, fact: str) -> None:
        self.warnings.append(f"{location}: {fact}")

    def mapping(
        self, value: object, location: str, known: Collection[str] | None = None, unused: Collection[str] = ()
    ) -> Mapping[str, Any]:
        """Read a mapping with text keys.

        Args:
            value: the value.
            location: path of the value in the document.
            known: keys that are read; other keys give a warning. None: all keys are read.
            unused: keys of the language that have no effect on a merge.
        """
        if not isinstance(value, Mapping):
            self.problem(location, f"must be a mapping of names to values, got {shown(value)}")
            return {}
        for key in value:
            if not isinstance(key, str):
                self.problem(location, f"must have keys that are text, got {shown(key)}; put it in quotes")
            elif key in unused:
                self.warning(_inside(location, key), "this key has no effect on a merge; remove it")
            elif known is not None and key not in known:
                self.warning(_inside(location, key), f"unknown key, ignored{did_you_mean(key, known)}")
        return {key: entry for key, entry in value.items() if isinstance(key, str)}

    def mappings(
        self, value: object, location: str, what: str, known: Collection[str], unused: Collection[str] = ()
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Read a non-empty list of mappings, as (location, mapping) pairs.

        what: plural noun for the entries in messages. Other arguments: as for `mapping`.
        """
        if not isinstance(value, list) or not value:
            got = "an empty list" if isinstance(value, list) else shown(value)
            self.problem(location, f"must be a list of one or more {what}, got {got}")
            return
        for index, entry in enumerate(value):
            entries = self.mapping(entry, f"{location}[{index}]", known, unused)
            if isinstance(entry, Mapping):
                yield f"{location}[{index}]", entries

    def text(self, value: object, location: str, what: str) -> str:
        """Read text that is not empty. what: noun phrase for the value in the message."""
        if not isinstance(value, str) or not value:
            self.problem(location, f"must be {what}, got {shown(value)}")
            return ""
        return value


def _inside(location: str, key: str) -> str:
    return key if location == "recipe" else f"{location}.{key}"
