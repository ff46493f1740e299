"""Chat templates: those with a name, the one most models of a merge share, and where a tokenizer keeps its own.

The named ones write the published formats. mergekit's files for alpaca, exaone and llama3 let line ends and indentation
of the template itself into the prompt; these do not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError

_ALPACA = """\
{%- set headings = {'user': '### Instruction:', 'assistant': '### Response:', 'user_context': '### Input:'} -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- message.content | trim -}}
    {%- elif message.role in headings -%}
        {{- headings[message.role] + '\\n' + message.content | trim -}}
    {%- endif -%}
    {%- if not loop.last or (add_generation_prompt and message.role != 'assistant') -%}
        {{- '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'assistant' -%}
    {{- headings.assistant + '\\n' -}}
{%- endif -%}
"""

_CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_EXAONE = """\
{%- if messages[0].role != 'system' -%}
    {{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '[|' + message.role + '|]' + message.content -}}
    {{- '\\n' if message.role == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '[|assistant|]' -}}
{%- endif -%}
"""

_GEMMA = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' and loop.first -%}
        {%- set ns.system = message.content | trim + '\\n\\n' -%}
    {%- else -%}
        {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
        {{- ns.system + message.content | trim + '<end_of_turn>\\n' -}}
        {%- set ns.system = '' -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

_MISTRAL = """\
{{- bos_token -}}
{%- set ns = namespace(system='', expected='user') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' and loop.first -%}
        {%- set ns.system = message.content + '\\n\\n' -%}
    {%- elif message.role != ns.expected -%}
        {{- raise_exception('After an optional system message, user and assistant must take turns, user first.') -}}
    {%- elif message.role == 'user' -%}
        {{- ' [INST] ' + ns.system + message.content + ' [/INST]' -}}
        {%- set ns.system = '' -%}
        {%- set ns.expected = 'assistant' -%}
    {%- else -%}
        {{- ' ' + message.content + eos_token -}}
        {%- set ns.expected = 'user' -%}
    {%- endif -%}
{%- endfor -%}
"""

NAMED: Mapping[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "gemma": _GEMMA,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}

# A text shorter than this, or without a brace, is a misspelt name and no Jinja.
_SHORTEST = 20


def find_template(setting: str, folders: Iterable[Path]) -> str | None:
    """The template that the recipe's `chat_template` asks for; None for "auto" where no model has one.

    setting: "auto" for the one most models have, the first of them in a draw; one of NAMED; or Jinja text.
    folders: of the models. Raises ArcmergeError for anything else.
    """
    if setting == "auto":
        found = [template.strip() for folder in folders if (template := read_template(folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    if setting in NAMED:
        return NAMED[setting]
    if len(setting) < _SHORTEST or "{" not in setting:
        raise ArcmergeError(
            f"chat_template: must be auto, one of {', '.join(NAMED)}, or the text of a Jinja template, got {setting!r}"
        )
    return setting


def read_template(folder: Path) -> str | None:
    """The default template of the tokenizer in a checkpoint folder."""
    return read_templates(folder).get("default")


def read_templates(folder: Path) -> dict[str, str]:
    """The templates of the tokenizer in a checkpoint folder, by name; the one without a name is "default".

    They are in chat_template.jinja and additional_chat_templates/NAME.jinja, else in tokenizer_config.json, else in
    chat_template.json, where processors had theirs.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if found := {name: _read(file) for name, file in files.items() if file.is_file()}:
        return found
    for file in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        template: Any = parse_object(file.read_bytes(), file).get("chat_template") if file.exists() else None
        if isinstance(template, list):
            template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if isinstance(template, str):
            template = {"default": template}
        if isinstance(template, dict) and template:
            return {str(name): text for name, text in template.items() if isinstance(text, str)}
    return {}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArcmergeError(f"{file}: must be UTF-8 text: {error}; download it again") from error


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """The files of a tokenizer with `template` as its only one, in the place where transformers looks first."""
    changed = {name: content for name, content in files.items() if name != "chat_template.json"}
    changed["chat_template.jinja"] = template.encode()
    if "tokenizer_config.json" in changed:
        config = parse_object(changed["tokenizer_config.json"], Path("tokenizer_config.json"))
        if config.pop("chat_template", None) is not None:
            changed["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
    return changed
