"""Prompts in the forms that people pass: text, conversations, and tokens as lists, arrays and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.arguments import plain
from arcmerge.gemma2.text.tokenizer import Gemma2Tokenizer

_TEXT = (str, bytes, bytearray)  # sequences, but of no token ids


@dataclass(frozen=True)
class Prompts:
    """One prompt or several.

    rows: the tokens of each, without padding. places: the columns in which they stood. whole: as given, padding
    included. given: what they came in; an answer goes back in the same. alone: one prompt, not a list of one. is_text:
    text or conversations, whose answers are text. is_chat: conversations.
    """

    rows: list[list[int]]
    places: list[list[int]]
    whole: list[list[int]]
    given: Any
    alone: bool
    is_text: bool
    is_chat: bool = False

    @classmethod
    def read(cls, given: Any, attention_mask: Any, text: Callable[[], Gemma2Tokenizer]) -> Prompts:
        """given: what Gemma2.generate takes. text: opens the tokenizer, where there is text.

        Raises ArcmergeError for any other form.
        """
        if isinstance(given, Mapping) and "input_ids" in given:  # what a tokenizer of transformers returns
            attention_mask = given.get("attention_mask") if attention_mask is None else attention_mask
            given = given["input_ids"]
        found = plain(given)
        kind = _kind(found)
        if kind in ("text", "messages"):
            found, alone = [found], True
        elif kind == "tokens":
            found, alone = [read_row("input_ids", given)], True
        else:
            found, alone = [plain(one) for one in found], False
            kinds = {_kind(one) for one in found}
            if len(kinds) > 1 or not kinds <= {"text", "messages", "tokens"}:
                raise ArcmergeError(_wrong(given))
            kind = kinds.pop()
        if kind != "tokens":
            if attention_mask is not None:
                raise ArcmergeError("'attention_mask' must be left out where prompts are text: they have no padding.")
            encode = text().encode if kind == "text" else text().chat
            rows = [encode(one) for one in found]
            return cls(rows, _columns(rows), rows, given, alone, True, kind == "messages")
        whole = [read_row("input_ids", one) for one in found]
        places = _columns(whole) if attention_mask is None else _unmasked(attention_mask, whole, alone)
        rows = [[row[place] for place in kept] for row, kept in zip(whole, places, strict=True)]
        return cls(rows, places, whole, given, alone, False)

    @property
    def width(self) -> int:
        return max(map(len, self.whole), default=0)

    def with_answers(self, tokens: Sequence[Sequence[int]], texts: Sequence[str], pad: int) -> Any:
        """The texts of answers to text; else prompts and answers in the form of the prompts, the answers padded."""
        if self.is_text:
            return texts[0] if self.alone else list(texts)
        longest = max(map(len, tokens)) if isinstance(self.given, Tensor | np.ndarray) else 0
        found: Any = [
            [*row, *answer, *[pad] * (longest - len(answer))] for row, answer in zip(self.whole, tokens, strict=True)
        ]
        found = found[0] if self.alone else found
        if isinstance(self.given, Tensor):
            return torch.tensor(found, dtype=self.given.dtype, device=self.given.device)
        return np.array(found, self.given.dtype) if isinstance(self.given, np.ndarray) else found


def read_row(name: str, value: Any) -> list[int]:
    """Token ids of one sequence, as a list, an array or a tensor of one dimension.

    Raises ArcmergeError, with `name` in its sentence, for anything else.
    """
    found = plain(value)
    found = [plain(token) for token in found] if isinstance(found, Sequence) and not isinstance(found, _TEXT) else None
    if found is None or not all(type(token) is int for token in found):
        raise ArcmergeError(f"'{name}' must be token ids, which are integers, got {value!r:.80}.")
    return found


def _kind(found: Any) -> str:
    """text, messages, tokens, or several of these."""
    if isinstance(found, str):
        return "text"
    if not isinstance(found, Sequence) or isinstance(found, _TEXT):
        raise ArcmergeError(_wrong(found))
    first = plain(found[0]) if len(found) else 0
    if isinstance(first, Mapping):
        return "messages"
    return "several" if isinstance(first, str | Sequence) else "tokens"


def _wrong(given: Any) -> str:
    kinds = "text, messages, token ids, or a list of prompts of one of these kinds"
    return f"'input_ids' must be {kinds}, got {given!r:.80}."


def _columns(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(range(len(row))) for row in rows]


def _unmasked(mask: Any, whole: Sequence[Sequence[int]], alone: bool) -> list[list[int]]:
    """The columns that a mask of 1 for tokens and 0 for padding keeps of every row."""
    found = plain(mask)
    rows = [found] if alone else [plain(row) for row in found] if isinstance(found, Sequence) else []
    lengths = [len(row) if isinstance(row, Sequence) else None for row in rows]
    if lengths != [len(row) for row in whole]:
        shape = list(map(len, whole))
        raise ArcmergeError(
            f"'attention_mask' must have the shape of 'input_ids', rows of {shape} tokens, has {lengths}."
        )
    return [[place for place, kept in enumerate(row) if plain(kept)] for row in rows]
