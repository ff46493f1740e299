"""Prompts in the forms that users pass: text, conversations, and token ids as lists, arrays and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.arguments import plain, read_whole
from arcmerge.gemma2.config import Gemma2Config
from arcmerge.gemma2.text.tokenizer import Gemma2Tokenizer

_TEXT = (str, bytes, bytearray)  # sequences that are no token ids


@dataclass(frozen=True)
class Prompts:
    """One prompt or several.

    Attributes:
        rows: the token ids of each prompt, without padding.
        columns: for each token, its column in `padded`.
        padded: the token ids as given, with padding.
        given: the argument; the result has the same form.
        is_single: one prompt, not a list of one.
        is_text: text or conversations, whose answers are text.
        is_chat: conversations.
    """

    rows: list[list[int]]
    columns: list[list[int]]
    padded: list[list[int]]
    given: Any
    is_single: bool
    is_text: bool
    is_chat: bool = False

    @classmethod
    def read(cls, given: Any, attention_mask: Any, tokenizer: Callable[[], Gemma2Tokenizer]) -> Prompts:
        """Read the arguments of Gemma2.generate.

        Args:
            given: `input_ids`.
            attention_mask: [B, T] or None.
            tokenizer: opens the tokenizer; called for text only.

        Raises:
            ArcmergeError: if an argument has another form.
        """
        if isinstance(given, Mapping) and "input_ids" in given:  # the result of a tokenizer of transformers
            attention_mask = given.get("attention_mask") if attention_mask is None else attention_mask
            given = given["input_ids"]
        found = plain(given)
        kind = _kind(found)
        if kind in ("text", "messages"):
            found, is_single = [found], True
        elif kind == "tokens":
            found, is_single = [read_row("input_ids", given)], True
        else:
            found, is_single = [plain(one) for one in found], False
            kinds = {_kind(one) for one in found}
            if len(kinds) > 1 or not kinds <= {"text", "messages", "tokens"}:
                raise _wrong_form(given)
            kind = kinds.pop()
        if kind != "tokens":
            if attention_mask is not None:
                raise ArcmergeError("'attention_mask' must be None for text, which has no padding, got a mask")
            encode = tokenizer().encode if kind == "text" else tokenizer().encode_chat
            rows = [encode(one) for one in found]
            return cls(rows, _columns(rows), rows, given, is_single, True, kind == "messages")
        padded = [read_row("input_ids", one) for one in found]
        columns = _columns(padded) if attention_mask is None else _unmasked(attention_mask, padded, is_single)
        rows = [[row[column] for column in kept] for row, kept in zip(padded, columns, strict=True)]
        return cls(rows, columns, padded, given, is_single, False)

    @property
    def width(self) -> int:
        """The length of the longest prompt, with padding."""
        return max(map(len, self.padded), default=0)

    def with_answers(self, tokens: Sequence[Sequence[int]], texts: Sequence[str], pad: int) -> Any:
        """The result of Gemma2.generate: texts for text; else prompts and padded answers in the form of the prompts."""
        if self.is_text:
            return texts[0] if self.is_single else list(texts)
        longest = max(map(len, tokens)) if isinstance(self.given, Tensor | np.ndarray) else 0
        found: Any = [
            [*row, *answer, *[pad] * (longest - len(answer))] for row, answer in zip(self.padded, tokens, strict=True)
        ]
        found = found[0] if self.is_single else found
        if isinstance(self.given, Tensor):
            return torch.tensor(found, dtype=self.given.dtype, device=self.given.device)
        return np.array(found, self.given.dtype) if isinstance(self.given, np.ndarray) else found


def read_row(name: str, value: Any) -> list[int]:
    """The token ids of one sequence: a list, an array or a tensor [T]; ArcmergeError for anything else."""
    found = plain(value)
    found = [plain(token) for token in found] if isinstance(found, Sequence) and not isinstance(found, _TEXT) else None
    if found is None or not all(type(token) is int for token in found):
        raise ArcmergeError(f"'{name}' must be token ids, which are integers, got {value!r:.80}")
    return found


def read_pair(
    index: int, pair: Any, config: Gemma2Config, tokenizer: Callable[[], Gemma2Tokenizer]
) -> tuple[list[int], int]:
    """The token ids of pair `index` of Gemma2.score, and how many of the last ones are scored.

    Raises:
        ArcmergeError: if the pair has another form, or too many tokens.
    """
    name, pair = f"pairs[{index}]", plain(pair)
    if isinstance(pair, str | bytes) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise ArcmergeError(f"'{name}' must be a context and a continuation, got {pair!r:.80}")
    context, continuation = pair
    if isinstance(context, str) != isinstance(continuation, str):
        kinds = " and ".join("text" if isinstance(one, str) else f"{one!r:.40}" for one in pair)
        raise ArcmergeError(f"'{name}' must be two texts or two lists of token ids, got {kinds}")
    if isinstance(context, str) and isinstance(continuation, str):
        context, continuation = tokenizer().encode_pair(context, continuation)
    else:
        context = read_row(name, context) or [config.bos_token_id]
        continuation = read_row(name, continuation)
    if not continuation:
        raise ArcmergeError(f"'{name}' must have a continuation of one token or more, got none")
    tokens, limit = [*context, *continuation], config.max_position_embeddings + 1
    if len(tokens) > limit:
        raise ArcmergeError(
            f"'{name}' must have at most {limit} tokens, one more than the model's max_position_embeddings, got "
            f"{len(tokens)}; shorten the context"
        )
    return tokens, len(continuation)


def read_windows(
    text: Any, window: int | None, config: Gemma2Config, tokenizer: Callable[[], Gemma2Tokenizer]
) -> list[list[int]]:
    """The windows of Gemma2.perplexity: the token ids of a text in pieces of window - 1 tokens, without BOS.

    Raises:
        ArcmergeError: if an argument has another form, or if the text is empty.
    """
    bos, limit = config.bos_token_id, config.max_position_embeddings
    tokens = tokenizer().encode(text) if isinstance(text, str) else read_row("text", text)
    tokens = tokens[1:] if tokens[:1] == [bos] else tokens
    if not tokens:
        raise ArcmergeError("'text' must have one token or more besides BOS, got none")
    size = limit if window is None else read_whole("window", window)
    if not 2 <= size <= limit:
        raise ArcmergeError(
            f"'window' must be from 2 to {limit}, the model's max_position_embeddings, got {size}; leave it out "
            "for the maximum"
        )
    return [tokens[start : start + size - 1] for start in range(0, len(tokens), size - 1)]


def _kind(found: Any) -> str:
    """The kind of a prompt: "text", "messages", "tokens", or "several" prompts."""
    if isinstance(found, str):
        return "text"
    if not isinstance(found, Sequence) or isinstance(found, _TEXT):
        raise _wrong_form(found)
    first = plain(found[0]) if len(found) else 0
    if isinstance(first, Mapping):
        return "messages"
    return "several" if isinstance(first, str | Sequence) else "tokens"


def _wrong_form(given: Any) -> ArcmergeError:
    return ArcmergeError(
        f"'input_ids' must be text, messages, token ids, or a list of prompts of one of these kinds, got {given!r:.80}"
    )


def _columns(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(range(len(row))) for row in rows]


def _unmasked(mask: Any, padded: Sequence[Sequence[int]], is_single: bool) -> list[list[int]]:
    """The columns of each row whose mask is 1, which are no padding."""
    found = plain(mask)
    rows = [found] if is_single else [plain(row) for row in found] if isinstance(found, Sequence) else []
    lengths = [len(row) if isinstance(row, Sequence) else None for row in rows]
    if lengths != [len(row) for row in padded]:
        shape = list(map(len, padded))
        raise ArcmergeError(
            f"'attention_mask' must have the shape of 'input_ids', rows of {shape} tokens, got rows of {lengths}"
        )
    return [[column for column, kept in enumerate(row) if plain(kept)] for row in rows]
