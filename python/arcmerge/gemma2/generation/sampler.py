"""How the next token is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arcmerge import ops
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.runtime.network import Network


@dataclass(frozen=True)
class SamplingParams:
    """Names and meanings as in transformers' generate, where filters apply in the order given here.

    do_sample: False takes the most probable token, the lowest number among equals. repetition_penalty: from 1, no
    penalty, up; applies to every token of prompt and answer. temperature: 0 takes the most probable token too. top_k:
    0 for all. top_p: 1 for all, 0 for the most probable token. min_p: 0 for all. seed: same seed, same tokens; every
    row of a batch has a stream of its own, the first that of a prompt alone. None: another for every call, from
    torch's generator.
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
            "temperature": (0 <= self.temperature < float("inf"), "from 0, which takes the most probable token, up"),
            "top_k": (
                type(self.top_k) is int and 0 <= self.top_k < 2**63,
                "a whole number from 0, which keeps all, to 2^63 - 1",
            ),
            "top_p": (0 <= self.top_p <= 1, "from 0, which takes the most probable token, to 1, which keeps all"),
            "min_p": (0 <= self.min_p <= 1, "from 0, which keeps all, to 1"),
            "seed": (
                self.seed is None or (type(self.seed) is int and 0 <= self.seed < 2**63),
                "a whole number from 0 to 2^63 - 1, or None",
            ),
        }
        problems = [
            f"'{name}' must be {rule}, is {getattr(self, name)!r:.80}."
            for name, (met, rule) in rules.items()
            if not met
        ]
        if problems:
            raise ArcmergeError(problems)

    @property
    def draws(self) -> bool:
        return self.do_sample and self.temperature > 0 and self.top_p > 0

    def seeded(self) -> SamplingParams:
        """With a seed, if tokens are drawn: torch.manual_seed settles it where it is not given."""
        if not self.draws or self.seed is not None:
            return self
        return replace(self, seed=int(torch.randint(2**48, ())))


class Sampler:
    """Chooses the next token of every sequence, and keeps what the choice depends on: tokens seen, tokens drawn."""

    def __init__(
        self, network: Network, sampling: SamplingParams, prompts: Sequence[Sequence[int]], streams: Sequence[int]
    ) -> None:
        self._network = network
        self._sampling = sampling
        self._device = network.weights.norm.device
        self._steps = 0
        self._streams = torch.tensor(list(streams), dtype=torch.int64, device=self._device) << 32
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            words = -(-network.config.vocab_size // 32)
            self._seen = torch.zeros(len(prompts), words, dtype=torch.int32)
            for row, prompt in enumerate(prompts):
                for token in prompt:
                    self._see(row, token)

    def choose(self, hidden: Tensor) -> list[int]:
        """A token for each row of hidden states [B, hidden_size]."""
        network, sampling = self._network, self._sampling
        head, softcap = network.weights.head, network.config.final_logit_softcapping
        if not sampling.draws and self._seen is None:
            chosen = ops.lm_head_argmax(hidden, head, softcap=softcap, stepwise=network.stepwise)
        else:
            chosen = ops.lm_head_sample(
                hidden,
                head,
                self._steps + self._streams,
                seed=sampling.seed or 0,
                temperature=sampling.temperature if sampling.draws else 0.0,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seen=None if self._seen is None else self._seen.to(self._device),
                repetition_penalty=sampling.repetition_penalty,
                softcap=softcap,
                stepwise=network.stepwise,
            )
        self._steps += 1
        tokens: list[int] = chosen.tolist()
        if self._seen is not None:
            for row, token in enumerate(tokens):
                self._see(row, token)
        return tokens

    def _see(self, row: int, token: int) -> None:
        assert self._seen is not None
        bit = token % 32
        # The 32nd bit is the sign of an int32.
        self._seen[row, token // 32] |= 1 << bit if bit < 31 else -(2**31)
