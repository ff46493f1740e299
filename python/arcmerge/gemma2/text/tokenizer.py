"""The tokenizer of a model: text to token ids with exactly one BOS, and back; chat templates."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from arcmerge.checkpoint.hub import locate
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.text.conversation import Messages, render, special_tokens
from arcmerge.merging.output.chat_template import read_templates

_SURROGATES = re.compile("[\ud800-\udfff]")


class Gemma2Tokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: with a tokenizer.json.
        bos_token_id: begins every encoded text.

    Attributes:
        backend: the tokenizer of the `tokenizers` library.
        bos_token_id: the id of BOS.

    Raises:
        ArcmergeError: if the folder has no readable tokenizer.json.
    """

    def __init__(self, folder: Path, bos_token_id: int) -> None:
        self._folder = folder
        self.bos_token_id = bos_token_id
        path = folder / "tokenizer.json"
        if not path.exists():
            if (folder / "tokenizer.model").exists():
                raise ArcmergeError(
                    f"{folder}: the tokenizer must be a tokenizer.json, got SentencePiece's tokenizer.model; convert "
                    f"it with transformers.AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
                )
            raise ArcmergeError(
                f"{folder}: 'tokenizer.json' must be in the folder, got no such file; copy the base model's, or pass "
                "token ids"
            )
        try:
            self.backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ArcmergeError(
                f"{path}: the file must be a tokenizer, got an error: {error}; copy the base model's"
            ) from error

    @classmethod
    def from_pretrained(cls, path: str, bos_token_id: int) -> Gemma2Tokenizer:
        """The tokenizer of a model folder or of a model on the hub."""
        return cls(locate(path), bos_token_id)

    @property
    def name(self) -> str:
        """The path of its folder."""
        return str(self._folder)

    def encode(self, text: str) -> list[int]:
        """Token ids that begin with exactly one BOS, whether or not the text or the tokenizer adds one."""
        tokens = self.encode_plain(text)
        return tokens if tokens[:1] == [self.bos_token_id] else [self.bos_token_id, *tokens]

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of the text without BOS; special tokens in the text are recognised."""
        return list(self.backend.encode(well_formed(text), add_special_tokens=False).ids)

    def encode_with_special(self, text: str) -> list[int]:
        """Token ids with the special tokens that the tokenizer adds: Gemma's adds one BOS, others may add none."""
        return list(self.backend.encode(well_formed(text), add_special_tokens=True).ids)

    def encode_pair(
        self, context: str, continuation: str, encode: Callable[[str], list[int]] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids of a context and of its continuation, split as lm-eval does, after the context's own tokens.

        Blanks at the end of the context are moved to the continuation. If a token spans the end of the context and the
        whole continuation, the continuation is encoded alone.

        Args:
            context: may be empty, which stands for BOS.
            continuation: the text to score.
            encode: maps text to token ids; by default with one BOS.
        """
        encode = encode or self.encode
        blanks = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - blanks], context[len(context) - blanks :] + continuation
        before, whole = encode(context), encode(context + continuation)
        return before or [self.bos_token_id], whole[len(before) :] or self.encode_plain(continuation)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, by default without special tokens."""
        return str(self.backend.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def encode_chat(self, messages: Messages) -> list[int]:
        """Token ids of a conversation in the model's chat template, up to the generation prompt."""
        return self.encode(self.render_chat(messages))

    def render_chat(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, like transformers' apply_chat_template with tokenize=False.

        Args:
            messages: each with role and content.
            add_generation_prompt: end with the beginning of the model's answer.
            continue_final_message: end with the content of the last message, which the model continues; no generation
                prompt then.
            template: the name of another of the model's templates.
            variables: further variables of the template, such as tools and documents.

        Raises:
            ArcmergeError: if the model has no such template, or if the template fails.
        """
        names = {"bos_token": str(self.backend.id_to_token(self.bos_token_id)), **special_tokens(self._folder)}
        return render(
            self.chat_template_named(template),
            messages,
            source=self.name,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            **{**names, **variables},
        )

    @property
    def chat_template(self) -> str:
        """The default chat template; ArcmergeError if the folder has none."""
        return self.chat_template_named(None)

    def chat_template_named(self, name: str | None) -> str:
        """The chat template of this name, None: "default"; ArcmergeError if the folder has none."""
        templates = read_templates(self._folder)
        if not templates:
            raise ArcmergeError(
                f"{self._folder}: 'chat_template' must be set, got none, as in base models; give a plain prompt, or "
                "copy it from the instruction-tuned parent"
            )
        if (found := templates.get(name or "default")) is None:
            raise ArcmergeError(
                f"{self._folder}: the chat template must be one of {', '.join(templates)}, got '{name or 'default'}'"
            )
        return found

    @property
    def has_named_templates(self) -> bool:
        """Whether the folder has chat templates with names of their own."""
        return bool(read_templates(self._folder).keys() - {"default"})

    @cached_property
    def end_of_turn_ids(self) -> frozenset[int]:
        """The special token that the chat template writes after an assistant's message, if any.

        It ends a turn where generation_config.json was lost, as it often is in merges. Templates differ in whether they
        close the last turn, and in whether a message's content is text or a list of parts.
        """
        answer = "739146"  # digits, which no filter of a template changes
        for content in (str, lambda text: [{"type": "text", "text": text}]):
            turns = [("user", "12"), ("assistant", answer), ("user", "34")]
            messages = [{"role": role, "content": content(text)} for role, text in turns]
            for talk in (messages, messages[:2]):
                try:
                    before, _, after = self.render_chat(talk, add_generation_prompt=False).rpartition(answer)
                except ArcmergeError:  # no template, or one that refuses this conversation
                    continue
                if before and (ends := frozenset(self.encode_plain(after.lstrip())[:1]) & self.special_token_ids):
                    return ends
        return frozenset()


def well_formed(text: str) -> str:
    """`text` with U+FFFD for surrogates: bytes of a command line that are not UTF-8."""
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)
