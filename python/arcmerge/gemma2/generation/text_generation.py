"""Answers as text: generation whose tokens are heard one by one, with stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from arcmerge.gemma2.generation.generate import Generated, StoppingCriteria, generate
from arcmerge.gemma2.generation.sampler import SamplingParams
from arcmerge.gemma2.runtime.network import Network
from arcmerge.gemma2.text.stream import Stream
from arcmerge.gemma2.text.tokenizer import Gemma2Tokenizer


@dataclass(frozen=True)
class Answers:
    """texts: of every prompt's answer, without special tokens, what ended it, and what follows a stop string."""

    texts: list[str]
    generated: Generated


@torch.inference_mode()
def answer(
    network: Network,
    text: Gemma2Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    limits: StoppingCriteria,
    stops: Sequence[str] = (),
    show: Callable[[int, str], object] = lambda row, piece: None,
    draws: Sequence[int] | None = None,
) -> Answers:
    """Answers to prompts of tokens, which end where the limits say or with a stop string.

    stops: looked for in the text with its special tokens. show(row, piece): called with each new piece of an answer.
    draws: the `streams` of `generate`.
    Raises what `generate` raises.
    """
    streams = [Stream(text, stops) for _ in prompts]

    def on_token(row: int, token: int) -> bool:
        if token not in limits.ends and (piece := streams[row].push(token)):
            show(row, piece)
        return limits.on_token(row, token) or streams[row].stopped

    generated = generate(network, prompts, sampling, replace(limits, on_token=on_token), draws)
    for row, stream in enumerate(streams):
        if rest := stream.finish():
            show(row, rest)
    return Answers([stream.whole for stream in streams], generated)
