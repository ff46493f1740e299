"""The text of an answer, token by token: only whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

from arcmerge.gemma2.text.tokenizer import Gemma2Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class IncrementalDecoder:
    """Decodes tokens one by one to `stable` text, which no later token changes, and `pending` text after it.

    stable + pending always equals tokenizer.decode of all tokens so far. Pending are the bytes of an incomplete
    character and every run of byte tokens (`<0xE2>`): ByteFallback replaces each token of a run that is not UTF-8 as a
    whole, so that the last token of a run decides about the first.

    tokenizer: decodes the tokens. skipped: token ids that are not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        # The tokens that are decoded again with each new one: a context, whose text is known, and those after it.
        # Decoders treat the first token of a text specially, so that no token is decoded without a context.
        self._window: list[int] = []
        self._context = 0
        self._shown = ""
        self.stable = ""
        self.pending = ""

    def push(self, token: int) -> None:
        if token in self._skipped:
            return
        self._window.append(token)
        text = self._decode(self._window)
        self.pending = text[len(self._shown) :]
        if text.endswith(_INCOMPLETE) or self._is_byte(token):
            return
        self.stable += self.pending
        self.pending = ""
        self._shown = text
        # A context without text may consist of blanks, which the decoder strips.
        if context := self._decode(self._window[self._context :]):
            self._window = self._window[self._context :]
            self._shown = context
        self._context = len(self._window)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def _is_byte(self, token: int) -> bool:
        name = self._tokenizer.id_to_token(token) or ""
        return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


class TextStreamer:
    """Decodes the tokens of an answer, without special tokens, up to the first stop string.

    Args:
        tokenizer: decodes the tokens.
        stop_strings: searched in the text with its special tokens, so that `<end_of_turn>` can be one.

    Attributes:
        text: of the answer so far; of the whole answer once `stopped` is true or `finish` was called.
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Gemma2Tokenizer, stop_strings: Sequence[str]) -> None:
        self._stop_strings = list(stop_strings)
        self._special = tokenizer.special_token_ids
        self._clean = IncrementalDecoder(tokenizer.backend, self._special)
        self._raw = IncrementalDecoder(tokenizer.backend, ())
        # The (start, end) of special tokens in the raw text.
        self._spans: list[tuple[int, int]] = []
        self._shown = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is final since then."""
        self._clean.push(token)
        self.text = self._clean.stable + self._clean.pending
        if not self._stop_strings:
            return self._show(len(self._clean.stable))
        # The text before it was searched already, and no later token changes it.
        stable = len(self._raw.stable)
        before = stable + len(self._raw.pending)
        self._raw.push(token)
        raw = self._raw.stable + self._raw.pending
        if token in self._special:
            self._spans.append((before, len(raw)))
        longest = max(map(len, self._stop_strings))
        since = max(0, stable - longest + 1)
        ends = [end for end in (raw.find(stop, since) for stop in self._stop_strings) if end >= 0]
        if ends:
            self.stopped = True
            # Bytes on both sides of a special token may be fewer characters without it; text that was shown stays.
            self.text = self.text[: max(self._shown, self._without_special(raw, min(ends)))]
            return self._show(len(self.text))
        settled = self._raw.stable
        withheld = next(
            (
                length
                for length in range(min(longest - 1, len(settled)), 0, -1)
                if any(stop.startswith(settled[-length:]) for stop in self._stop_strings)
            ),
            0,
        )
        return self._show(min(len(self._clean.stable), self._without_special(raw, len(settled) - withheld)))

    def finish(self) -> str:
        """End the answer; returns text that was withheld as it could have become a stop string or a character."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        shown, self._shown = self._shown, max(self._shown, end)
        return self.text[shown : self._shown]

    def _without_special(self, raw: str, end: int) -> int:
        """The offset in `text` of the offset `end` in the raw text: as many characters before the end."""
        special = sum(stop - max(start, end) for start, stop in self._spans if stop > end)
        return max(0, len(self.text) - (len(raw) - end - special))
