"""Between text and tokens: tokenizer.json, exactly one BOS, the chat template."""

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
            raise ArcmergeError(f"{folder}: has no tokenizer.json: copy the base model's, or pass token ids.")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ArcmergeError(f"{path}: is not a tokenizer ({error}): copy the base model's.") from error

    @classmethod
    def from_pretrained(cls, path: str, bos: int) -> Gemma2Tokenizer:
        """The tokenizer of a model folder or of a model on the hub."""
        return cls(locate(path), bos)

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
        return list(self.tokenizer.encode(well_formed(text), add_special_tokens=False).ids)

    def encode_with_special(self, text: str) -> list[int]:
        """Tokens with the special ones that the tokenizer itself adds: Gemma's adds one BOS, others may add none."""
        return list(self.tokenizer.encode(well_formed(text), add_special_tokens=True).ids)

    def split(
        self, context: str, continuation: str, encode: Callable[[str], list[int]] | None = None
    ) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what goes on from it, cut where the context's own tokens end, as lm-eval cuts.

        Blanks at the end of the context go to the continuation. Where a token spans the end of the context and all of
        the continuation, so that the cut leaves nothing, the continuation has the tokens of its text alone.
        encode: from text to tokens, by default with one BOS.
        """
        encode = encode or self.encode
        blanks = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - blanks], context[len(context) - blanks :] + continuation
        before, whole = encode(context), encode(context + continuation)
        return before or [self.bos], whole[len(before) :] or self.encode_plain(continuation)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens, without special ones unless asked for."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    @cached_property
    def special(self) -> frozenset[int]:
        """The special tokens of the tokenizer."""
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def chat(self, messages: Messages) -> list[int]:
        """Tokens of a conversation up to where the model answers, by the model's own template."""
        return self.encode(self.render(messages))

    def render(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation by the model's own template, as `apply_chat_template` of transformers has it.

        add_generation_prompt: up to where the model answers. continue_final_message: up to the end of the last
        message's content, which the model goes on writing; it takes the place of a generation prompt. template: the
        name of another of the model's templates. variables: what else the template reads, such as tools and documents.
        """
        names = {"bos_token": str(self.tokenizer.id_to_token(self.bos)), **special_tokens(self._folder)}
        return render(
            self.template_named(template),
            messages,
            source=self.name,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            **{**names, **variables},
        )

    @property
    def template(self) -> str:
        """The chat template; ArcmergeError if the folder has none."""
        return self.template_named(None)

    def template_named(self, name: str | None) -> str:
        """The chat template of that name, by default "default"; ArcmergeError if the folder has none."""
        templates = read_templates(self._folder)
        if not templates:
            raise ArcmergeError(
                f"{self._folder}: has no chat template, as base models have none: give a plain prompt, or copy "
                "chat_template from the instruction-tuned parent."
            )
        if (found := templates.get(name or "default")) is None:
            raise ArcmergeError(
                f"{self._folder}: has no chat template '{name or 'default'}'; its templates are {', '.join(templates)}."
            )
        return found

    @property
    def has_named_templates(self) -> bool:
        """Whether there are chat templates to choose from by name."""
        return bool(read_templates(self._folder).keys() - {"default"})

    @cached_property
    def ends_of_turn(self) -> frozenset[int]:
        """The special token that the chat template writes after an assistant's message, at most one.

        It ends a turn where generation_config.json was lost, as it often is in merges. Templates differ in whether they
        close the last turn, and in whether a message's content is text or a list of parts.
        """
        answer = "739146"  # digits, which no filter of a template changes
        for content in (str, lambda text: [{"type": "text", "text": text}]):
            turns = [("user", "12"), ("assistant", answer), ("user", "34")]
            messages = [{"role": role, "content": content(text)} for role, text in turns]
            for said in (messages, messages[:2]):
                try:
                    before, _, after = self.render(said, add_generation_prompt=False).rpartition(answer)
                except ArcmergeError:  # no template, or one of other conversations
                    continue
                if before and (ends := frozenset(self.encode_plain(after.lstrip())[:1]) & self.special):
                    return ends
        return frozenset()


def well_formed(text: str) -> str:
    """`text` with U+FFFD for what UTF-8 cannot spell: bytes of a command line that were no text."""
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)
