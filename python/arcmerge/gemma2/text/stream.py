"""Text of an answer while its tokens come: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

from arcmerge.gemma2.text.tokenizer import Gemma2Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder:
    """Text of tokens that come one by one: `stable`, which no later token changes, and `pending` after it.

    stable + pending is always what tokenizer.decode gives for all tokens so far. Pending are the bytes of a character
    that is not complete, and every run of byte tokens (`<0xE2>`): ByteFallback makes a replacement character of each
    token of a run that is not UTF-8 as a whole, so that its last token decides about its first.
    skipped: tokens that are not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        # What is decoded anew with each token: a context, of which some text came already, and what follows it.
        # Decoders treat the first token of a text in ways of their own, so that no token is decoded without a context.
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
        # A context without text may be one whose blanks the decoder takes away.
        if context := self._decode(self._window[self._context :]):
            self._window = self._window[self._context :]
            self._shown = context
        self._context = len(self._window)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def _is_byte(self, token: int) -> bool:
        name = self._tokenizer.id_to_token(token) or ""
        return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


class Stream:
    """Text of an answer, without special tokens, up to the first stop string.

    stops: looked for in the text with its special tokens, so that `<end_of_turn>` is one. whole: the text so far; after
    `stopped` or `finish` that of the whole answer.
    """

    def __init__(self, text: Gemma2Tokenizer, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._special = text.special
        self._clean = Decoder(text.tokenizer, text.special)
        self._spelt = Decoder(text.tokenizer, ())
        # Where special tokens stand in the spelt text, as (start, end).
        self._spans: list[tuple[int, int]] = []
        self._shown = 0
        self.whole = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What may be shown now that `token` has come."""
        self._clean.push(token)
        self.whole = self._clean.stable + self._clean.pending
        if not self._stops:
            return self._show(len(self._clean.stable))
        # What stands before it was searched already, and no later token changes it.
        stable = len(self._spelt.stable)
        before = stable + len(self._spelt.pending)
        self._spelt.push(token)
        spelt = self._spelt.stable + self._spelt.pending
        if token in self._special:
            self._spans.append((before, len(spelt)))
        longest = max(map(len, self._stops))
        since = max(0, stable - longest + 1)
        ends = [end for end in (spelt.find(stop, since) for stop in self._stops) if end >= 0]
        if ends:
            self.stopped = True
            # Bytes on both sides of a special token may be fewer characters without it: what was shown stays.
            self.whole = self.whole[: max(self._shown, self._without_special(spelt, min(ends)))]
            return self._show(len(self.whole))
        settled = self._spelt.stable
        withheld = next(
            (
                length
                for length in range(min(longest - 1, len(settled)), 0, -1)
                if any(stop.startswith(settled[-length:]) for stop in self._stops)
            ),
            0,
        )
        return self._show(min(len(self._clean.stable), self._without_special(spelt, len(settled) - withheld)))

    def finish(self) -> str:
        """What was held back: it might have become a stop string or a character."""
        return self._show(len(self.whole))

    def _show(self, end: int) -> str:
        shown, self._shown = self._shown, max(self._shown, end)
        return self.whole[shown : self._shown]

    def _without_special(self, spelt: str, end: int) -> int:
        """Where in `whole` the place `end` of the spelt text is: as many characters before its end."""
        special = sum(stop - max(start, end) for start, stop in self._spans if stop > end)
        return max(0, len(self.whole) - (len(spelt) - end - special))
