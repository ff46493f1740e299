"""Tiny models with a tokenizer and an embedding, and their rows in a common vocabulary."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from arcmerge.dtypes import BF16, F16, F32, DType
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.tokenizer_block import TokenizerRecipe
from arcmerge.merging.vocabulary.embedding_rows import RowAddresses, Table, align, decode, encode
from arcmerge.merging.vocabulary.vocabulary import Vocabulary, build_vocabulary

COLUMNS = 24
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
LETTERS = tuple("abcdefgh")


class Model:
    """A folder with a tokenizer and a config, and an embedding with random rows.

    words: tokens that its BPE model has beside LETTERS, each the merge of two known ones; added: those added to it.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str] = (),
        added: Sequence[str] = (),
        *,
        dtype: DType = BF16,
        rows: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        folder.mkdir()
        self.folder = folder
        self.reference = ModelReference(str(folder))
        vocabulary = [*SPECIAL, *LETTERS, *words]
        self.tokens = [*vocabulary, *added]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        entries = [
            {"id": number, "content": token, **flags, "special": token in SPECIAL}
            for number, token in enumerate(self.tokens)
            if token in (*SPECIAL, *added)
        ]
        model = {
            "type": "BPE",
            "unk_token": "<unk>",
            "vocab": {token: number for number, token in enumerate(vocabulary)},
            "merges": [[word[:-1], word[-1]] for word in words],
        }
        names = ("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer")
        values = ("1.0", None, None, entries, None, None)
        document = {**dict(zip(names, values, strict=True)), "post_processor": None, "decoder": None, "model": model}
        (folder / "tokenizer.json").write_text(json.dumps(document, indent=2))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", **(config or {})}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        self.rows = rows or len(self.tokens)
        shape = {"hidden_size": COLUMNS, "num_hidden_layers": 1, "vocab_size": self.rows}
        (folder / "config.json").write_text(
            json.dumps({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **shape})
        )
        random = np.random.default_rng(list(folder.name.encode()))
        self.stored = encode(random.standard_normal((self.rows, COLUMNS)), dtype)
        self.dtype = dtype

    @property
    def values(self) -> NDArray[np.float64]:
        return decode(self.stored, self.dtype)

    @property
    def table(self) -> Table:
        return Table(self.stored.ctypes.data, self.dtype, self.rows, COLUMNS)

    def row(self, token: str) -> NDArray[np.float64]:
        return self.values[self.tokens.index(token)]


def build(recipe: TokenizerRecipe, *models: Model) -> Vocabulary:
    return build_vocabulary(recipe, {model.reference: model.folder for model in models}, models[0].reference)


def aligned(
    recipe: TokenizerRecipe, *models: Model, cast: DType | None = None
) -> tuple[Vocabulary, list[NDArray[np.float64]]]:
    """The vocabulary of the first model as base with the others, and the rows of each in it."""
    vocabulary = build(recipe, *models)
    tables = {model.reference: model.table for model in models}
    rows = align(vocabulary, "embed", tables, base=models[0].reference, cast=cast)
    return vocabulary, [gather(rows[model.reference]) for model in models]


def gather(rows: RowAddresses) -> NDArray[np.float64]:
    kind = {BF16: np.uint16, F16: np.float16, F32: np.float32}
    values = np.zeros((len(rows.addresses), rows.columns))
    for part in rows.parts:
        nbytes = part.columns * part.dtype.itemsize
        stored = b"".join(ctypes.string_at(int(address), nbytes) for address in part.addresses)
        values += decode(np.frombuffer(stored, kind[part.dtype]).reshape(values.shape), part.dtype)
    return values


class ThreeModels:
    """Fixtures with a base and two fine-tunes of it."""

    @pytest.fixture
    def base(self, tmp_path: Path) -> Model:
        return Model(tmp_path / "base", ["ab", "abc"], ["<base>"])

    @pytest.fixture
    def chat(self, tmp_path: Path) -> Model:
        """Has the tokens of the base with other ids, tokens that the base does not have, and two added tokens."""
        return Model(tmp_path / "chat", ["cd", "cde", "ab", "abc"], ["<chat>", "<end>"])

    @pytest.fixture
    def code(self, tmp_path: Path) -> Model:
        return Model(tmp_path / "code", ["cd", "gh"], ["<end>"])
