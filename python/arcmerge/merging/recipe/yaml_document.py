"""The YAML document behind a recipe, and what is found wrong or useless in it.

A recipe is checked whole: each reader notes what it finds at the place it finds it and goes on with a harmless
stand-in, so that one run tells a user everything there is to mend.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from arcmerge.errors import ArcmergeError

_SHOWN_CHARACTERS = 60
_MOST_NODES = 1_000_000

# Never looks at more of a value than a sentence can show: dicts from Python, too, may be deep or hold themselves.
_BRIEFLY = reprlib.Repr()
_BRIEFLY.maxlevel = 4
_BRIEFLY.maxlist = _BRIEFLY.maxtuple = _BRIEFLY.maxdict = 12
_BRIEFLY.maxstring = _BRIEFLY.maxother = _BRIEFLY.maxlong = 2 * _SHOWN_CHARACTERS


def parse(text: str) -> Mapping[Any, Any]:
    """The mapping that the YAML document `text` holds.

    Raises ArcmergeError for a syntax error, a key given twice, more than one document, or anything but a mapping.
    """
    try:
        document = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        problem = error.problem or error.context or "not valid YAML"
        raise ArcmergeError(f"the recipe must be one valid YAML document: {position}: {problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ArcmergeError(f"the recipe must be one valid YAML document: {' '.join(str(error).split())}") from error
    if not isinstance(document, Mapping):
        raise ArcmergeError(
            f"the recipe must be a mapping that starts with lines like `merge_method: slerp`, got {shown(document)}"
        )
    return document


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, made to refuse what it takes: equal keys, and aliases that hold themselves or multiply."""

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
                        None, None, f"the key `{key.value}` is given twice; keep one", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


def _check_size(node: yaml.Node | None, sizes: dict[yaml.Node, int]) -> int:
    """How many nodes `node` stands for once its aliases are written out.

    sizes: of the nodes met before, 0 for those that hold this one.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if node not in sizes:
        sizes[node] = 0
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes[node] = 1 + sum(_check_size(part, sizes) for part in parts)
    if not 0 < sizes[node] <= _MOST_NODES:
        rule = f"stands for more than {_MOST_NODES:,} values" if sizes[node] else "holds an alias of itself"
        raise yaml.composer.ComposerError(None, None, f"this {rule}; write it without aliases", node.start_mark)
    return sizes[node]


def shown(value: object) -> str:
    """`value` as a sentence quotes it: short, on one line, YAML's words for the constants."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    text = " ".join(_BRIEFLY.repr(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def did_you_mean(word: object, known: Collection[str]) -> str:
    """`; did you mean X?` when one of `known` is close to `word`, else nothing."""
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


@dataclass
class Findings:
    """What has been found in a recipe so far. problems: forbid the merge; warnings: do not.

    The readers return the value when it has the right type; otherwise they note a problem and return an empty one.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def problem(self, place: str, rule: str) -> None:
        self.problems.append(f"{place}: {rule}")

    def warning(self, place: str, fact: str) -> None:
        self.warnings.append(f"{place}: {fact}")

    def mapping(
        self, value: object, place: str, known: Collection[str] | None = None, unused: Collection[str] = ()
    ) -> Mapping[str, Any]:
        """A mapping with text keys, with a warning for each key that is not in `known` (None: any key is).

        unused: keys that the language has and no merge reads.
        """
        if not isinstance(value, Mapping):
            self.problem(place, f"must be a mapping of names to values, got {shown(value)}")
            return {}
        for key in value:
            if not isinstance(key, str):
                self.problem(place, f"keys must be text, got {shown(key)}; put it in quotes")
            elif key in unused:
                self.warning(_inside(place, key), "this key has no effect on a merge; remove it")
            elif known is not None and key not in known:
                self.warning(_inside(place, key), f"unknown key, ignored{did_you_mean(key, known)}")
        return {key: entry for key, entry in value.items() if isinstance(key, str)}

    def mappings(
        self, value: object, place: str, what: str, known: Collection[str], unused: Collection[str] = ()
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Place and content of each mapping in a list of at least one; `what` names the entries in the plural."""
        if not isinstance(value, list) or not value:
            got = "an empty list" if isinstance(value, list) else shown(value)
            self.problem(place, f"must be a list of at least one of {what}, got {got}")
            return
        for index, entry in enumerate(value):
            entries = self.mapping(entry, f"{place}[{index}]", known, unused)
            if isinstance(entry, Mapping):
                yield f"{place}[{index}]", entries

    def text(self, value: object, place: str, what: str) -> str:
        if not isinstance(value, str) or not value:
            self.problem(place, f"must be {what}, got {shown(value)}")
            return ""
        return value

    def finish(self) -> None:
        """Raise everything found to forbid the merge, if anything was."""
        if self.problems:
            raise ArcmergeError(self.problems)


def _inside(place: str, key: str) -> str:
    return key if place == "recipe" else f"{place}.{key}"
