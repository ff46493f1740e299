"""The commands that run a model, as a person calls them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

import tiny
from arcmerge.cli import main
from arcmerge.gemma2.model import Gemma2
from gemma2_models import build, save_byte_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are <pad>, <eos>, <bos> and the 256 bytes."""
    folder = tmp_path_factory.mktemp("model")
    build(folder, "2.6B", vocab_size=259)
    save_byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("large", [False, True], ids=["a small model", "one that caches cannot hold"])
def test_a_prompt_is_continued_and_timed(
    large: bool, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr("arcmerge.gemma2.session.BEYOND_CACHES", 0)
    assert main(["generate", str(folder), "abc", "--max-new-tokens", "9", "--dtype", "float32"]) == 0
    said = capsys.readouterr()
    model = Gemma2.from_pretrained(folder, dtype=torch.float32)
    assert said.out == model.generate("abc", max_new_tokens=9) + "\n"
    assert "4 prompt tokens at" in said.err
    assert "9 new at" in said.err
    assert ("GB/s" in said.err) == large


def test_a_warning_is_a_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "query_pre_attn_scalar": 224}))
    assert main(["generate", str(tmp_path), "abc", "--max-new-tokens", "2", "-q"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"arcmerge: warning: {tmp_path}/config.json: query_pre_attn_scalar is 224")
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
    monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
    assert main([*call, "-"]) == 0
    assert capsys.readouterr() == given
    assert given.err == ""


def test_a_chat_remembers_until_it_is_told_to_forget(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    lines = iter(["hi", "hi", "/new", "hi", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", str(folder), "--max-new-tokens", "6", "-q"]) == 0
    chat = capsys.readouterr().out
    (folder / "chat_template.jinja").unlink()
    model = Gemma2.from_pretrained(folder)
    first = model.generate("u:hi|", max_new_tokens=6)
    second = model.generate(f"u:hi|a:{first}|u:hi|", max_new_tokens=6)
    assert chat == f"{first}\n{second}\n{first}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["abc", "--chat"], 1, "has no chat template, as base models have none"),
        (["abc", "--temperature", "-1"], 1, "'temperature' must be above 0"),
        (
            ["abc", "--max-new-tokens", "9999"],
            1,
            "10002 tokens are more than the 512 of the model's max_position_embedd",
        ),
        (["abc", "--max-new-tokens", "many"], 2, "invalid int value: 'many'"),
        ([], 2, "the following arguments are required: PROMPT"),
    ],
)
def test_wrong_calls_are_refused_in_a_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, sentence: str
) -> None:
    assert main(["generate", str(folder), *arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err
    assert said.err.count("\n") == 1


def test_a_model_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.make("llama-a", tmp_path)
    assert main(["generate", str(tmp_path / "llama-a"), "abc"]) == 1
    assert "model_type must be 'gemma2' to run here, is 'llama'" in capsys.readouterr().err
