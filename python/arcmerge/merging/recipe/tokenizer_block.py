"""The tokenizer block of a recipe: which vocabulary the result has, and where single rows come from.

tokenizer_source: union                   # short for the block below with a source only
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
from arcmerge.merging.recipe.yaml_document import Findings, shown

MOST_IDS = 1 << 24
"""Token ids are below: the largest vocabularies have some 300,000, and the result has a row for each id."""


@dataclass(frozen=True)
class ModelToken:
    """The row of another token of `model`, named by its text or by its number, one of which is None."""

    model: ModelReference
    token: str | None = None
    token_id: int | None = None


TokenSource = ModelReference | ModelToken | Literal["zero"] | None


@dataclass(frozen=True)
class TokenRule:
    """Where a token's row comes from in the models that lack it; None: where every other token's would.

    force: take it in the models that have the token, too.
    """

    source: TokenSource = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerRecipe:
    """The vocabulary of the result.

    source: that of `base_model`, of all models together, or of one model.
    tokens: rules by the token's text; a token that the vocabulary lacks is added.
    pad_to_multiple_of: the number of rows is rounded up to a multiple of it.
    """

    source: Literal["base", "union"] | ModelReference = "union"
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """Every model the block names, once, in order."""
        sources = [self.source, *(rule.source for rule in self.tokens.values())]
        named = [source.model if isinstance(source, ModelToken) else source for source in sources]
        return tuple(dict.fromkeys(model for model in named if isinstance(model, ModelReference)))


def read_tokenizer(source: Any, block: Any, findings: Findings) -> TokenizerRecipe | None:
    """The block that `tokenizer_source: source` or `tokenizer: block` gives; None if both are None."""
    if source is not None and block is not None:
        findings.problem(
            "tokenizer_source", f"must not stand beside `tokenizer`, got {shown(source)}; keep one of the two"
        )
    if source is not None:
        return TokenizerRecipe(_read_source(source, "tokenizer_source", findings))
    if block is None:
        return None
    if isinstance(block, str):
        findings.problem(
            "tokenizer", f"must be a mapping, got {shown(block)}; write `tokenizer_source: {block}` instead"
        )
        return None
    entries = findings.mapping(block, "tokenizer", known=("source", "tokens", "pad_to_multiple_of"))
    return TokenizerRecipe(
        source=_read_source(entries.get("source", "union"), "tokenizer.source", findings),
        tokens=_read_tokens(entries.get("tokens"), findings),
        pad_to_multiple_of=None
        if (multiple := entries.get("pad_to_multiple_of")) is None
        else _read_number(multiple, "tokenizer.pad_to_multiple_of", 1, findings),
    )


def _read_source(value: Any, place: str, findings: Findings) -> Literal["base", "union"] | ModelReference:
    if value == "base":
        return "base"
    if value == "union":
        return "union"
    return read_reference(value, place, findings)


def _read_tokens(value: Any, findings: Findings) -> Mapping[str, TokenRule]:
    if value is None:
        return {}
    entries = findings.mapping(value, "tokenizer.tokens")
    return {token: _read_rule(rule, f"tokenizer.tokens[{token!r}]", findings) for token, rule in entries.items()}


def _read_rule(value: Any, place: str, findings: Findings) -> TokenRule:
    entries = findings.mapping(value, place, known=("source", "force"))
    force = _converted(entries.get("force", False), bool, f"{place}.force", findings)
    return TokenRule(_read_token_source(entries.get("source"), f"{place}.source", findings), bool(force))


def _read_token_source(value: Any, place: str, findings: Findings) -> TokenSource:
    if value is None:
        return None
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind is None:
        return read_reference(value, place, findings)
    if kind == "zero":
        findings.mapping(value, place, known=("kind",))
        return "zero"
    if kind == "model_token":
        return _read_model_token(value, place, findings)
    findings.problem(f"{place}.kind", f"must be `model_token` or `zero`, got {shown(kind)}")
    return None


def _read_model_token(value: Any, place: str, findings: Findings) -> ModelToken:
    entries = findings.mapping(value, place, known=("kind", "model", "token", "token_id"))
    model = read_reference(entries.get("model"), f"{place}.model", findings)
    token, number = entries.get("token"), entries.get("token_id")
    if (token is None) == (number is None):
        findings.problem(place, "must name its token by exactly one of `token` (text) and `token_id` (number)")
    if token is not None:
        token = findings.text(token, f"{place}.token", "the text of a token, in quotes")
    if number is not None:
        number = _read_number(number, f"{place}.token_id", 0, findings)
    return ModelToken(model, token, number)


def _read_number(value: Any, place: str, least: int, findings: Findings) -> int | None:
    number = _converted(value, int, place, Findings())
    if number is not None and not isinstance(value, bool) and least <= number < MOST_IDS:
        return int(number)
    findings.problem(place, f"must be a whole number from {least} to {MOST_IDS - 1}, got {shown(value)}")
    return None


def _converted(value: Any, kind: Kind, place: str, findings: Findings) -> float | None:
    """`value` as a parameter of this kind would be read, text that spells it included."""
    try:
        return convert(value, kind, place)
    except ArcmergeError as error:
        findings.problems.extend(error.problems)
    return None
