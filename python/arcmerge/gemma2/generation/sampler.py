"""The choice of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arcmerge import ops
from arcmerge.errors import Problems
from arcmerge.gemma2.runtime.network import Network


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


class Sampler:
    """Chooses the next token of every sequence.

    Args:
        network: its lm_head computes the logits.
        params: how tokens are chosen.
        prompts: token ids, for the repetition penalty.
        random_streams: for each prompt, the index of the seed's stream of random numbers.
    """

    def __init__(
        self, network: Network, params: SamplingParams, prompts: Sequence[Sequence[int]], random_streams: Sequence[int]
    ) -> None:
        self._network = network
        self._params = params
        self._device = network.weights.norm.device
        self._steps = 0
        self._streams = torch.tensor(list(random_streams), dtype=torch.int64, device=self._device) << 32
        self._seen: Tensor | None = None
        if params.repetition_penalty != 1:
            # The 32nd bit is the sign of an int32.
            self._bits = torch.tensor([*(1 << bit for bit in range(31)), -(2**31)], dtype=torch.int32)
            words = -(-network.config.vocab_size // 32)
            self._seen = torch.zeros(len(prompts), words, dtype=torch.int32)
            for row, prompt in enumerate(prompts):
                for token in prompt:
                    self._seen[row, token // 32] |= self._bits[token % 32]
            self._seen, self._bits = self._seen.to(self._device), self._bits.to(self._device)

    @property
    def greedy(self) -> bool:
        """Whether `choose` takes what `Network.most_probable` returns."""
        return not self._params.draws and self._seen is None

    def choose(self, hidden: Tensor) -> Tensor:
        """The next token of each sequence, [B] int64 on the device, from its hidden states [B, hidden_size]."""
        network, params = self._network, self._params
        if self.greedy:
            return network.most_probable(hidden)
        chosen = ops.lm_head_sample(
            hidden,
            network.weights.lm_head,
            self._steps + self._streams,
            seed=params.seed or 0,
            temperature=params.temperature if params.draws else 0.0,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seen=self._seen,
            repetition_penalty=params.repetition_penalty,
            softcap=network.config.final_logit_softcapping,
            stepwise=network.stepwise,
        )
        self._steps += 1
        if self._seen is not None:
            words = (chosen // 32)[:, None]
            marked = self._seen.gather(1, words) | self._bits.index_select(0, chosen % 32)[:, None]
            self._seen.scatter_(1, words, marked)
        return chosen
