"""References to models: a folder on this machine or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.yaml_document import Reader, shown

_MERGE_LORA = "merge the adapter into its model first and name the result"


@dataclass(frozen=True)
class ModelReference:
    """A model as the recipe spells it. References to the same folder are equal, however they spell it.

    Args:
        path: a local folder, with '~' allowed, or the name of a hub repository.
        revision: a branch, tag or commit of the repository.
    """

    path: str = field(compare=False)
    revision: str | None = field(default=None, compare=False)
    identity: tuple[str, str | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # org/name and org/name@main may be different models, because the default branch can have any name.
        folder = _folder(self.path)
        identity = (self.path, self.revision) if folder is None else (os.path.realpath(folder), None)
        object.__setattr__(self, "identity", identity)

    @classmethod
    def parse(cls, text: str, name: str = "model") -> ModelReference:
        """Parse `path` or `path@revision`.

        The path of a local folder may contain '@' and '+': the longest prefix of `text` that exists is taken as the
        path. Otherwise the last '@' starts the revision.

        Args:
            text: the text.
            name: name of the text in error messages.

        Raises:
            ArcmergeError: for an empty path or revision, and for '+', which starts a LoRA adapter in mergekit.
        """
        if _folder(text) is not None:
            return cls(text)
        at_signs = [index for index, character in enumerate(text) if character == "@"]
        path, revision = text, None
        for index in reversed(at_signs):
            if _folder(text[:index]) is not None:
                path, revision = text[:index], text[index + 1 :]
                break
        else:
            if "+" in text:
                raise ArcmergeError(
                    f"'{name}' must not have a LoRA adapter, which is not supported, got {shown(text)}, which is not "
                    f"a folder on this machine; {_MERGE_LORA}"
                )
            if at_signs:
                path, revision = text[: at_signs[-1]], text[at_signs[-1] + 1 :]
        if not path.strip() or revision == "":
            raise ArcmergeError(f"'{name}' must be `path` or `path@revision`, got {shown(text)}")
        return cls(path, revision)

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


def _folder(path: str) -> str | None:
    """The local folder that `path` names, with '~' expanded; None if it does not exist."""
    expanded = os.path.expanduser(path)
    return expanded if path and os.path.exists(expanded) else None


def read_reference(value: Any, location: str, reader: Reader) -> ModelReference:
    """Read a model that the recipe gives as text or as the mapping `{model: text | {path, revision}}`.

    If the value is wrong, the problem is added to `reader` and the reference is empty.
    """
    if isinstance(value, dict):
        reference = _read_mapping(value, location, reader)
    else:
        reference = _read_text(value, location, reader)
    if reference.revision and _folder(reference.path) is not None:
        reader.warning(location, f"a folder has no revisions, `@{reference.revision}` is ignored")
    return reference


def _read_text(value: Any, location: str, reader: Reader) -> ModelReference:
    if text := reader.text(value, location, "the name of a model, `path` or `path@revision`"):
        try:
            return ModelReference.parse(text, location)
        except ArcmergeError as error:
            reader.extend(error)
    return ModelReference("")


def _read_mapping(value: dict[Any, Any], location: str, reader: Reader) -> ModelReference:
    entries = reader.mapping(value, location, known=("model", "lora"), unused=("override_architecture",))
    if entries.get("lora") is not None:
        reader.problem(
            f"{location}.lora",
            f"must not be set, because LoRA adapters are not supported, got {shown(entries['lora'])}; {_MERGE_LORA}",
        )
    model = entries.get("model")
    if not isinstance(model, dict):
        return _read_text(model, f"{location}.model", reader)
    parts = reader.mapping(model, f"{location}.model", known=("path", "revision"))
    path = reader.text(parts.get("path"), f"{location}.model.path", "a folder or the name of a hub repository")
    revision = parts.get("revision")
    if revision is not None:
        revision = reader.text(revision, f"{location}.model.revision", "a branch, tag or commit, in quotes")
    return ModelReference(path, revision)
