"""A model being asked by a person: answers as they come, and how fast they came."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from arcmerge.gemma2.generation import Generated, Limits
from arcmerge.gemma2.model import Gemma2
from arcmerge.gemma2.roof import read_bandwidth
from arcmerge.gemma2.sampling import Sampling
from arcmerge.gemma2.text import Stream
from arcmerge.gemma2.weights import Weights

# Bytes of weights from which decoding waits for memory; a smaller model's stay in the caches, and a share of its
# bandwidth says nothing.
BEYOND_CACHES = 1 << 28


@dataclass(frozen=True)
class Answer:
    """text: without special tokens and what follows a stop string. weights: of the model."""

    text: str
    generated: Generated
    weights: Weights

    def summary(self) -> str:
        """One line: tokens, tokens a second, and the share of the memory bandwidth that decoding reached."""
        done = self.generated
        tokens = len(done.tokens[0])
        parts = [
            f"{done.prompt_tokens} prompt tokens at {done.prompt_tokens / done.prefill_seconds:.1f} a second",
            f"{tokens} new at {done.steps / done.decode_seconds:.1f}" if done.steps else f"{tokens} new",
        ]
        if done.steps and self.weights.nbytes >= BEYOND_CACHES:
            reached = self.weights.nbytes * done.steps / done.decode_seconds
            roof = read_bandwidth(self.weights)
            parts.append(f"{reached / 1e9:.1f} GB/s, {reached / roof:.0%} of the {roof / 1e9:.1f} that reading gets")
        return ", ".join(parts)


class Session:
    """Questions to one model. options: as of Gemma2.generate, but for tokens and streams."""

    def __init__(self, model: Gemma2, options: Mapping[str, Any]) -> None:
        options = dict(options)
        self._model = model
        self._stop = options.pop("stop", [])
        self._max_new_tokens = options.pop("max_new_tokens")
        self._sampling = Sampling(**options)
        self._said: list[Mapping[str, str]] = []

    def ask(self, prompt: str, *, chat: bool, show: Callable[[str], object]) -> Answer:
        """The answer to one prompt, as plain text to continue or through the chat template."""
        text = self._model.text
        return self._answer(text.chat([_message(prompt)]) if chat else text.encode(prompt), show)

    def say(self, words: str, show: Callable[[str], object]) -> Answer:
        """The next turn of a conversation, which remembers what was said."""
        self._said.append(_message(words))
        answer = self._answer(self._model.text.chat(self._said), show)
        self._said.append({"role": "assistant", "content": answer.text})
        return answer

    def forget(self) -> None:
        self._said.clear()

    def _answer(self, tokens: list[int], show: Callable[[str], object]) -> Answer:
        model, pieces = self._model, Stream(self._model.text, self._stop)

        def on_token(row: int, token: int) -> bool:
            if token not in model.ends and (piece := pieces.push(token)):
                show(piece)
            return pieces.stopped

        done = model.run([tokens], self._sampling, Limits(self._max_new_tokens, model.ends, on_token))
        if rest := pieces.finish():
            show(rest)
        return Answer(pieces.whole, done, model.network.weights)


def _message(words: str) -> dict[str, str]:
    return {"role": "user", "content": words}
