"""Chat templates render the text that transformers renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.text.tokenizer import Gemma2Tokenizer
from arcmerge.merging.output.chat_template import NAMED, named_template, read_templates
from gemma2_models import SPECIAL, TOKENS, TURNS, save_fallback_tokenizer

BOS = 2
TALK = [
    {"role": "user", "content": " What is <1>?", "name": None},
    {"role": "assistant", "content": "It is 1 & \N{SNOWMAN}. ", "reasoning": "count"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "Then 2"},
]
EACH = "{% for m in messages %}"
TEMPLATES = {
    **{name: named_template(name) for name in NAMED},
    "gemma as published": TURNS,
    "break": EACH + "{% if loop.index0 > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": EACH + "{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "the year": "{{ strftime_now('%Y') }}{{ messages[0].content }}",
    "generation": EACH + "{%- generation -%} {% set x = m.content %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}",
    "no tools": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ add_generation_prompt }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "json apart": "{{ messages | tojson(separators=(',', ':'), ensure_ascii=True) }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}"
    "{{ image_token }}{{ sep_token }}",
    "None is absent": "{{ messages[0].name is defined }}{{ messages[1].reasoning_content }}{{ messages[1].thinking }}",
    "blocks": "{% for m in messages %}\n    {% if m.role == 'user' %}\n  {{ m.content }}\n    {% endif %}\n"
    "{% endfor %}\n",
    "namespace and dict": "{% set n = namespace(a=1) %}{% set n.a = dict(b=2) %}{{ n.a.b }}{{ range(3) | list }}",
}


def save(folder: Path, template: Any, **settings: Any) -> Gemma2Tokenizer:
    save_fallback_tokenizer(folder)
    names = {
        "bos_token": "<bos>",
        "eos_token": {"__type": "AddedToken", "content": "<eos>", "special": True},
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": template, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Gemma2Tokenizer(folder, BOS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path: Path, name: str) -> None:
    tokenizer = save(
        tmp_path, TEMPLATES[name], image_token="<start_of_turn>", extra_special_tokens={"sep_token": "<unk>"}
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.render_chat(TALK, add_generation_prompt=prompt) == expected
    if "content" in TEMPLATES[name]:
        try:
            expected = theirs.apply_chat_template(TALK, tokenize=False, continue_final_message=True)
        except ValueError:
            with pytest.raises(ArcmergeError, match="must write the last message unchanged"):
                tokenizer.render_chat(TALK, continue_final_message=True)
        else:
            assert tokenizer.render_chat(TALK, continue_final_message=True) == expected
    tools = [{"type": "function", "function": {"name": "f"}}]
    expected = theirs.apply_chat_template(TALK, tools=tools, tokenize=False, bos_token="B")
    assert tokenizer.render_chat(TALK, add_generation_prompt=False, tools=tools, bos_token="B") == expected


@pytest.mark.parametrize("content", ["It is ", "", [{"type": "text", "text": "It"}, {"type": "image"}]])
def test_continue_final_message(tmp_path: Path, content: Any) -> None:
    template = "{{ bos_token }}" + EACH + "<{{ m.role }}>"
    template += "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}</>{% endfor %}"
    tokenizer = save(tmp_path, template)
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": content}]
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        talk, tokenize=False, continue_final_message=True
    )
    assert tokenizer.render_chat(talk, continue_final_message=True) == expected
    assert not expected.endswith("</>")
    with pytest.raises(ArcmergeError, match="the last message must have text to continue, got None"):
        tokenizer.render_chat([{"role": "assistant"}], continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('No system role') }}", "the chat template accepts, got its error: No system role"),
        (
            "{{ messages | unknown }}",
            r"must be a Jinja template, got an error in line 1: No filter named 'unknown'; copy it",
        ),
        ("a\n{% unknown %}", r"got an error in line 2: Encountered unknown tag 'unknown'"),
        ("{{ other.content }}", "'chat_template' must render the conversation, got an error: 'other' is undefined"),
        (
            "{{ messages[0].content + 1 }}",
            "must render the conversation, got an error: can only concatenate str",
        ),
        ("{{ 1 / 0 }}", "'chat_template' must render the conversation, got an error: division by zero"),
        ("{{ namespace(__class__=1) }}", "got an error: names in a namespace must not begin"),
    ],
)
def test_errors_of_templates_name_the_folder(tmp_path: Path, template: str, problem: str) -> None:
    tokenizer = save(tmp_path, template)
    with pytest.raises(ArcmergeError, match=problem):
        tokenizer.render_chat(TALK)


def test_wrong_conversations_raise(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, TURNS)
    with pytest.raises(ArcmergeError, match="the conversation must have at least one message, got none"):
        tokenizer.render_chat([])
    with pytest.raises(ArcmergeError, match="the message must be a mapping with role and content, got 'hi'"):
        tokenizer.render_chat(["hi"])  # type: ignore[list-item]


def test_templates_by_name(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}])
    assert (tokenizer.render_chat(TALK), tokenizer.render_chat(TALK, template="tool_use")) == ("a", "b")
    with pytest.raises(ArcmergeError, match="the chat template must be one of default, tool_use, got 'rag'"):
        tokenizer.render_chat(TALK, template="rag")
    save(tmp_path, {"default": "c"})
    assert tokenizer.chat_template == "c"
    save(tmp_path, {"rag": "d"})
    with pytest.raises(ArcmergeError, match="the chat template must be one of rag, got 'default'"):
        tokenizer.render_chat(TALK)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("e")
    (tmp_path / "chat_template.jinja").write_text("f")
    assert read_templates(tmp_path) == {"default": "f", "tool_use": "e"}
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == read_templates(tmp_path)


def test_the_processors_template_is_the_last_choice(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "g"}))
    assert read_templates(tmp_path)["default"] == "g"
    save(tmp_path, "h")
    assert read_templates(tmp_path)["default"] == "h"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TURNS, {"<end_of_turn>"}),
        (EACH + "{{ m.role }}: {{ m.content }}\n<eos>\n{% endfor %}", {"<eos>"}),
        (EACH + "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}", {"<eos>"}),
        (EACH + "{{ m.role }}: {{ m.content }}\n{% endfor %}", set()),
        (EACH + "{{ m.role }}: {{ m.content }} over <eos>{% endfor %}", set()),
        (EACH + "{{ m.role }}: {{ m.content }}{% endfor %}", set()),
        (EACH + "{{ m.role }}: {{ m.content | upper }}<end_of_turn>{% endfor %}", {"<end_of_turn>"}),
        (EACH + "{{ m.role }}: {{ m.content[0].text }}<end_of_turn>{% endfor %}", {"<end_of_turn>"}),
        (EACH + "{{ m.role }}: {{ m.content | length }}<end_of_turn>{% endfor %}", set()),
        (
            EACH + "{{ m.content }}{% if not loop.last or m.role == 'user' %}<end_of_turn>{% endif %}{% endfor %}",
            {"<end_of_turn>"},
        ),
        (EACH + "{{ m.content }}{% if loop.last %}<eos>{% endif %}{% endfor %}", {"<eos>"}),
        ("{{ raise_exception('never') }}", set()),
        ("{% unknown %}", set()),
        (None, set()),
    ],
)
def test_end_of_turn_ids_of_templates(tmp_path: Path, template: str | None, end: set[str]) -> None:
    assert save(tmp_path, template).end_of_turn_ids == {TOKENS[name] for name in end}
    assert end <= set(SPECIAL)
