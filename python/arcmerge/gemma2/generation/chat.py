"""A conversation with a model that remembers its turns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from arcmerge.gemma2.arguments import read_strings
from arcmerge.gemma2.generation.generation_config import READERS
from arcmerge.gemma2.model import Gemma2


class Chat:
    """A conversation with one model.

    Args:
        model: with a chat template.
        options: keyword arguments of `Gemma2.generate`, except `input_ids`, `attention_mask` and `stream`.

    Raises:
        ArcmergeError: if an option has a wrong value, or if the model has no chat template.

    Example::

        >>> from arcmerge.gemma2.generation.chat import Chat
        >>> chat = Chat(arcmerge.Gemma2.from_pretrained("out/"), max_new_tokens=8)
        >>> answer = chat.say("What is the capital of France?")
        >>> answer = chat.say("And of Spain?")
    """

    def __init__(self, model: Gemma2, **options: Any) -> None:
        self._model = model
        self._options = options
        self._config = model.generation_config.changed({key: options[key] for key in options.keys() & READERS.keys()})
        self._config.sampling_params(options.get("seed"))
        self._config.check_lengths()
        if options.get("stop") is not None:
            read_strings("stop", options["stop"])
        _ = model.tokenizer.chat_template
        self._messages: list[Mapping[str, str]] = []

    def say(self, text: str, stream: Callable[[str], object] | None = None) -> str:
        """Send a message of the user and return the answer.

        The oldest turns are dropped, with a warning, once the conversation exceeds the model's context. A turn that
        raises is not remembered.

        Args:
            text: the message.
            stream: called with each new piece of the answer.

        Raises:
            ArcmergeError: see `Gemma2.generate`.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        while len(messages) > 1 and len(self._model.tokenizer.encode_chat(messages)) > self._max_prompt_tokens:
            messages = messages[2:]  # a question and its answer
        dropped = (len(self._messages) + 1 - len(messages)) // 2
        answer: str = self._model.generate(messages, stream=stream, **self._options)
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            warnings.warn(f"the conversation exceeds the model's context; its oldest {turns} forgotten", stacklevel=2)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def reset(self) -> None:
        """Forget all turns."""
        self._messages.clear()

    @property
    def _max_prompt_tokens(self) -> int:
        """The context without the answer, which takes at most a quarter of it."""
        context = self._model.config.max_position_embeddings
        return context - min(self._config.max_answer_tokens, context // 4)
