"""Every error message of the package has the one form of CONTRIBUTING: 'name' must RULE, got VALUE; ADVICE."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from paths import ROOT

PACKAGE = ROOT / "python" / "arcmerge"
# Calls whose first string is a message for a user; `problem` takes the place first.
RAISED = {"ArcmergeError", "MissingPackage", "ValueError", "TypeError"}
COLLECTED = {"add", "problem"}
# "{}" stands for a value. The name, or the place, in front of "must" is quoted or is a value of its own.
FORM = re.compile(r"(?:\S.*: )?(?:'[^']+'|\{\})[^;]* must [^;]+, got [^;]+(?:; .+)?(?<![.!])", re.DOTALL)
ROOMS = ("", "checkpoint", "cli", "dispatch", "gemma2", "integrations", "merging", "ops", "sweeping")


def template(node: ast.expr) -> str | None:
    """The text of a literal, "{}" for each value in it; None for what is no literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [template(side) for side in (node.left, node.right)]
        return None if parts[0] is None else parts[0] + (parts[1] or "{}")
    if isinstance(node, ast.IfExp):
        return template(node.body)
    return None


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every message in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in RAISED:
            texts = node.args[0].elts if isinstance(node.args[0], ast.List) else [node.args[0]]
        elif name in COLLECTED:
            texts = [node.args[-1] if name == "problem" else node.args[0]]
        else:
            continue
        for text in texts:
            found = template(text)
            if found is not None and (name in RAISED or " " in found):
                yield node.lineno, ("'place' " if name == "problem" else "") + found


@pytest.mark.parametrize("room", ROOMS)
def test_every_message_has_the_one_form(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py")) if room else sorted(PACKAGE.glob("*.py"))
    found = [(file, line, text) for file in files for line, text in messages(file)]
    assert [f"{file.name}:{line}: {text}" for file, line, text in found if not FORM.fullmatch(text)] == []


def test_messages_are_found() -> None:
    """The rooms hold some 280 literal messages; the checks of ops make theirs in dispatch."""
    assert sum(1 for file in PACKAGE.rglob("*.py") for _ in messages(file)) > 250


def test_a_message_in_another_form_is_found(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "raise ArcmergeError(f'{path} is missing: download it again.')\n"
        "problems.add(f\"'{name}' must be a number, got {value}\" + advice)\n"
        "errors.problem(place, 'must be a list, got a mapping; put it in brackets')\n"
        "raise ArcmergeError(\"'t' must be a number\")\n"
    )
    good = [bool(FORM.fullmatch(text)) for _, text in messages(file)]
    assert sorted(good) == [False, False, True, True]
