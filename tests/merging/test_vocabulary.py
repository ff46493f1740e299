"""Common vocabularies of two and three models, row by row, against the rules."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcmerge.dtypes import BF16, F16, F32, DType
from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.tokenizer_block import ModelToken, TokenizerRecipe, TokenRule
from arcmerge.merging.vocabulary.embedding_rows import Table, align, decode, encode
from arcmerge.merging.vocabulary.vocabulary import Vocabulary
from vocabularies import COLUMNS, LETTERS, SPECIAL, Model, ThreeModels, aligned, build, gather


class TestRows(ThreeModels):
    def test_own_row_then_only_owner(self, base: Model, chat: Model) -> None:
        vocabulary, (ours, theirs) = aligned(TokenizerRecipe("union"), base, chat)
        for token, number in vocabulary.ids.items():
            expected = [model.row(token) for model in (base, chat) if token in model.tokens]
            np.testing.assert_array_equal(ours[number], expected[0])
            np.testing.assert_array_equal(theirs[number], expected[-1])

    def test_mean_of_owners_if_the_base_has_no_row(self, base: Model, chat: Model, code: Model) -> None:
        vocabulary, (ours, theirs, _) = aligned(TokenizerRecipe("union"), base, chat, code)
        number = vocabulary.ids["cd"]
        mean = (chat.row("cd") + code.row("cd")) / 2
        np.testing.assert_array_equal(ours[number], decode(encode(mean, BF16), BF16))
        np.testing.assert_array_equal(theirs[number], chat.row("cd"))

    def test_rows_of_the_base_take_precedence_over_means(self, base: Model, chat: Model, tmp_path: Path) -> None:
        bare = Model(tmp_path / "bare")
        vocabulary, (_, _, theirs) = aligned(TokenizerRecipe("union"), base, chat, bare)
        np.testing.assert_array_equal(theirs[vocabulary.ids["abc"]], base.row("abc"))

    def test_without_a_base_all_owners_count(self, base: Model, chat: Model, tmp_path: Path) -> None:
        models = [base, chat, Model(tmp_path / "bare")]
        vocabulary = build(TokenizerRecipe("union"), *models)
        rows = align(vocabulary, "embed", {model.reference: model.table for model in models})
        mean = (base.row("abc") + chat.row("abc")) / 2
        found = gather(rows[models[-1].reference])[vocabulary.ids["abc"]]
        np.testing.assert_array_equal(found, decode(encode(mean, BF16), BF16))

    def test_rules(self, base: Model, chat: Model) -> None:
        rules = {
            "a": TokenRule(chat.reference, force=True),
            "b": TokenRule(chat.reference, force=False),
            "<new>": TokenRule(ModelToken(chat.reference, token="<end>")),
            "<newer>": TokenRule(ModelToken(chat.reference, token_id=1)),
            "<none>": TokenRule("zero"),
            "<chat>": TokenRule("zero"),
        }
        vocabulary, (ours, theirs) = aligned(TokenizerRecipe("base", rules), base, chat)
        ids = vocabulary.ids
        assert list(ids)[-5:] == ["<base>", "<new>", "<newer>", "<none>", "<chat>"]
        for rows in (ours, theirs):
            np.testing.assert_array_equal(rows[ids["a"]], chat.row("a"))
            np.testing.assert_array_equal(rows[ids["<new>"]], chat.row("<end>"))
            np.testing.assert_array_equal(rows[ids["<newer>"]], chat.row("<eos>"))
            assert not rows[ids["<none>"]].any()
        np.testing.assert_array_equal(ours[ids["b"]], base.row("b"))
        assert not ours[ids["<chat>"]].any()
        np.testing.assert_array_equal(theirs[ids["<chat>"]], chat.row("<chat>"))

    @pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=lambda dtype: dtype.name)
    def test_padding_is_the_mean_of_each_models_rows(self, tmp_path: Path, dtype: DType) -> None:
        models = [Model(tmp_path / "one", ["ab"], dtype=dtype), Model(tmp_path / "two", dtype=dtype)]
        vocabulary, all_rows = aligned(TokenizerRecipe("union", pad_to_multiple_of=8), *models)
        named = len(vocabulary.ids)
        assert (named, vocabulary.size) == (13, 16)
        for rows in all_rows:
            mean = decode(encode(rows[:named].mean(axis=0), dtype), dtype)
            np.testing.assert_array_equal(rows[named:], np.tile(mean, (3, 1)))

    def test_the_source_model_decides_the_token_ids(self, base: Model, chat: Model) -> None:
        vocabulary, (ours, theirs) = aligned(TokenizerRecipe(chat.reference), base, chat)
        assert list(vocabulary.ids) == chat.tokens
        np.testing.assert_array_equal(theirs, chat.values)
        np.testing.assert_array_equal(ours[vocabulary.ids["abc"]], base.row("abc"))
        assert vocabulary.renumbered({"eos_token_id": [1, base.tokens.index("abc")], "vocab_size": 1}) == {
            "eos_token_id": [1, chat.tokens.index("abc")],
            "vocab_size": 1,
        }

    def test_the_same_vocabulary_is_read_in_place(self, base: Model, tmp_path: Path) -> None:
        other = Model(tmp_path / "other", ["ab", "abc"], ["<base>"])
        vocabulary = build(TokenizerRecipe("union"), base, other)
        rows = align(vocabulary, "embed", {model.reference: model.table for model in (base, other)})
        for model in (base, other):
            first, step = model.stored.ctypes.data, COLUMNS * 2
            expected = np.arange(first, first + len(base.tokens) * step, step, np.uint64)
            np.testing.assert_array_equal(rows[model.reference].addresses, expected)


class TestTypes(ThreeModels):
    def test_rows_are_converted_to_a_common_dtype(self, tmp_path: Path) -> None:
        models = [Model(tmp_path / "one", ["ab"], dtype=F32), Model(tmp_path / "two", ["cd"], dtype=BF16)]
        vocabulary, (ours, theirs) = aligned(TokenizerRecipe("union"), *models, cast=BF16)
        np.testing.assert_array_equal(ours[vocabulary.ids["cd"]], models[1].row("cd"))
        expected = decode(encode(models[0].row("ab"), BF16), BF16)
        np.testing.assert_array_equal(theirs[vocabulary.ids["ab"]], expected)

    @pytest.mark.parametrize("narrow", [BF16, F16], ids=lambda dtype: dtype.name)
    def test_rows_of_wider_types_lose_no_bits(self, tmp_path: Path, narrow: DType) -> None:
        """The mean of bfloat16 and float32 rows is float32, and so is the padding of a table with such rows."""
        one = Model(tmp_path / "one", ["ab"], dtype=F32)
        two, three = (Model(tmp_path / name, ["cd"], dtype=narrow) for name in ("two", "three"))
        vocabulary, all_rows = aligned(TokenizerRecipe("union", pad_to_multiple_of=8), one, two, three)
        ids = vocabulary.ids
        for rows in all_rows[1:]:
            np.testing.assert_array_equal(rows[ids["ab"]], one.row("ab"))
            padding = rows[: len(ids)].mean(axis=0)
            np.testing.assert_array_equal(rows[len(ids) :], np.tile(decode(encode(padding, F32), F32), (2, 1)))
        mean = (two.row("cd") + three.row("cd")) / 2
        np.testing.assert_array_equal(all_rows[0][ids["cd"]], decode(encode(mean, F32), F32))
        np.testing.assert_array_equal(all_rows[1][ids["cd"]], two.row("cd"))

    def test_rounding_to_bfloat16_is_to_nearest_even_once(self) -> None:
        # Just above a tie: rounded to float32 first it would be the tie, which rounds down to even.
        values = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 3 * 2**-8, -(2**-133) * 1.5, 2**-134, 3.4e38, np.nan])
        expected = [1 + 2**-7, 1.0, 1 + 2**-6, -(2**-132), 0.0, np.inf, np.nan]
        np.testing.assert_array_equal(decode(encode(values, BF16), BF16), expected)


class TestTokenizers(ThreeModels):
    def test_tokens_without_rows_are_left_out(self, tmp_path: Path, base: Model) -> None:
        """Both added tokens and tokens of the model are removed, with the merges that make them."""
        short = Model(tmp_path / "short", ["ab", "abc", "abcd"], ["<over>"], rows=len(SPECIAL + LETTERS) + 2)
        vocabulary = build(TokenizerRecipe("base"), short, base)
        assert list(vocabulary.ids) == [*SPECIAL, *LETTERS, "ab", "abc"]
        assert len(vocabulary.warnings) == 1
        assert "2 tokens ('abcd', '<over>')" in vocabulary.warnings[0]
        assert load(vocabulary, tmp_path).encode("abcd") == [vocabulary.ids["abc"], vocabulary.ids["d"]]

    def test_special_tokens_without_rows_get_rows(self, tmp_path: Path) -> None:
        """A padding token that was added without resizing the model would get an id without a row on loading."""
        model = Model(tmp_path / "padded", ["ab"], config={"pad_token": "[PAD]"})
        vocabulary, (rows,) = aligned(TokenizerRecipe("base"), model)
        assert vocabulary.ids["[PAD]"] == len(model.tokens)
        assert not rows[-1].any()
        assert "'[PAD]'" in vocabulary.warnings[-1]
        assert load(vocabulary, tmp_path).pad_token_id == len(model.tokens)

    def test_a_model_without_a_tokenizer_has_the_ids_of_the_base(self, base: Model, tmp_path: Path) -> None:
        other = Model(tmp_path / "other", ["ab", "abc"], ["<base>"])
        (other.folder / "tokenizer.json").unlink()
        vocabulary, (_, rows) = aligned(TokenizerRecipe("union"), base, other)
        np.testing.assert_array_equal(rows, other.values)
        assert "other: has no tokenizer" in vocabulary.warnings[0]

    @pytest.mark.parametrize("source", ["base", "union"])
    def test_unchanged_files_are_those_of_the_base(self, base: Model, tmp_path: Path, source: Any) -> None:
        (base.folder / "tokenizer.model").write_bytes(b"sentencepiece")
        (base.folder / "chat_template.jinja").write_text("{{ messages }}")
        twin = Model(tmp_path / "twin", ["ab", "abc"], ["<base>"])
        files = build(TokenizerRecipe(source), base, twin).files
        stored = {file.name: file.read_bytes() for file in base.folder.iterdir() if file.name != "config.json"}
        assert files == stored

    @pytest.mark.parametrize("source", ["base", "union", "chat"])
    @pytest.mark.parametrize("repeated", [False, True], ids=["v5-files", "v4-files"])
    def test_transformers_has_the_same_token_ids(
        self, base: Model, chat: Model, tmp_path: Path, source: Any, repeated: bool
    ) -> None:
        if repeated:
            for model in (base, chat):
                entries = json.loads((model.folder / "tokenizer.json").read_text())["added_tokens"]
                settings = json.loads((model.folder / "tokenizer_config.json").read_text())
                settings["added_tokens_decoder"] = {str(entry.pop("id")): entry for entry in entries}
                (model.folder / "tokenizer_config.json").write_text(json.dumps(settings))
        recipe = TokenizerRecipe(chat.reference if source == "chat" else source, {"<new>": TokenRule("zero")})
        vocabulary = build(recipe, base, chat)
        tokenizer = load(vocabulary, tmp_path)
        assert tokenizer.get_vocab() == vocabulary.ids
        assert tokenizer.encode("ab<new>a") == [vocabulary.ids[token] for token in ("ab", "<new>", "a")]


def load(vocabulary: Vocabulary, folder: Path) -> Any:
    """The result's tokenizer as transformers loads it."""
    transformers = pytest.importorskip("transformers")
    out = folder / "out"
    out.mkdir()
    for name, content in vocabulary.files.items():
        (out / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(out)


class TestErrors(ThreeModels):
    def test_base_without_a_tokenizer(self, base: Model) -> None:
        (base.folder / "tokenizer.json").unlink()
        with pytest.raises(ArcmergeError, match=r"base: 'tokenizer\.json' must exist to align rows by token, got none"):
            build(TokenizerRecipe(), base)

    def test_sentencepiece_only(self, base: Model, chat: Model) -> None:
        (chat.folder / "tokenizer.json").rename(chat.folder / "tokenizer.model")
        with pytest.raises(
            ArcmergeError, match=r"chat: 'tokenizer\.json' must exist, got only tokenizer\.model; convert it"
        ):
            build(TokenizerRecipe(), base, chat)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("{", r"tokenizer\.json must be valid JSON"),
            ("[]", r"tokenizer\.json must hold a JSON object"),
            ('{"model": {}}', "must be a tokenizer of the `tokenizers` library"),
            ('{"model": {"vocab": 1}}', "must be a tokenizer of the `tokenizers` library"),
            ('{"model": {"vocab": {}}}', "'vocab' must have tokens, got none"),
            *(
                (f'{{"model": {{"vocab": {{"a": {number}}}}}}}', "'vocab' must give each token a whole number from 0")
                for number in ("1.5", "-1", "true", '"0"', "null", "[1]", "16777216", "1" + 400 * "0")
            ),
            ('{"model": {"vocab": {"a\\ud800": 0}}}', "unpaired surrogate"),
        ],
    )
    def test_broken_file(self, base: Model, content: str, words: str) -> None:
        (base.folder / "tokenizer.json").write_text(content)
        with pytest.raises(ArcmergeError, match=words):
            build(TokenizerRecipe(), base)

    def test_an_unpaired_surrogate_in_the_settings(self, base: Model) -> None:
        (base.folder / "tokenizer_config.json").write_text('{"extra_special_tokens": ["a\\ud800"]}')
        with pytest.raises(ArcmergeError, match=r"tokenizer_config\.json must hold valid Unicode"):
            build(TokenizerRecipe(), base)

    def test_only_bpe_tokenizers_can_lose_tokens(self, tmp_path: Path) -> None:
        model = Model(tmp_path / "words", ["ab"], rows=len(SPECIAL))
        document = json.loads((model.folder / "tokenizer.json").read_text())
        del document["model"]["merges"]
        document["model"]["type"] = "WordLevel"
        (model.folder / "tokenizer.json").write_text(json.dumps(document))
        with pytest.raises(ArcmergeError, match=r"must be a BPE .* 9 tokens with ids of 4 or more, got WordLevel"):
            build(TokenizerRecipe(), model)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            pytest.param(
                ModelReference("elsewhere"),
                "must be a model whose embed is merged, got elsewhere",
                id="model not merged",
            ),
            pytest.param("chat", r"must be one of the 18 rows of .*chat, got token '<new>'", id="token not there"),
            pytest.param(18, r"must be one of the 18 rows of .*chat, got token id 18", id="id not there"),
        ],
    )
    def test_a_rule_for_a_row_that_does_not_exist(self, base: Model, chat: Model, source: Any, message: str) -> None:
        if source == "chat":
            source = chat.reference
        elif isinstance(source, int):
            source = ModelToken(chat.reference, token_id=source)
        with pytest.raises(ArcmergeError, match=message):
            aligned(TokenizerRecipe("union", {"<new>": TokenRule(source)}), base, chat)

    def test_fewer_rows_than_the_config_says(self, base: Model, chat: Model) -> None:
        vocabulary = build(TokenizerRecipe(), base, chat)
        short = Table(base.table.address, BF16, 5, COLUMNS)
        with pytest.raises(ArcmergeError, match=r"base: 'embed' must have more than 14 rows, .*, got 5"):
            align(vocabulary, "embed", {base.reference: short, chat.reference: chat.table})

    def test_rows_of_different_lengths(self, base: Model, chat: Model) -> None:
        vocabulary = build(TokenizerRecipe(), base, chat)
        wide = Table(chat.table.address, BF16, chat.rows, 7)
        with pytest.raises(ArcmergeError, match=r"rows of the same length .*, got 24 in .*base and 7 in .*chat"):
            align(vocabulary, "embed", {base.reference: base.table, chat.reference: wide})


@pytest.mark.alone
def test_256000_rows_take_less_than_a_second(tmp_path: Path) -> None:
    """Two vocabularies of Gemma's size that differ in part; mergekit takes about 3 s for the rows alone."""
    shared = [f"{number:x}" for number in range(250_000)]
    models = [
        Model(tmp_path / name, [*shared, *(f"{name}{number:x}" for number in range(6_000))]) for name in ("one", "two")
    ]
    vocabulary = build(TokenizerRecipe("union", pad_to_multiple_of=64), *models)
    assert vocabulary.size == 262_016
    tables = {model.reference: model.table for model in models}
    started = time.perf_counter()
    align(vocabulary, "embed", tables)
    assert time.perf_counter() - started < 1.0
