"""One run of one provider on one task, in a process of its own; prints a JSON object of figures.

python benchmarks/gemma2_worker.py PROVIDER MODEL TASK [--sequences N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

CONTEXT, STEPS = 512, 16
LONG_CONTEXT = 2048
SCORED = 32

Figures = dict[str, float]


def prompt(length: int, seed: int, vocabulary: int) -> list[int]:
    """BOS and random token ids, because the weights are random too."""
    choose = random.Random(seed)
    return [2, *(choose.randrange(3, vocabulary) for _ in range(length - 1))]


class Arcmerge:
    def __init__(self, model: Path) -> None:
        from arcmerge import Gemma2

        started = time.perf_counter()
        self.model = Gemma2.from_pretrained(model, device="cpu")
        self.open_seconds = time.perf_counter() - started
        self.vocabulary = self.model.config.vocab_size

    def generate(self, tokens: list[int], steps: int) -> tuple[float, float]:
        """Seconds for the prompt, and for `steps` tokens after it."""
        from arcmerge.gemma2.generation.generate import StoppingCriteria
        from arcmerge.gemma2.generation.sampler import SamplingParams

        done = self.model.generate_batch([tokens], SamplingParams(), StoppingCriteria(steps + 1, ()))
        return done.prefill_seconds, done.decode_seconds

    def score(self, sequences: list[list[int]]) -> list[float]:
        return [one.logprob for one in self.model.score([(each[:-SCORED], each[-SCORED:]) for each in sequences])]


class Transformers:
    """transformers in eager mode, its default for Gemma-2 on the CPU."""

    def __init__(self, model: Path) -> None:
        from transformers import Gemma2ForCausalLM

        started = time.perf_counter()
        self.model = Gemma2ForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="eager").eval()
        self.open_seconds = time.perf_counter() - started
        self.vocabulary = self.model.config.vocab_size

    def generate(self, tokens: list[int], steps: int) -> tuple[float, float]:
        from transformers import DynamicCache

        cache, fed, seconds = DynamicCache(config=self.model.config), torch.tensor([tokens]), []
        for _ in range(steps + 1):
            started = time.perf_counter()
            logits = self.model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            fed = logits[:, -1:].argmax(dim=-1)
            seconds.append(time.perf_counter() - started)
        return seconds[0], sum(seconds[1:])

    def score(self, sequences: list[list[int]]) -> list[float]:
        """All logits of a batch, then their log-softmax, as HFLM of lm-eval computes them."""
        found = []
        for batch in torch.tensor(sequences).split(4):
            logits = self.model(input_ids=batch).logits.float().log_softmax(dim=-1)
            chosen = logits[:, -SCORED - 1 : -1].gather(2, batch[:, -SCORED:, None])
            found += chosen.sum(dim=(1, 2)).tolist()
        return found


class Accelerated(Transformers):
    """transformers with arcmerge's ops."""

    def __init__(self, model: Path) -> None:
        from arcmerge.integrations.transformers import accelerate

        super().__init__(model)
        accelerate(self.model)


PROVIDERS: dict[str, Callable[[Path], Arcmerge | Transformers]] = {
    "arcmerge": Arcmerge,
    "transformers": Transformers,
    "accelerated": Accelerated,
}


def speed(provider: Arcmerge | Transformers, sequences: int) -> Figures:
    """A prompt of CONTEXT tokens, then STEPS of decoding, after a warm-up step."""
    provider.generate(prompt(8, 0, provider.vocabulary), 1)
    prefill, decode = provider.generate(prompt(CONTEXT, 1, provider.vocabulary), STEPS)
    figures = {"prefill_tokens_per_s": CONTEXT / prefill, "decode_tokens_per_s": STEPS / decode}
    if isinstance(provider, Arcmerge):
        figures |= {"gflop_per_s_of_torch": products_of_torch(), "read_gb_per_s": read_of_memory(provider)}
    return figures


def memory(provider: Arcmerge | Transformers, sequences: int) -> Figures:
    """A long prompt and a few steps, while the parent process samples the memory of this one."""
    provider.generate(prompt(LONG_CONTEXT, 1, provider.vocabulary), 4)
    return {}


def scores(provider: Arcmerge | Transformers, sequences: int) -> Figures:
    """The last SCORED tokens of sequences of CONTEXT tokens."""
    every = [prompt(CONTEXT, seed, provider.vocabulary) for seed in range(sequences)]
    started = time.perf_counter()
    found = provider.score(every)
    return {"score_seconds": time.perf_counter() - started, "logprob": sum(found) / len(found)}


TASKS = {"speed": speed, "memory": memory, "score": scores}


def products_of_torch() -> float:
    """GFLOP/s of torch.mm on square matrices in the faster of bf16 and f32: the upper bound of prefill."""
    size, best = 2048, 0.0
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        for _ in range(4):
            started = time.perf_counter()
            torch.mm(a[: size // 4], b.T)
            best = max(best, 2 * size**3 / 4 / (time.perf_counter() - started) / 1e9)
    return best


def read_of_memory(provider: Arcmerge) -> float:
    from arcmerge.gemma2.runtime.bandwidth import read_bandwidth

    return read_bandwidth(provider.model.network.weights) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("model", type=Path)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--sequences", type=int, default=8)
    arguments = parser.parse_args()
    with torch.inference_mode():
        provider = PROVIDERS[arguments.provider](arguments.model)
        figures = TASKS[arguments.task](provider, arguments.sequences)
    print(json.dumps({"open_seconds": provider.open_seconds, **figures}))


if __name__ == "__main__":
    main()
