"""Generation of text: token ids are decoded as they come, and stop strings end an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from arcmerge.gemma2.generation.generate import Generated, StoppingCriteria, generate
from arcmerge.gemma2.generation.sampler import SamplingParams
from arcmerge.gemma2.runtime.network import Network
from arcmerge.gemma2.text.prompts import Prompts
from arcmerge.gemma2.text.streamer import TextStreamer
from arcmerge.gemma2.text.tokenizer import Gemma2Tokenizer


@dataclass(frozen=True)
class GeneratedText:
    """The result of `generate_text`.

    Attributes:
        texts: the answers, without special tokens, and without a stop string and the text after it.
        generated: the answers as token ids, with timings.
    """

    texts: list[str]
    generated: Generated


@torch.inference_mode()
def generate_text(
    network: Network,
    tokenizer: Gemma2Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    stopping_criteria: StoppingCriteria,
    stop_strings: Sequence[str] = (),
    on_text: Callable[[int, str], object] = lambda row, text: None,
    random_streams: Sequence[int] | None = None,
) -> GeneratedText:
    """Generate the text of an answer to each prompt.

    Args:
        network: the model.
        tokenizer: decodes the answers.
        prompts: token ids, one or more each.
        sampling_params: how tokens are chosen.
        stopping_criteria: when answers end.
        stop_strings: end an answer too; they may include the text of special tokens, as "<end_of_turn>".
        on_text: called with the index of the prompt and each new piece of text of its answer.
        random_streams: as in `generate`.

    Raises:
        ArcmergeError: see `generate`.
    """
    streamers = [TextStreamer(tokenizer, stop_strings) for _ in prompts]

    def on_token(row: int, token: int) -> bool:
        if token not in stopping_criteria.stop_token_ids and (text := streamers[row].push(token)):
            on_text(row, text)
        return stopping_criteria.on_token(row, token) or streamers[row].stopped

    criteria = replace(stopping_criteria, on_token=on_token)
    generated = generate(network, prompts, sampling_params, criteria, random_streams)
    for row, streamer in enumerate(streamers):
        if rest := streamer.finish():
            on_text(row, rest)
    return GeneratedText([streamer.text for streamer in streamers], generated)


@torch.inference_mode()
def generate_answers(
    network: Network,
    tokenizer: Callable[[], Gemma2Tokenizer],
    prompts: Prompts,
    sampling_params: SamplingParams,
    stopping_criteria: StoppingCriteria,
    stop_strings: Sequence[str],
    stream: Callable[[Any], object] | None,
) -> tuple[Generated, Sequence[str]]:
    """Generate an answer to each prompt, text or token ids. The answers have a text if prompts or stop strings do.

    tokenizer: opens the tokenizer; not called without text. stream: called with each new piece of text of the answers
    to text, or with each new token of other answers.
    """

    def on_text(_: int, text: str) -> None:
        if stream is not None and prompts.is_text:
            stream(text)

    def on_token(_: int, token: int) -> bool:
        if stream is not None and not prompts.is_text:
            stream(token)
        return False

    criteria = replace(stopping_criteria, on_token=on_token)
    if not (prompts.is_text or stop_strings):
        return generate(network, prompts.rows, sampling_params, criteria), ()
    result = generate_text(network, tokenizer(), prompts.rows, sampling_params, criteria, stop_strings, on_text)
    return result.generated, result.texts
