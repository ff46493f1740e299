"""The tied head of a Gemma-2 2.6B: the best id, the log-probability of an id, a draw; against all logits in torch.

Hidden states are rows of the embedding, so that each has one best id by far, however the logits are rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _gemma2_ops import FINAL_SOFTCAP, SIZES, Case, counted, normal, record
from torch import Tensor

from arcmerge import ops

SEED, TOP_K, TOP_P = 1, 64, 0.95


def logits(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(torch.nn.functional.linear(x, weight) / FINAL_SOFTCAP) * FINAL_SOFTCAP


def best(x: Tensor, weight: Tensor) -> Tensor:
    return ops.lm_head_argmax(x, weight, softcap=FINAL_SOFTCAP)


def best_of_logits(x: Tensor, weight: Tensor) -> Tensor:
    return logits(x, weight).argmax(dim=1)


def logprob(x: Tensor, weight: Tensor) -> Tensor:
    return ops.lm_head_logprob(x, weight, torch.arange(len(x)), softcap=FINAL_SOFTCAP)[0]


def logprob_of_logits(x: Tensor, weight: Tensor) -> Tensor:
    return logits(x, weight).float().log_softmax(dim=1)[torch.arange(len(x)), torch.arange(len(x))]


def draw(x: Tensor, weight: Tensor) -> Tensor:
    steps = torch.arange(len(x))
    filters = {"top_k": TOP_K, "top_p": TOP_P}
    return ops.lm_head_sample(x, weight, steps, seed=SEED, temperature=0.5, **filters, softcap=FINAL_SOFTCAP)


def draw_of_logits(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' warpers do it: temperature, top-k, top-p by a sort, then a draw."""
    scores = logits(x, weight).float() / 0.5
    scores = scores.masked_fill(scores < scores.topk(TOP_K).values[:, -1:], float("-inf"))
    ordered, order = scores.sort(descending=False)
    removed = ordered.softmax(dim=1).cumsum(dim=1) <= 1 - TOP_P
    scores = scores.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), float("-inf"))
    return torch.multinomial(scores.softmax(dim=1), 1)[:, 0]


def case(
    name: str, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], tokens: int, weight: Tensor, first: int
) -> Case:
    x = weight[first : first + tokens] * 12
    moved, operations = weight.nbytes + 2 * x.nbytes + 8 * tokens, 2 * tokens * weight.numel()
    return Case(f"{name}, {counted(tokens)}", ours, theirs, [(x, weight)], moved, operations, "torch")


def main() -> None:
    weight = normal(SIZES.vocab_size, SIZES.hidden_size, scale=SIZES.hidden_size**-0.5)
    kinds = (
        ("argmax", best, best_of_logits),
        ("logprob", logprob, logprob_of_logits),
        ("sample", draw, draw_of_logits),
    )
    record("lm_head", *(case(*kind, tokens, weight, 7) for kind in kinds for tokens in (1, 32)))


if __name__ == "__main__":
    main()
