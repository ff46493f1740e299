"""References to models: a folder on this machine or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.yaml_document import Findings, shown


@dataclass(frozen=True)
class ModelReference:
    """A model as the recipe spells it; references to one folder are equal, however they spell it.

    path: a local folder, '~' allowed, or the name of a hub repository; revision: a branch, tag or commit of the latter.
    """

    path: str = field(compare=False)
    revision: str | None = field(default=None, compare=False)
    identity: tuple[str, str | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # A repository's default branch may be any, so org/name and org/name@main are not known to be one model.
        folder = _folder(self.path)
        identity = (self.path, self.revision) if folder is None else (os.path.realpath(folder), None)
        object.__setattr__(self, "identity", identity)

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """The model that `path` or `path@revision` names.

        A folder on this machine may have '@' and '+' in its path: the longest reading of `text` that exists is taken.
        Otherwise the last '@' starts the revision. Raises ArcmergeError for '+', which would start a LoRA adapter.
        """
        if _folder(text) is not None:
            return cls(text)
        at_signs = [position for position, character in enumerate(text) if character == "@"]
        for position in reversed(at_signs):
            if _folder(text[:position]) is not None:
                return cls._of(text, text[:position], text[position + 1 :])
        if "+" in text:
            raise ArcmergeError(
                f"LoRA adapters are not supported, got {shown(text)}, which is no folder on this machine; "
                "merge the adapter into its model first and name the result"
            )
        path, at_sign, revision = text.rpartition("@")
        return cls._of(text, path, revision) if at_sign else cls._of(text, text, None)

    @classmethod
    def _of(cls, text: str, path: str, revision: str | None) -> ModelReference:
        if not path.strip() or revision == "":
            raise ArcmergeError(f"a model must be named `path` or `path@revision`, got {shown(text)}")
        return cls(path, revision)

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


def _folder(path: str) -> str | None:
    """Where on this machine `path` leads, '~' allowed; None for what is not here, as the name of a repository."""
    expanded = os.path.expanduser(path)
    return expanded if path and os.path.exists(expanded) else None


def read_reference(value: Any, place: str, findings: Findings) -> ModelReference:
    """The model that a recipe names by text or by the mapping `{model: text | {path, revision}}`.

    With a problem noted in `findings`, the reference returned is an empty one.
    """
    reference = _read_mapping(value, place, findings) if isinstance(value, dict) else _read_text(value, place, findings)
    if reference.revision and _folder(reference.path) is not None:
        findings.warning(place, f"a folder has no revisions, `@{reference.revision}` is ignored")
    return reference


def _read_text(value: Any, place: str, findings: Findings) -> ModelReference:
    if text := findings.text(value, place, "the name of a model, `path` or `path@revision`"):
        try:
            return ModelReference.parse(text)
        except ArcmergeError as error:
            findings.problem(place, str(error))
    return ModelReference("")


def _read_mapping(value: dict[Any, Any], place: str, findings: Findings) -> ModelReference:
    entries = findings.mapping(value, place, known=("model", "lora"), unused=("override_architecture",))
    if entries.get("lora") is not None:
        findings.problem(
            f"{place}.lora",
            f"LoRA adapters are not supported, got {shown(entries['lora'])}; "
            "merge the adapter into its model first and name the result",
        )
    model = entries.get("model")
    if not isinstance(model, dict):
        return _read_text(model, f"{place}.model", findings)
    parts = findings.mapping(model, f"{place}.model", known=("path", "revision"))
    path = findings.text(parts.get("path"), f"{place}.model.path", "a folder or the name of a hub repository")
    revision = parts.get("revision")
    if revision is not None:
        revision = findings.text(revision, f"{place}.model.revision", "a branch, tag or commit, in quotes")
    return ModelReference(path, revision)
