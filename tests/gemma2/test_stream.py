"""The pieces of TextStreamer join to the text that the tokenizer decodes, up to the first stop string."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from arcmerge.gemma2.text.streamer import TextStreamer
from arcmerge.gemma2.text.tokenizer import Gemma2Tokenizer
from gemma2_models import SPECIAL, TOKENS, save_byte_tokenizer, save_fallback_tokenizer

BOS = 2
LLAMA = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def save_with(decoder: decoders.Decoder, names: list[str], folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate([*SPECIAL, *names])}, []))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))


WORDS = ["\u2581", "\u2581\u2581", "\u2581a", "b", "<0xC3>", "<0xA9>", "<0xFF>", "<0x20>", "\N{REPLACEMENT CHARACTER}"]
KINDS = {
    "gemma": lambda folder: save_fallback_tokenizer(folder),
    "bytes": lambda folder: save_byte_tokenizer(folder),
    "llama": lambda folder: save_with(LLAMA, WORDS, folder),
    "metaspace": lambda folder: save_with(decoders.Metaspace(), WORDS, folder),
    "word pieces": lambda folder: save_with(decoders.WordPiece(), ["a", "##b", ".", "##.", "n't", "\u2603"], folder),
    "suffix": lambda folder: save_with(decoders.BPEDecoder("</w>"), ["a", "b</w>", "\u2603", "</w>"], folder),
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Gemma2Tokenizer:
    KINDS[request.param](tmp_path)
    return Gemma2Tokenizer(tmp_path, BOS)


def answers(tokenizer: Gemma2Tokenizer, count: int) -> list[list[int]]:
    """Random tokens; half of the answers are mostly bytes and special tokens."""
    random.seed(5)
    size = tokenizer.backend.get_vocab_size()
    some = [
        token for name, token in tokenizer.backend.get_vocab().items() if len(name) == 6 or name[0] in "<\u2581\u0120"
    ]
    choices = [range(size), some]
    return [random.choices(choices[number % 2], k=random.randint(0, 24)) for number in range(count)]


def test_the_pieces_join_to_the_decoded_text(tokenizer: Gemma2Tokenizer) -> None:
    for tokens in answers(tokenizer, 400):
        stream = TextStreamer(tokenizer, [])
        pieces = [stream.push(token) for token in tokens]
        assert "".join(pieces) + stream.finish() == stream.text == tokenizer.decode(tokens), tokens


def test_the_first_stop_string_ends_the_text(tokenizer: Gemma2Tokenizer) -> None:
    random.seed(6)
    for tokens in answers(tokenizer, 400):
        spelt = tokenizer.decode(tokens, skip_special_tokens=False)
        starts = [random.randrange(len(spelt) + 1) for _ in range(3)]
        stops = [stop for start in starts if (stop := spelt[start : start + random.randint(1, 5)])]
        stops = [stop for stop in stops if "\N{REPLACEMENT CHARACTER}" not in stop]
        stream = TextStreamer(tokenizer, stops)
        pieces, used = [], 0
        while used < len(tokens) and not stream.stopped:
            pieces.append(stream.push(tokens[used]))
            used += 1
        shown = "".join(pieces) + stream.finish()
        assert shown == stream.text
        # The expected text, computed differently: up to the first stop string.
        needed = tokenizer.decode(tokens[:used], skip_special_tokens=False)
        assert stream.stopped == any(stop in needed for stop in stops)
        assert not any(
            stop in tokenizer.decode(tokens[: used - 1], skip_special_tokens=False) for stop in stops if used
        )
        assert tokenizer.decode(tokens[:used]).startswith(shown)
        if stream.stopped and not tokenizer.special_token_ids & {*tokens}:
            assert shown == needed[: min(needed.find(stop) for stop in stops if stop in needed)]


def fallback(folder: Path) -> Gemma2Tokenizer:
    save_fallback_tokenizer(folder)
    return Gemma2Tokenizer(folder, BOS)


def heard(stream: TextStreamer, tokens: list[int]) -> tuple[list[str], str, bool]:
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return pieces, "".join(pieces) + stream.finish(), stream.stopped


def tokens_of(*names: str) -> list[int]:
    return [TOKENS[name] for name in names]


def test_invalid_bytes_become_replacement_characters(tmp_path: Path) -> None:
    tokenizer = fallback(tmp_path)
    tokens = tokens_of("H", "<0xC3>", "<0xA9>", "<0xFF>", "w")
    pieces, whole, _ = heard(TextStreamer(tokenizer, []), tokens)
    assert pieces == ["H", "", "", "", "\N{REPLACEMENT CHARACTER}" * 3 + "w"]
    assert whole == tokenizer.decode(tokens)
    assert heard(TextStreamer(tokenizer, []), tokens[:3])[1] == "H\N{LATIN SMALL LETTER E WITH ACUTE}"


@pytest.mark.parametrize(
    ("names", "stops", "whole", "used"),
    [
        (["a", "<end_of_turn>", "b"], ["<end_of_turn>"], "a", 2),
        (["a", "b", "<end_of_turn>", "\n", "c"], ["b<end_of_turn>\n"], "a", 4),
        (["<start_of_turn>", "a", "<end_of_turn>", "b", "c"], ["bc"], "a", 5),
        (["a", "<end_of_turn>", "b", "c"], ["turn>b"], "a", 3),  # completes in a token, begins within one
        (["a", "\u2581the", "b"], ["th"], "a ", 2),  # completes within a token
        (["a", "b", "c", "d"], ["cd", "bcd", "d"], "a", 4),  # the earliest, of those that one token completes
        (["a", "b", "c", "d"], ["d", "bc"], "a", 3),
        (["a", "<0xC3>", "<0xA9>", "b"], ["\N{LATIN SMALL LETTER E WITH ACUTE}"], "a", 3),
        (
            ["a", "<0xC3>", "<0xA9>", "<0xFF>"],
            ["b"],
            "a\N{REPLACEMENT CHARACTER}" * 1 + "\N{REPLACEMENT CHARACTER}" * 2,
            4,
        ),
        (["a", "<eos>", "b"], ["ab"], "ab", 3),  # they do not stand together
    ],
)
def test_stop_strings_and_special_tokens(
    tmp_path: Path, names: list[str], stops: list[str], whole: str, used: int
) -> None:
    pieces, shown, stopped = heard(TextStreamer(fallback(tmp_path), stops), tokens_of(*names))
    assert (shown, len(pieces)) == (whole, used)
    assert stopped == (stops not in (["b"], ["ab"]))


def test_a_long_answer_is_decoded_in_short_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = fallback(tmp_path)
    lengths = []

    class Counting:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            lengths.append(len(tokens))
            return str(tokenizer.backend.decode(tokens, skip_special_tokens=skip_special_tokens))

        def id_to_token(self, token: int) -> str | None:
            return tokenizer.backend.id_to_token(token)

    stream = TextStreamer(tokenizer, [])
    monkeypatch.setattr(stream._clean, "_tokenizer", Counting())
    for token in tokens_of("a", "\u2581", "b") * 400:
        stream.push(token)
    assert max(lengths) <= 4
    assert stream.text == "a b" * 400
