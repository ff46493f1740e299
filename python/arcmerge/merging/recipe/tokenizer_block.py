"""The tokenizer block of a recipe: the vocabulary of the result and the source of the rows of single tokens.

tokenizer_source: union                   # short for a block with `source` only
tokenizer:
  source: union                           # base, union, or a model
  tokens:
    <|im_start|>: {source: M/chat, force: true}
    <|pad|>: {source: {kind: zero}}
    <|end|>: {source: {kind: model_token, model: M/chat, token: <|im_end|>}}
  pad_to_multiple_of: 64
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.model_reference import ModelReference, read_reference
from arcmerge.merging.recipe.parameters import Kind, convert
from arcmerge.merging.recipe.yaml_document import Reader, shown

MAX_IDS = 1 << 24
"""Upper bound of token ids. The largest vocabularies have about 300,000 tokens; the result has a row for each id."""


@dataclass(frozen=True)
class ModelToken:
    """The row of another token of `model`. The token is given by its text or by its id; the other one is None."""

    model: ModelReference
    token: str | None = None
    token_id: int | None = None


TokenSource = ModelReference | ModelToken | Literal["zero"] | None


@dataclass(frozen=True)
class TokenRule:
    """The source of a token's row in the models that do not have the token.

    Args:
        source: the source; None for the default rules.
        force: use the source in the models that have the token, too.
    """

    source: TokenSource = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerRecipe:
    """The vocabulary of the result.

    Args:
        source: "base" for the vocabulary of `base_model`, "union" for that of all models, or one model.
        tokens: rules by the text of the token. A token that is not in the vocabulary is added.
        pad_to_multiple_of: round the number of rows up to a multiple of this number.
    """

    source: Literal["base", "union"] | ModelReference = "union"
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """The models that the block names, in order, without duplicates."""
        sources = [self.source, *(rule.source for rule in self.tokens.values())]
        named = [source.model if isinstance(source, ModelToken) else source for source in sources]
        return tuple(dict.fromkeys(model for model in named if isinstance(model, ModelReference)))


def read_tokenizer(source: Any, block: Any, reader: Reader) -> TokenizerRecipe | None:
    """Read `tokenizer_source: source` or `tokenizer: block`; None if both are None."""
    if source is not None and block is not None:
        reader.problem(
            "tokenizer_source", f"must not be set together with `tokenizer`, got {shown(source)}; keep one of the two"
        )
    if source is not None:
        return TokenizerRecipe(_read_source(source, "tokenizer_source", reader))
    if block is None:
        return None
    if isinstance(block, str):
        reader.problem("tokenizer", f"must be a mapping, got {shown(block)}; write `tokenizer_source: {block}` instead")
        return None
    entries = reader.mapping(block, "tokenizer", known=("source", "tokens", "pad_to_multiple_of"))
    return TokenizerRecipe(
        source=_read_source(entries.get("source", "union"), "tokenizer.source", reader),
        tokens=_read_tokens(entries.get("tokens"), reader),
        pad_to_multiple_of=None
        if (multiple := entries.get("pad_to_multiple_of")) is None
        else _read_integer(multiple, "tokenizer.pad_to_multiple_of", 1, reader),
    )


def _read_source(value: Any, location: str, reader: Reader) -> Literal["base", "union"] | ModelReference:
    if value == "base":
        return "base"
    if value == "union":
        return "union"
    return read_reference(value, location, reader)


def _read_tokens(value: Any, reader: Reader) -> Mapping[str, TokenRule]:
    if value is None:
        return {}
    entries = reader.mapping(value, "tokenizer.tokens")
    return {token: _read_rule(rule, f'tokenizer.tokens["{token}"]', reader) for token, rule in entries.items()}


def _read_rule(value: Any, location: str, reader: Reader) -> TokenRule:
    entries = reader.mapping(value, location, known=("source", "force"))
    force = _converted(entries.get("force", False), bool, f"{location}.force", reader)
    return TokenRule(_read_token_source(entries.get("source"), f"{location}.source", reader), bool(force))


def _read_token_source(value: Any, location: str, reader: Reader) -> TokenSource:
    if value is None:
        return None
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind is None:
        return read_reference(value, location, reader)
    if kind == "zero":
        reader.mapping(value, location, known=("kind",))
        return "zero"
    if kind == "model_token":
        return _read_model_token(value, location, reader)
    reader.problem(f"{location}.kind", f"must be `model_token` or `zero`, got {shown(kind)}")
    return None


def _read_model_token(value: Any, location: str, reader: Reader) -> ModelToken:
    entries = reader.mapping(value, location, known=("kind", "model", "token", "token_id"))
    model = read_reference(entries.get("model"), f"{location}.model", reader)
    token, token_id = entries.get("token"), entries.get("token_id")
    if (token is None) == (token_id is None):
        got = "neither" if token is None else "both"
        reader.problem(location, f"must have exactly one of `token` (the text) and `token_id` (the id), got {got}")
    if token is not None:
        token = reader.text(token, f"{location}.token", "the text of a token, in quotes")
    if token_id is not None:
        token_id = _read_integer(token_id, f"{location}.token_id", 0, reader)
    return ModelToken(model, token, token_id)


def _read_integer(value: Any, location: str, minimum: int, reader: Reader) -> int | None:
    number = _converted(value, int, location, Reader())
    if number is not None and not isinstance(value, bool) and minimum <= number < MAX_IDS:
        return int(number)
    reader.problem(location, f"must be a whole number from {minimum} to {MAX_IDS - 1}, got {shown(value)}")
    return None


def _converted(value: Any, kind: Kind, location: str, reader: Reader) -> Any:
    """`value` as a value of this kind, as for parameters of methods."""
    try:
        return convert(value, kind, location)
    except ArcmergeError as error:
        reader.extend(error)
    return None
