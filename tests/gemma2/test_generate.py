"""The commands `generate` and `chat`."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch

import tiny
from arcmerge.cli import main
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.model import Gemma2
from gemma2_models import TOKENS, TURNS, build, build_chain, save_byte_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are <pad>, <eos>, <bos> and the 256 bytes."""
    folder = tmp_path_factory.mktemp("model")
    build(folder, "2.6B", vocab_size=259)
    save_byte_tokenizer(folder)
    return folder


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Standard input: these lines, then Ctrl-D."""
    typed = iter(lines)

    def answer(prompt: str) -> str:
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", answer)


@pytest.mark.parametrize("large", [False, True], ids=["a small model", "one that caches cannot hold"])
def test_a_prompt_is_continued_and_timed(
    large: bool, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr("arcmerge.gemma2.generation.generate.BEYOND_CACHES", 0)
    assert main(["generate", str(folder), "abc", "--max-new-tokens", "9", "--dtype", "float32"]) == 0
    said = capsys.readouterr()
    model = Gemma2.from_pretrained(folder, dtype=torch.float32)
    assert said.out == model.generate("abc", max_new_tokens=9) + "\n"
    assert "4 prompt tokens at" in said.err
    assert "9 new at" in said.err
    assert ("GB/s" in said.err) == large


def test_a_warning_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "query_pre_attn_scalar": 224}))
    assert main(["generate", str(tmp_path), "abc", "--max-new-tokens", "2", "-q"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"arcmerge: warning: {tmp_path}/config.json: 'query_pre_attn_scalar' is 224")
    assert said.count("\n") == 1


def test_a_prompt_may_come_from_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = [
        "generate",
        str(folder),
        "--max-new-tokens",
        "5",
        "--temperature",
        "0.7",
        "--top-k",
        "20",
        "--seed",
        "3",
        "-q",
    ]
    assert main([*call, "abc"]) == 0
    given = capsys.readouterr()
    assert given.err == ""
    for written in (b"abc", b"abc\n", b"abc\r\n"):  # one line end at the end is no part of the prompt
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(written), encoding="ascii"))
        assert main([*call, "-"]) == 0
        assert capsys.readouterr() == given
    assert main([*call, "abc\n"]) == 0
    given = capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc\n\n"), encoding="ascii"))
    assert main([*call, "-"]) == 0
    assert capsys.readouterr() == given


def test_bytes_that_are_not_utf_8_are_accepted(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["generate", str(folder), "--max-new-tokens", "3", "-q"]
    assert main([*call, "a\N{REPLACEMENT CHARACTER}b"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), encoding="utf-8"))
    for prompt in ("-", os.fsdecode(b"a\xffb")):
        assert main([*call, prompt]) == 0
        said = capsys.readouterr()
        assert said.out == expected
        assert said.err == "arcmerge: warning: the prompt has bytes that are not UTF-8; each is read as U+FFFD\n"
    assert Gemma2.from_pretrained(folder).generate("a\udcffb", max_new_tokens=3) + "\n" == expected


def test_characters_that_the_terminal_cannot_print_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_chain(tmp_path, [TOKENS["H"], TOKENS["<0xC3>"], TOKENS["<0xA9>"], TOKENS["w"]])
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert main(["generate", str(tmp_path), "H", "--max-new-tokens", "3", "--dtype", "float32", "-q"]) == 0
    assert written.getvalue() == b"\\xe9w\n"
    monkeypatch.setattr("sys.stdin", None)
    assert main(["generate", str(tmp_path), "-"]) == 1


def test_a_chat_remembers_until_new(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    type_in(monkeypatch, "hi", "", "hi", "/new", "hi")
    assert main(["chat", str(folder), "--max-new-tokens", "6", "-q"]) == 0
    chat = capsys.readouterr().out
    (folder / "chat_template.jinja").unlink()
    model = Gemma2.from_pretrained(folder)
    first = model.generate("u:hi|", max_new_tokens=6)
    second = model.generate(f"u:hi|a:{first}|u:hi|", max_new_tokens=6)
    assert chat == f"{first}\n{second}\n{first}\n\n"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["abc", "--chat"], 1, "'chat_template' must be set, got none"),
        (["abc", "--temperature", "-1"], 1, "'temperature' must be 0 (greedy) or more, got -1.0"),
        (["abc" * 200], 1, "'prompt' must have at most 512 tokens, the model's max_position_embeddings, got 601"),
        (["abc", "--stop", ""], 1, "'stop' must be strings of one character or more"),
        (["abc", "--max-new-tokens", "many"], 2, "invalid int value: 'many'"),
        ([], 2, "the following arguments are required: PROMPT"),
    ],
)
def test_wrong_calls_fail_with_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, sentence: str
) -> None:
    assert main(["generate", str(folder), *arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err
    assert said.err.count("\n") == 1


def test_another_architecture_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.make("llama-a", tmp_path)
    assert main(["generate", str(tmp_path / "llama-a"), "abc"]) == 1
    assert "'model_type' must be 'gemma2' to run the model, got 'llama'" in capsys.readouterr().err


def test_an_answer_ends_where_the_context_is_full(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Gemma2.from_pretrained(folder)
    prompt = [2, *[70] * 499]
    with pytest.warns(UserWarning, match=r"the answer ends after 12 tokens, as the model's max_position_embeddings"):
        assert len(model.generate(prompt, eos_token_id=[])) == 512
    with pytest.warns(UserWarning, match="ends after 1 token"):
        assert len(model.generate([*prompt, *[70] * 12], eos_token_id=[], max_new_tokens=2)) == 513
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as many as asked for
        assert len(model.generate(prompt, eos_token_id=[], max_new_tokens=12)) == 512
    with pytest.raises(ArcmergeError, match=r"'prompt' must have at most 512 tokens, .*, got 513"):
        model.generate([2] * 513, max_new_tokens=1)
    rows = torch.tensor([prompt, [2] * 500])
    mask = torch.ones_like(rows)
    mask[1, 4:] = 0
    with pytest.warns(UserWarning, match="ends after 12 tokens"):  # each row has its own room
        assert model.generate(rows, mask, eos_token_id=[], max_new_tokens=20).shape == (2, 520)
    assert main(["generate", str(folder), "x" * 499, "--max-new-tokens", "99", "-q"]) == 0
    assert capsys.readouterr().err.startswith("arcmerge: note: the answer ends after 12 tokens, as the model's max")


def talker(folder: Path, context: int) -> Path:
    """A model that answers "Px<end_of_turn>" and more; its configuration has only <eos>."""
    chain = [TOKENS[name] for name in ("\n", "P", "x", "<end_of_turn>", "<start_of_turn>", "u")]
    build_chain(folder, chain, max_position_embeddings=context)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TURNS}))
    return folder


def test_a_turn_ends_where_the_template_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = [str(talker(tmp_path, 256)), "--max-new-tokens", "6", "--dtype", "float32"]
    type_in(monkeypatch, "Capital of France?")
    assert main(["chat", *call]) == 0
    said = capsys.readouterr()
    assert said.out == "Px\n\n"
    assert "3 new" in said.err
    assert main(["generate", *call, "hi", "--chat"]) == 0
    assert "3 new" in capsys.readouterr().err
    model = Gemma2.from_pretrained(tmp_path, dtype=torch.float32)
    talk = [{"role": "user", "content": "hi"}]
    pieces: list[str] = []
    assert model.generate(talk, max_new_tokens=6, stream=pieces.append) == "Px"
    assert pieces == ["P", "x"]
    assert model.generate(talk, max_new_tokens=6, eos_token_id=[]) == "Pxuu"
    assert model.generate("a\n", max_new_tokens=6) == "Pxuu"
    # Special tokens can be stop strings, and are not part of the text.
    assert model.generate("a\n", max_new_tokens=6, stop="<start_of_turn>") == "Px"
    assert model.generate(model.tokenizer.encode("a\n"), max_new_tokens=6, stop="x<end")[-2:] == [TOKENS["x"], 5]
    assert main(["generate", *call, "a\n", "--stop", "<end_of_turn>", "-q"]) == 0
    assert capsys.readouterr().out == "Px\n"


def test_a_chat_drops_its_oldest_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["chat", str(talker(tmp_path, 128)), "--max-new-tokens", "6", "--dtype", "float32"]
    type_in(monkeypatch, "a" * 30, "b" * 30, "c" * 30, "d" * 200, "e")
    assert main(call) == 0
    said = capsys.readouterr()
    assert said.out == "Px\n" * 4 + "\n"
    assert said.err.count("the conversation exceeds the model's context; its oldest turn is forgotten") == 1
    assert "arcmerge: 'prompt' must have at most 128 tokens, the model's max_position_embeddings, got 216" in said.err
    first, second, third, last = map(int, re.findall(r"(\d+) prompt tokens", said.err))
    # The third turn dropped the first; the turn that failed dropped nothing.
    assert first < second == third < last
    (tmp_path / "tokenizer_config.json").write_text("{}")
    type_in(monkeypatch, "a")
    assert main(call) == 1  # at the start, as every turn would fail
    assert "'chat_template' must be" in capsys.readouterr().err
