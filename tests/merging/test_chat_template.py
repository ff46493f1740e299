"""Named chat templates as transformers renders them, and the choice of a template."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from arcmerge.errors import ArcmergeError
from arcmerge.merging.output.chat_template import NAMED, find_template, named_template, read_templates, with_template

USER = {"role": "user", "content": " What is an arc? "}
ANSWER = {"role": "assistant", "content": "Part of a circle."}
AGAIN = {"role": "user", "content": "Which part?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def render(template: str, messages: list[dict[str, str]], *, ask: bool = True) -> str:
    jinja = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = jinja.render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=ask, bos_token="<s>", eos_token="</s>"
    )
    return str(rendered[0])


CHATML = """\
<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
 What is an arc? <|im_end|>
<|im_start|>assistant
Part of a circle.<|im_end|>
<|im_start|>user
Which part?<|im_end|>
<|im_start|>assistant
"""
ALPACA = """\
Be brief.

### Instruction:
What is an arc?

### Response:
Part of a circle.

### Instruction:
Which part?

### Response:
"""
EXAONE = """\
[|system|]Be brief.[|endofturn|]
[|user|] What is an arc?\x20
[|assistant|]Part of a circle.[|endofturn|]
[|user|]Which part?
[|assistant|]"""
GEMMA = """\
<s><start_of_turn>user
Be brief.

What is an arc?<end_of_turn>
<start_of_turn>model
Part of a circle.<end_of_turn>
<start_of_turn>user
Which part?<end_of_turn>
<start_of_turn>model
"""
LLAMA3 = """\
<s><|start_header_id|>system<|end_header_id|>

Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

What is an arc?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

Part of a circle.<|eot_id|><|start_header_id|>user<|end_header_id|>

Which part?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

"""
MISTRAL = """\
<s> [INST] Be brief.

 What is an arc?  [/INST] Part of a circle.</s> [INST] Which part? [/INST]"""

FORMATS = {"alpaca": ALPACA, "chatml": CHATML, "exaone": EXAONE, "gemma": GEMMA, "llama3": LLAMA3, "mistral": MISTRAL}


class TestNamed:
    @pytest.mark.parametrize("name", NAMED)
    def test_published_format(self, name: str) -> None:
        assert render(named_template(name), [SYSTEM, USER, ANSWER, AGAIN]) == FORMATS[name]

    @pytest.mark.parametrize("name", NAMED)
    def test_a_longer_conversation_has_the_shorter_one_as_its_prefix(self, name: str) -> None:
        """The text that the model has read does not change if its answer and the next question follow."""
        before = render(named_template(name), [USER])
        after = render(named_template(name), [USER, ANSWER, AGAIN], ask=False)
        assert after.startswith(before.rstrip())
        assert "Part of a circle." not in before

    def test_exaone_opens_with_an_empty_system_turn(self) -> None:
        assert render(named_template("exaone"), [USER]).startswith("[|system|][|endofturn|]\n[|user|]")

    def test_mistral_needs_alternating_roles(self) -> None:
        with pytest.raises(Exception, match="must take turns"):
            render(named_template("mistral"), [USER, AGAIN])

    @pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [USER, ANSWER, AGAIN]], ids=len)
    @pytest.mark.parametrize("name", sorted(set(NAMED) - {"gemma"}))
    def test_mergekit_differs_in_white_space_only(self, name: str, messages: list[dict[str, str]]) -> None:
        """chatml and mistral are equal; mergekit's other files put their own line breaks into the prompt."""
        folder = pytest.importorskip("mergekit._data.chat_templates").__path__[0]
        theirs = render(Path(folder, f"{name}.jinja").read_text(), messages)
        ours = render(named_template(name), messages)
        assert re.sub(r"\s", "", ours) == re.sub(r"\s", "", theirs)
        if name in ("chatml", "mistral"):
            assert ours == theirs


class TestChoice:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> list[Path]:
        contents: list[dict[str, Any]] = [
            {"chat_template.jinja": "{{ first }}"},
            {"tokenizer_config.json": {"chat_template": "{{ second }}\n"}},
            {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "{{ second }}"}]}},
            {"tokenizer_config.json": {}},
            {},
        ]
        for number, files in enumerate(contents):
            (tmp_path / str(number)).mkdir()
            for name, content in files.items():
                (tmp_path / str(number) / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return sorted(tmp_path.iterdir())

    def test_auto_takes_the_most_common(self, folders: list[Path]) -> None:
        assert find_template("auto", folders) == "{{ second }}"

    def test_auto_takes_the_first_if_there_is_a_tie(self, folders: list[Path]) -> None:
        assert find_template("auto", folders[:2]) == "{{ first }}"

    def test_auto_without_templates(self, folders: list[Path]) -> None:
        assert find_template("auto", folders[3:]) is None

    def test_text(self) -> None:
        text = "{% for m in messages %}{{ m.content }}{% endfor %}"
        assert find_template(text, []) == text

    @pytest.mark.parametrize("setting", ["chatlm", "{{ too short }}", "a long sentence without a single brace"])
    def test_text_that_is_neither_a_name_nor_a_template(self, setting: str) -> None:
        with pytest.raises(ArcmergeError, match=r"must be auto, one of alpaca, chatml, .*mistral, or the text"):
            find_template(setting, [])


def test_the_new_template_is_the_only_one(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "chat_template": "{{ old }}"}
    files = {"tokenizer_config.json": json.dumps(config).encode(), "chat_template.json": b"{}", "other": b"x"}
    changed = with_template(files, "{{ new }}")
    assert sorted(changed) == ["chat_template.jinja", "other", "tokenizer_config.json"]
    assert json.loads(changed["tokenizer_config.json"]) == {"bos_token": "<s>"}
    for name, content in changed.items():
        (tmp_path / name).write_bytes(content)
    assert read_templates(tmp_path)["default"] == "{{ new }}"
