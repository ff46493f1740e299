"""Chat templates: the named ones, the template that most models of a merge share, and the reader of a folder's.

The files in chat_templates/ write the published formats. mergekit's files for alpaca, exaone and llama3 put line breaks
and indentation of the template itself into the prompt; these do not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError

NAMED = ("alpaca", "chatml", "exaone", "gemma", "llama3", "mistral")
"""The names that `chat_template` of a recipe can give."""

# A text that is shorter, or has no brace, is a misspelt name and not Jinja.
_MIN_CHARACTERS = 20


def find_template(setting: str, folders: Iterable[Path]) -> str | None:
    """Find the template that `chat_template` of a recipe asks for.

    Args:
        setting: "auto" for the template that most models have, the first of them if there is a tie; one of NAMED; or
            the text of a Jinja template.
        folders: the folders of the models.

    Returns:
        The text of the template; None if the setting is "auto" and no model has a template.

    Raises:
        ArcmergeError: for any other setting.
    """
    if setting == "auto":
        found = [template.strip() for folder in folders if (template := read_templates(folder).get("default"))]
        return Counter(found).most_common(1)[0][0] if found else None
    if setting in NAMED:
        return named_template(setting)
    if len(setting) < _MIN_CHARACTERS or "{" not in setting:
        raise ArcmergeError(
            f"'chat_template' must be auto, one of {', '.join(NAMED)}, or the text of a Jinja template, got {setting!r}"
        )
    return setting


def named_template(name: str) -> str:
    """The text of the template chat_templates/NAME.jinja."""
    from importlib.resources import files

    return (files(__package__) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def read_templates(folder: Path) -> dict[str, str]:
    """Read the chat templates of a checkpoint folder.

    They are in chat_template.jinja and additional_chat_templates/NAME.jinja, else in tokenizer_config.json, else in
    chat_template.json, where older processors keep theirs.

    Args:
        folder: the folder.

    Returns:
        The templates by name; a template without a name is "default".

    Raises:
        ArcmergeError: for a file that cannot be read as what its name says.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if found := {name: _read(file) for name, file in files.items() if file.is_file()}:
        return found
    for file in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        template: Any = parse_object(file.read_bytes(), file).get("chat_template") if file.exists() else None
        if isinstance(template, list):
            template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if isinstance(template, str):
            template = {"default": template}
        if isinstance(template, dict) and template:
            return {str(name): text for name, text in template.items() if isinstance(text, str)}
    return {}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArcmergeError(f"'{file}' must be UTF-8 text, got {error}; download it again") from error


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """The files of a tokenizer with `template` as its only chat template, in the file that transformers reads first."""
    changed = {name: content for name, content in files.items() if name != "chat_template.json"}
    changed["chat_template.jinja"] = template.encode()
    if "tokenizer_config.json" in changed:
        config = parse_object(changed["tokenizer_config.json"], Path("tokenizer_config.json"))
        if config.pop("chat_template", None) is not None:
            changed["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
    return changed
