"""Between text and tokens: tokenizer.json, exactly one BOS, the chat template, stop strings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from arcmerge.errors import ArcmergeError

Messages = Sequence[Mapping[str, str]]


class Text:
    """The tokenizer of a model folder. bos: the number of its first token.

    Opening it raises ArcmergeError for a folder without tokenizer.json.
    """

    def __init__(self, folder: Path, bos: int) -> None:
        self._folder = folder
        self.bos = bos
        path = folder / "tokenizer.json"
        if not path.exists():
            if (folder / "tokenizer.model").exists():
                raise ArcmergeError(
                    f"{folder}: has a SentencePiece tokenizer.model and no tokenizer.json: make one with "
                    f"transformers.AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')."
                )
            raise ArcmergeError(f"{folder}: has no tokenizer.json: copy the base model's, or give token numbers.")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ArcmergeError(f"{path}: is not a tokenizer ({error}): copy the base model's.") from error

    @property
    def name(self) -> str:
        """Of the folder that it came from."""
        return str(self._folder)

    def encode(self, text: str) -> list[int]:
        """Tokens with exactly one BOS in front, whether or not the text or the tokenizer brings one."""
        tokens = self.encode_plain(text)
        return tokens if tokens[:1] == [self.bos] else [self.bos, *tokens]

    def encode_plain(self, text: str) -> list[int]:
        """Tokens of the text and nothing more; special tokens that it spells out are recognised."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_with_special(self, text: str) -> list[int]:
        """Tokens with the special ones that the tokenizer itself adds, unless the text begins with BOS: Gemma's adds
        one BOS, others may add none.
        """
        begins = text.startswith(str(self.tokenizer.id_to_token(self.bos)))
        return list(self.tokenizer.encode(text, add_special_tokens=not begins).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def chat(self, messages: Messages) -> list[int]:
        """Tokens of a conversation up to where the model answers, by the model's own template."""
        return self.encode(self.render(messages))

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The text of a conversation by the model's own template, in a sandbox; up to where the model answers."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        settings = self._settings()

        def refuse(reason: str) -> None:
            raise TemplateError(reason)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        special = {key: _content(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        special["bos_token"] = special["bos_token"] or str(self.tokenizer.id_to_token(self.bos))
        try:
            template = environment.from_string(self.template)
            return template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **special)
        except TemplateError as error:
            raise ArcmergeError(f"{self._folder}: its chat template refuses this conversation: {error}.") from error

    @property
    def template(self) -> str:
        """The chat template; ArcmergeError if the folder has none."""
        file = self._folder / "chat_template.jinja"
        if file.exists():
            return file.read_text(encoding="utf-8")
        template = self._settings().get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if not isinstance(template, str):
            raise ArcmergeError(
                f"{self._folder}: has no chat template, as base models have none: give a plain prompt, or copy "
                "chat_template from the instruction-tuned parent."
            )
        return template

    def _settings(self) -> Mapping[str, Any]:
        path = self._folder / "tokenizer_config.json"
        if not path.exists():
            return {}
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArcmergeError(f"{path}: is not JSON ({error}): copy the base model's.") from error
        return settings if isinstance(settings, dict) else {}


def _content(token: object) -> str:
    """A special token of tokenizer_config.json is a string or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


class Stream:
    """Text of an answer as its tokens come, complete characters only, and never past a stop string."""

    def __init__(self, text: Text, stop: Sequence[str]) -> None:
        self._tokenizer = text.tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._shown = 0
        self.whole = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What may be shown now that `token` has come."""
        self.whole += self._decoder.step(self._tokenizer, token) or ""
        ends = [end for end in (self.whole.find(stop) for stop in self._stop) if end >= 0]
        if ends:
            self.stopped = True
            self.whole = self.whole[: min(ends)]
            return self._show(len(self.whole))
        return self._show(len(self.whole) - self._withheld())

    def finish(self) -> str:
        """What was held back, as it might have become a stop string."""
        return self._show(len(self.whole))

    def _show(self, end: int) -> str:
        shown, self._shown = self._shown, max(self._shown, end)
        return self.whole[shown : self._shown]

    def _withheld(self) -> int:
        """Characters at the end that may turn into a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self.whole)), 0, -1):
            if any(stop.startswith(self.whole[-length:]) for stop in self._stop):
                return length
        return 0
