"""A model being asked by a person: answers as they come, and how fast they came."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from arcmerge.errors import counted
from arcmerge.gemma2.arguments import read_strings
from arcmerge.gemma2.generation.generate import Generated, StoppingCriteria
from arcmerge.gemma2.generation.text_generation import answer
from arcmerge.gemma2.model import Gemma2
from arcmerge.gemma2.runtime.bandwidth import read_bandwidth
from arcmerge.gemma2.weights import Weights

# Bytes of weights from which decoding waits for memory; a smaller model's stay in the caches, and a share of its
# bandwidth says nothing.
BEYOND_CACHES = 1 << 28


@dataclass(frozen=True)
class Answer:
    """text: without special tokens and what follows a stop string. weights: of the model. notes: sentences about what
    had no room in the model's context.
    """

    text: str
    generated: Generated
    weights: Weights
    notes: list[str]

    def summary(self) -> str:
        """One line: tokens, tokens a second, the seed of draws, the share of memory bandwidth that decoding reached."""
        done = self.generated
        prompt, tokens = counted(done.prompt_tokens, "prompt token"), len(done.tokens[0])
        parts = [
            f"{prompt} at {done.prompt_tokens / done.prefill_seconds:.1f} a second",
            f"{tokens} new at {done.steps / done.decode_seconds:.1f}" if done.steps else f"{tokens} new",
        ]
        if done.seed is not None:
            parts.append(f"seed {done.seed}")
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
        seed, stop = options.pop("seed", None), options.pop("stop", None)
        self._options = model.generation_config.changed(options)
        self._sampling = self._options.sampling(seed)
        self._stops = read_strings("stop", (self._options.stop_strings or ()) if stop is None else stop)
        self._options.require_lengths()
        self._said: list[Mapping[str, str]] = []

    def require_template(self) -> None:
        """Raises ArcmergeError if the model has no chat template."""
        _ = self._model.text.template

    def ask(self, prompt: str, *, chat: bool, show: Callable[[str], object]) -> Answer:
        """The answer to one prompt, as plain text to continue or through the chat template."""
        text = self._model.text
        return self._answer(text.chat([_message(prompt)]) if chat else text.encode(prompt), chat, show)

    def say(self, words: str, show: Callable[[str], object]) -> Answer:
        """The next turn of a conversation, which remembers what was said before.

        The oldest turns are forgotten where the conversation no longer fits. A turn that raises is not remembered.
        """
        said = [*self._said, _message(words)]
        tokens = self._model.text.chat(said)
        while len(tokens) > self._most_tokens and len(said) > 1:
            said = said[2:]  # a question and its answer
            tokens = self._model.text.chat(said)
        answered = self._answer(tokens, True, show)
        if turns := (len(self._said) + 1 - len(said)) // 2:
            what = "oldest turn was" if turns == 1 else f"{turns} oldest turns were"
            answered.notes.insert(0, f"the conversation no longer fits into the model's context: its {what} forgotten")
        self._said = [*said, {"role": "assistant", "content": answered.text}]
        return answered

    def forget(self) -> None:
        self._said.clear()

    @property
    def _most_tokens(self) -> int:
        """Of a conversation: the rest is for the answer, at most a quarter of the context."""
        context = self._model.config.max_position_embeddings
        return context - min(self._options.most_new_tokens, context // 4)

    def _answer(self, tokens: list[int], chat: bool, show: Callable[[str], object]) -> Answer:
        model = self._model
        ends = model.ends | model.text.ends_of_turn if chat else model.ends
        limits = StoppingCriteria(self._options.new_tokens_after(len(tokens)), ends)
        found = answer(
            model.network, model.text, [tokens], self._sampling, limits, self._stops, lambda _, piece: show(piece)
        )
        notes = [found.generated.cut_sentence(model.config.max_position_embeddings)] if found.generated.cut else []
        return Answer(found.texts[0], found.generated, model.network.weights, notes)


def _message(words: str) -> dict[str, str]:
    return {"role": "user", "content": words}
