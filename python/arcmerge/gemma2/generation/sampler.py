"""The choice of the next token."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from arcmerge import ops
from arcmerge.errors import Problems
from arcmerge.gemma2.runtime.network import Network
from arcmerge.ops.lm_head_sample import draw_numbers


@dataclass(frozen=True)
class SamplingParams:
    """Options of sampling, with the names and meanings of transformers' generate; filters apply in this order.

    Args:
        do_sample: False takes the most probable token, of several the one with the lowest id.
        repetition_penalty: applies to every token of prompt and answer; 1: no penalty.
        temperature: 0 takes the most probable token.
        top_k: 0 keeps all tokens.
        top_p: 1 keeps all tokens, 0 only the most probable one.
        min_p: 0 keeps all tokens.
        seed: the same seed gives the same tokens. Every prompt of a batch has a stream of random numbers of its own,
            the first one that of a single prompt. None: a new seed for every call, from torch's generator.

    Raises:
        ArcmergeError: naming every value that is out of range.
    """

    do_sample: bool = False
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (
                type(self.top_k) is int and 0 <= self.top_k < 2**63,
                "a whole number from 0 (all tokens) to 2^63 - 1",
            ),
            "top_p": (0 <= self.top_p <= 1, "from 0 (greedy) to 1 (all tokens)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            "seed": (
                self.seed is None or (type(self.seed) is int and 0 <= self.seed < 2**63),
                "a whole number from 0 to 2^63 - 1, or None",
            ),
        }
        problems = Problems()
        for name, (met, rule) in rules.items():
            if not met:
                problems.add(f"'{name}' must be {rule}, got {getattr(self, name)!r:.80}")
        problems.raise_if_any()

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.do_sample and self.temperature > 0 and self.top_p > 0

    def seeded(self) -> SamplingParams:
        """These options with a seed, if tokens are drawn; a missing one comes from torch's generator."""
        if not self.draws or self.seed is not None:
            return self
        return replace(self, seed=int(torch.randint(2**48, ())))


class Kind(NamedTuple):
    """What a choice of tokens computes, whatever its numbers are: one CUDA graph serves all samplers of a kind."""

    draws: bool
    filters: bool
    penalises: bool


GREEDY = Kind(draws=False, filters=False, penalises=False)


class Sampler:
    """Chooses the next token of every sequence.

    What changes from step to step, and all numbers of the options, are in tensors that `choose` reads and changes in
    place, so that a CUDA graph can repeat it.

    Args:
        network: its lm_head computes the logits.
        params: how tokens are chosen.
        prompts: token ids, for the repetition penalty.
        random_streams: for each prompt, the index of the seed's stream of random numbers.

    Attributes:
        kind: of the choice.
    """

    def __init__(
        self, network: Network, params: SamplingParams, prompts: Sequence[Sequence[int]], random_streams: Sequence[int]
    ) -> None:
        self._network = network
        device = network.weights.norm.device
        filters = bool(params.top_k or 0 < params.top_p < 1 or params.min_p)
        self.kind = Kind(params.draws, params.draws and filters, params.repetition_penalty != 1)
        self._numbers = self._seed = self._steps = self._seen = self._bits = torch.empty(0)
        if self.kind == GREEDY:
            return
        numbers = draw_numbers(params.temperature, params.repetition_penalty, params.top_k, params.top_p, params.min_p)
        streams = torch.tensor(list(random_streams), dtype=torch.int64) << 32
        # Memory that is not pinned is read before the call returns, and the host waits for nothing.
        self._numbers = numbers.to(device, non_blocking=True)
        self._seed = torch.tensor([params.seed or 0]).to(device, non_blocking=True)
        self._steps = streams.to(device, non_blocking=True)
        if self.kind.penalises:
            # The 32nd bit is the sign of an int32.
            bits = torch.tensor([*(1 << bit for bit in range(31)), -(2**31)], dtype=torch.int32)
            seen = torch.zeros(len(prompts), -(-network.config.vocab_size // 32), dtype=torch.int32)
            for row, prompt in enumerate(prompts):
                for token in prompt:
                    seen[row, token // 32] |= bits[token % 32]
            self._seen, self._bits = seen.to(device, non_blocking=True), bits.to(device, non_blocking=True)

    @property
    def is_capturable(self) -> bool:
        """Whether `choose` may be captured in a CUDA graph: the reference of a draw reads numbers on the host."""
        return self.kind == GREEDY or ops.lm_head_draw.backend("cuda") == "triton"

    def _state(self) -> Iterator[Tensor]:
        """What differs between samplers of a kind."""
        yield from (self._numbers, self._seed, self._steps, self._seen)

    def blank(self, rows: int) -> Sampler:
        """A sampler of this kind for so many sequences, which does not keep the model. `load` fills its tensors."""
        blank = copy(self)
        blank._network = cast(Network, weakref.proxy(self._network))
        blank._numbers, blank._seed = torch.ones_like(self._numbers), torch.zeros_like(self._seed)
        blank._steps, blank._seen = (
            states.new_zeros(rows if len(states) else 0, *states.shape[1:]) for states in (self._steps, self._seen)
        )
        return blank

    def load(self, other: Sampler) -> None:
        """Go on where another sampler of this kind is, for its sequences."""
        for own, states in zip(self._state(), other._state(), strict=True):
            own[: len(states)].copy_(states)

    def choose(self, hidden: Tensor) -> Tensor:
        """The next token of each sequence, [B] int64 on the device, from its hidden states [B, hidden_size]."""
        network, kind = self._network, self.kind
        if kind == GREEDY:
            return network.most_probable(hidden)
        chosen = ops.lm_head_draw(
            hidden,
            network.weights.lm_head,
            self._steps,
            self._seed,
            self._numbers,
            draws=kind.draws,
            filters=kind.filters,
            seen=self._seen if kind.penalises else None,
            softcap=network.config.final_logit_softcapping,
            stepwise=network.stepwise,
        )
        self._steps += 1
        if kind.penalises:
            words = (chosen // 32)[:, None]
            marked = self._seen.gather(1, words) | self._bits.index_select(0, chosen % 32)[:, None]
            self._seen.scatter_(1, words, marked)
        return chosen
