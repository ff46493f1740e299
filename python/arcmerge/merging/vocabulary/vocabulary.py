"""The vocabulary of the result, and the row of each of its tokens in each model.

The vocabulary is that of the base, that of one model, or the union of all: the base's tokens with their ids, then the
tokens of the other models' tokenizers, then the tokens that were added to those, each in the order of the models and of
their ids. Tokens that the recipe names come last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError, counted
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.tokenizer_block import TokenizerRecipe, TokenRule
from arcmerge.merging.vocabulary.tokenizer_json import PLAIN, Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of the result.

    Args:
        size: number of rows of the result including padding, which is `vocab_size` in its config.json.
        ids: the id of each token in the result.
        model_ids: the id of each token in each model.
        rows: for each model the row of each token of the result, int64 (size,), -1 if the model does not have it.
        rules: rules of the recipe by token.
        base: the base model.
        files: the files of the result's tokenizer by name.
        warnings: sentences about models without tokenizer, and about tokens without rows.
    """

    size: int
    ids: Mapping[str, int] = field(repr=False)
    model_ids: Mapping[ModelReference, Mapping[str, int]] = field(repr=False)
    rows: Mapping[ModelReference, NDArray[np.int64]] = field(repr=False)
    rules: Mapping[str, TokenRule]
    base: ModelReference
    files: Mapping[str, bytes] = field(repr=False)
    warnings: tuple[str, ...]

    def renumbered(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The base's config.json or generation_config.json with the `*_token_id` entries of this vocabulary."""
        texts = {token_id: token for token, token_id in self.model_ids[self.base].items()}

        def renumber(old: Any) -> Any:
            if isinstance(old, list):
                return [renumber(item) for item in old]
            return self.ids.get(texts.get(old, ""), old)

        return {key: renumber(value) if key.endswith("_token_id") else value for key, value in settings.items()}


def build_vocabulary(
    recipe: TokenizerRecipe,
    folders: Mapping[ModelReference, Path],
    base: ModelReference,
    source: Path | None = None,
) -> Vocabulary:
    """Read the tokenizers of all models and make the vocabulary of the result.

    Args:
        recipe: the tokenizer block of the recipe.
        folders: the folders of the models, including the base.
        base: the base model.
        source: the folder of the model whose tokenizer the recipe names, if it is not one of `folders`.

    Raises:
        ArcmergeError: if the base has no tokenizer.json, or a tokenizer is not valid.
    """
    warnings: list[str] = []
    order = [base, *(model for model in folders if model != base)]
    tokenizers = _read_all({model: folders[model] for model in order}, base, warnings)
    limits = {model: _rows_of(folders[model], tokenizers[model]) for model in order}
    for model, limit in limits.items():
        beyond = [token for token, token_id in tokenizers[model].ids.items() if token_id >= limit]
        if beyond:
            warnings.append(f"{model}: has {limit} rows, and none for {_some(beyond)} of its tokenizer")
    tokenizers[base] = tokenizers[base].first(limits[base])

    if isinstance(recipe.source, ModelReference):
        output = tokenizers.get(recipe.source) or _read_source(recipe.source, source)
    elif recipe.source == "base":
        output = tokenizers[base]
    else:
        output = _union(tokenizers, limits)
    output = output.with_tokens({token: PLAIN for token in recipe.tokens if token not in output.ids})

    size = max(output.ids.values()) + 1
    size += -size % (recipe.pad_to_multiple_of or 1)
    rows = {model: _rows(output.ids, tokenizers[model].ids, limits[model], size) for model in order}
    nowhere = np.all([own < 0 for own in rows.values()], axis=0)
    without = [token for token, token_id in output.ids.items() if nowhere[token_id] and token not in recipe.tokens]
    if without:
        warnings.append(f"no model has {_some(without)}; their rows are zeros")
    return Vocabulary(
        size=size,
        ids=output.ids,
        model_ids={model: tokenizer.ids for model, tokenizer in tokenizers.items()},
        rows=rows,
        rules=recipe.tokens,
        base=base,
        files=output.files(),
        warnings=tuple(warnings),
    )


def _read_all(
    folders: Mapping[ModelReference, Path], base: ModelReference, warnings: list[str]
) -> dict[ModelReference, Tokenizer]:
    """A tokenizer for each model. Models with the same files share one, as most fine-tunes of a model do."""
    read: dict[tuple[bytes | None, ...], Tokenizer | None] = {}
    tokenizers: dict[ModelReference, Tokenizer] = {}
    for model, folder in folders.items():
        files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")]
        content = tuple(file.read_bytes() if file.exists() else None for file in files)
        if content[0] is None or content not in read:
            read[content] = Tokenizer.read(folder)
        tokenizer = read[content]
        if tokenizer is None and model == base:
            raise ArcmergeError(
                f"{base}: 'tokenizer.json' must exist to align rows by token, got none; "
                "copy the one that the model was trained with into its folder"
            )
        if tokenizer is None:
            warnings.append(f"{model}: has no tokenizer; its rows are assumed to be in the order of {base}")
        tokenizers[model] = replace(tokenizer, folder=folder) if tokenizer else tokenizers[base]
    return tokenizers


def _read_source(model: ModelReference, folder: Path | None) -> Tokenizer:
    tokenizer = Tokenizer.read(folder) if folder else None
    if tokenizer is None:
        raise ArcmergeError(
            f"{model}: 'tokenizer.json' must exist in the source of the tokenizer, got none; name another model"
        )
    return tokenizer


def _rows_of(folder: Path, tokenizer: Tokenizer) -> int:
    """The number of a model's rows for tokens: vocab_size of its config.json, else the ids of its tokenizer."""
    file = folder / "config.json"
    config = parse_object(file.read_bytes(), file) if file.exists() else {}
    nested = config.get("text_config")
    size = config.get("vocab_size") or (nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if type(size) is int and size > 0 else max(tokenizer.ids.values()) + 1


def _union(tokenizers: Mapping[ModelReference, Tokenizer], limits: Mapping[ModelReference, int]) -> Tokenizer:
    """The first tokenizer with the tokens of the others: the tokens of their models, then their added tokens."""
    base = next(iter(tokenizers.values()))
    added: dict[str, Mapping[str, bool]] = {}
    for model, tokenizer in tokenizers.items():
        for token in _in_order(tokenizer.added, tokenizer.ids, limits[model]):
            added.setdefault(token, tokenizer.added[token])
    plain: dict[str, Mapping[str, bool]] = {}
    for model, tokenizer in tokenizers.items():
        new = tokenizer.ids.keys() - base.ids.keys() - added.keys()
        plain.update((token, PLAIN) for token in _in_order(new, tokenizer.ids, limits[model]))
    return base.with_tokens({**plain, **added})


def _in_order(tokens: Iterable[str], ids: Mapping[str, int], limit: int) -> list[str]:
    return sorted((token for token in tokens if ids[token] < limit), key=ids.__getitem__)


def _rows(ids: Mapping[str, int], model_ids: Mapping[str, int], limit: int, size: int) -> NDArray[np.int64]:
    """For each of `size` rows of the result the model's row of the same token, -1 if there is none below `limit`."""
    rows = np.full(size, -1, np.int64)
    token_ids = np.fromiter(ids.values(), np.int64, len(ids))
    own = np.fromiter(map(model_ids.get, ids, repeat(-1)), np.int64, len(ids))
    rows[token_ids] = np.where(own < limit, own, -1)
    return rows


def _some(tokens: Sequence[str]) -> str:
    """The number of tokens and the first few of them."""
    shown = ", ".join(map(repr, tokens[:3])) + (", ..." if len(tokens) > 3 else "")
    return f"{counted(len(tokens), 'token')} ({shown})"
