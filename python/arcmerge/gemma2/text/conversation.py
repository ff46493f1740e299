"""Conversations as text: chat templates in the environment that transformers gives them, in a sandbox."""

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

Messages = Sequence[Mapping[str, Any]]

# Names under which a message's reasoning is passed, the one that templates read first.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Stands after the last message's content to find its end. Templates that trim take its blank away.
_MARK = "END_OF_FINAL_MESSAGE "


def render(
    template: str,
    messages: Messages,
    *,
    source: str,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation by the text of a template, as transformers renders it.

    source: what errors name. continue_final_message: the text ends with the content of the last message, which is left
    open. variables: what the template reads beside the messages.
    Raises ArcmergeError where the template refuses the conversation, fails on it, or is no template.
    """
    from jinja2 import TemplateSyntaxError

    said = [_plain_message(message, source) for message in messages]
    if not said:
        raise ArcmergeError(f"{source}: a conversation must have at least one message.")
    final = _mark_end(said[-1], source) if continue_final_message else ""
    try:
        text = _compile(template).render(messages=said, **{"tools": None, "documents": None, **variables})
    except _refusal() as error:
        reason = str(error).rstrip(".")
        raise ArcmergeError(f"{source}: its chat template refuses this conversation: {reason}.") from error
    except TemplateSyntaxError as error:
        reason = str(error.message).rstrip(".")
        raise ArcmergeError(
            f"{source}: its chat template cannot be read, line {error.lineno}: {reason}; copy chat_template from the "
            "instruction-tuned parent."
        ) from error
    except Exception as error:  # whatever the expressions of a template come to
        reason = str(error) or type(error).__name__
        raise ArcmergeError(
            f"{source}: its chat template fails on this conversation: {reason}; the template may need other messages "
            "or variables."
        ) from error
    return _cut_at_mark(text, final, source) if continue_final_message else text


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names, as templates see them: `eos_token`, `image_token`."""
    path = folder / "tokenizer_config.json"
    settings = parse_object(path.read_bytes(), path) if path.exists() else {}
    extra = settings.get("extra_special_tokens")
    named = {**(extra if isinstance(extra, dict) else {}), **settings}
    found = {key: _content(value) for key, value in named.items() if key.endswith("_token")}
    return {key: content for key, content in found.items() if content is not None}


def _content(token: object) -> str | None:
    """A special token is a string or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _plain_message(message: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A copy without what is None, and with the reasoning under the names that templates read."""
    if not isinstance(message, Mapping):
        raise ArcmergeError(f"{source}: a message must have role and content, got {message!r}.")
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _mark_end(message: dict[str, Any], source: str) -> str:
    """Put the mark behind the message's text, which is returned; of several parts the last with text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _MARK
        return content
    if isinstance(content, list | tuple):
        parts = list(content)
        for place in range(len(parts) - 1, -1, -1):
            if isinstance(parts[place], Mapping) and isinstance(text := parts[place].get("text"), str):
                parts[place] = {**parts[place], "text": text + _MARK}
                message["content"] = parts
                return text
    raise ArcmergeError(f"{source}: the last message must have text to be continued, got {content!r}.")


def _cut_at_mark(text: str, final: str, source: str) -> str:
    place = text.rfind(_MARK.strip())
    if place < 0 or final.strip() not in text:
        raise ArcmergeError(
            f"{source}: its chat template does not write the last message as it is, so that it cannot be continued; "
            "end the conversation with a user's message."
        )
    # Where the template took the mark's blank away, it would have taken those of the message too.
    return text[:place] if text.startswith(_MARK, place) else text[:place].rstrip()


@lru_cache
def _refusal() -> type[Exception]:
    """What `raise_exception` raises: the template's own words."""
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
        """{% generation %} tells trainers which text is the model's; it is rendered like any other."""

        tags = {"generation"}  # noqa: RUF012 -- as its base declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return [nodes.Scope(body).set_lineno(line)]

    class PlainNamespace(Namespace):
        """Without names that begin with an underscore, which lead to Python's own."""

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
            raise SecurityError(f"a namespace must have no name that begins with an underscore, got {name!r}")

    def refuse(reason: str) -> None:
        raise _refusal()(reason)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = PlainNamespace
    return environment.from_string(template)
