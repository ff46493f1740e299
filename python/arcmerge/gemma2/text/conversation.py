"""Chat templates, rendered in a sandbox with the filters and functions that transformers provides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
Messages = Sequence[Message]

# The keys of a message's reasoning, the first one that is set counts.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Appended to the last message's content to find its end. Templates that trim remove its blank.
_MARK = "END_OF_FINAL_MESSAGE "


def render(
    template: str,
    messages: Messages,
    *,
    source: str,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation, as transformers renders it.

    Args:
        template: the text of the chat template.
        messages: each with role and content.
        source: of the template, for messages.
        continue_final_message: end with the content of the last message.
        variables: of the template, besides the messages.

    Raises:
        ArcmergeError: if the template refuses the conversation, fails, or is no template.
    """
    from jinja2 import TemplateSyntaxError

    plain = [_plain_message(message, source) for message in messages]
    if not plain:
        raise ArcmergeError(f"{source}: the conversation must have at least one message, got none")
    final = _mark_end(plain[-1], source) if continue_final_message else ""
    try:
        text = _compile(template).render(messages=plain, **{"tools": None, "documents": None, **variables})
    except _refusal() as error:
        reason = str(error).rstrip(".")
        raise ArcmergeError(
            f"{source}: the conversation must be one that the chat template accepts, got its error: {reason}"
        ) from error
    except TemplateSyntaxError as error:
        reason = str(error.message).rstrip(".")
        raise ArcmergeError(
            f"{source}: 'chat_template' must be a Jinja template, got an error in line {error.lineno}: {reason}; copy "
            "it from the instruction-tuned parent"
        ) from error
    except Exception as error:  # the expressions of a template may raise anything
        reason = str(error) or type(error).__name__
        raise ArcmergeError(
            f"{source}: 'chat_template' must render the conversation, got an error: {reason}; it may need other "
            "messages or variables"
        ) from error
    return _cut_at_mark(text, final, source) if continue_final_message else text


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens in tokenizer_config.json by the names of template variables: `eos_token`, `image_token`."""
    path = folder / "tokenizer_config.json"
    settings = parse_object(path.read_bytes(), path) if path.exists() else {}
    extra = settings.get("extra_special_tokens")
    named = {**(extra if isinstance(extra, dict) else {}), **settings}
    found = {key: _content(value) for key, value in named.items() if key.endswith("_token")}
    return {key: content for key, content in found.items() if content is not None}


def _content(token: object) -> str | None:
    """The text of a special token, which is a string or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _plain_message(message: Message, source: str) -> dict[str, Any]:
    """A copy without values of None, and with the reasoning under the names that templates read."""
    if not isinstance(message, Mapping):
        raise ArcmergeError(f"{source}: the message must be a mapping with role and content, got {message!r}")
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _mark_end(message: dict[str, Any], source: str) -> str:
    """Append the mark to the message's text, or to its last part with text, and return the text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _MARK
        return content
    if isinstance(content, list | tuple):
        parts = list(content)
        for index in range(len(parts) - 1, -1, -1):
            if isinstance(parts[index], Mapping) and isinstance(text := parts[index].get("text"), str):
                parts[index] = {**parts[index], "text": text + _MARK}
                message["content"] = parts
                return text
    raise ArcmergeError(f"{source}: the last message must have text to continue, got {content!r}")


def _cut_at_mark(text: str, final: str, source: str) -> str:
    offset = text.rfind(_MARK.strip())
    if offset < 0 or final.strip() not in text:
        raise ArcmergeError(
            f"{source}: 'chat_template' must write the last message unchanged to continue it, got another text; end "
            "the conversation with a user's message"
        )
    # A template that removed the mark's blank would have removed those of the message too.
    return text[:offset] if text.startswith(_MARK, offset) else text[:offset].rstrip()


@lru_cache
def _refusal() -> type[Exception]:
    """The exception that `raise_exception` of a template raises."""
    from jinja2 import TemplateError

    return type("Refusal", (TemplateError,), {})


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks the model's text for training; its content is rendered like any other."""

        tags = {"generation"}  # noqa: RUF012 -- as its base declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return [nodes.Scope(body).set_lineno(line)]

    class PlainNamespace(Namespace):
        """Refuses names that begin with an underscore, which would give access to Python's own."""

        def __init__(*arguments: Any, **attributes: Any) -> None:
            self, *others = arguments
            given = dict(*others, **attributes)
            for name in given:
                _require_plain(name)
            Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            _require_plain(name)
            super().__setitem__(name, value)

    def _require_plain(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"names in a namespace must not begin with an underscore, got {name!r}")

    def refuse(reason: str) -> None:
        raise _refusal()(reason)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = PlainNamespace
    return environment.from_string(template)
