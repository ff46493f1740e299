"""README.md of the result: the models, the method and the recipe of the merge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from arcmerge.merging.recipe.model_reference import ModelReference

_PROJECT = "arcmerge"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Merges of all tools have the first tag on the hub.
_TAGS = ["mergekit", "merge", _PROJECT]

_CARD = """\
---
{front_matter}---
# {name}

This is a merge of language models, made with {project}.

## Merge details

### Merge method

This model was merged using the {method} method{base}.{seed}

### Models merged

The following models were included in the merge:

{models}

### Configuration

The following YAML configuration was used to produce this model:

{recipe}
"""


def model_card(
    name: str,
    method: str,
    models: Sequence[ModelReference],
    base: ModelReference | None,
    recipe: str,
    seed: int | None = None,
) -> str:
    """Make the model card in Markdown.

    Args:
        name: name of the result.
        method: title of the merge method.
        models: all models in order.
        base: the base model, if there is one.
        recipe: the YAML text of the recipe.
        seed: seed of the random numbers; None if the method draws none.
    """
    hub_names = list(dict.fromkeys(model.path for model in models if is_hub_name(model)))
    front_matter = {"base_model": hub_names, "library_name": "transformers", "tags": _TAGS}
    return _CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=True),
        name=name,
        project=_PROJECT,
        method=method,
        base=f" with {_linked(base)} as the base" if base else "",
        seed="" if seed is None else f" Its random numbers have the seed {seed}.",
        models="\n".join(f"* {_linked(model)}" for model in models),
        recipe=_fenced(recipe, "yaml"),
    )


def is_hub_name(model: ModelReference) -> bool:
    """Whether a reference has the form of a repository's name on the hub, and no local folder has that name."""
    return _HUB_NAME.fullmatch(model.path) is not None and not Path(model.path).exists()


def _linked(model: ModelReference) -> str:
    return f"[{model}](https://huggingface.co/{model.path})" if is_hub_name(model) else f"`{model}`"


def _fenced(text: str, language: str) -> str:
    """A code block with a fence that is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
