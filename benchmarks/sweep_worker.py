"""Candidates of a merge in a process of its own; prints a JSON object of figures.

    python benchmarks/sweep_worker.py arcmerge RECIPE T...       merged in memory, each t scored
    python benchmarks/sweep_worker.py transformers MODEL         a merged folder, loaded and scored

The score is the mean negative log-probability of 2,000 random tokens, in windows of 500 after a BOS each.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from gemma2_worker import prompt

TOKENS, WINDOW = 2000, 500
FLOOR_BYTES = 1 << 30


def windows(vocabulary: int) -> list[list[int]]:
    every = prompt(TOKENS + 1, 3, vocabulary)[1:]
    return [[2, *every[start : start + WINDOW]] for start in range(0, TOKENS, WINDOW)]


def of_arcmerge(recipe: str, ts: list[float]) -> dict[str, object]:
    from arcmerge import Gemma2

    started = time.perf_counter()
    model = Gemma2.from_merge(recipe, "cpu")
    opened = time.perf_counter() - started
    read_bytes = 2 * model.network.weights.nbytes
    texts = [(window[:1], window[1:]) for window in windows(model.config.vocab_size)]
    merging, floors, scoring, scores = [], [], [], []
    for t in ts:
        floors.append(floor(read_bytes))
        started = time.perf_counter()
        model.set_t(t)
        merged = time.perf_counter()
        scores.append(-sum(one.logprob for one in model.score(texts)) / TOKENS)
        merging.append(merged - started)
        scoring.append(time.perf_counter() - merged)
    return {"open": opened, "set_t": merging, "floor": floors, "scoring": scoring, "scores": scores}


def floor(read_bytes: int) -> float:
    """Seconds to read the parents and write half as much at the current memory bandwidth."""
    from arcmerge import _C

    memory = torch.ones(FLOOR_BYTES // 4)
    started = time.perf_counter()
    _C.read(memory.data_ptr(), memory.nbytes)
    read = time.perf_counter()
    memory.fill_(2.0)
    written = time.perf_counter()
    return (read - started) / FLOOR_BYTES * read_bytes + (written - read) / FLOOR_BYTES * read_bytes / 2


def of_transformers(folder: str) -> dict[str, object]:
    from transformers import Gemma2ForCausalLM

    started = time.perf_counter()
    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    opened, total = time.perf_counter() - started, 0.0
    for window in windows(model.config.vocab_size):
        logits = model(input_ids=torch.tensor([window])).logits[0, :-1].float().log_softmax(dim=-1)
        total -= float(logits.gather(1, torch.tensor(window[1:])[:, None]).sum())
    return {"open": opened, "scoring": [time.perf_counter() - started - opened], "scores": [total / TOKENS]}


if __name__ == "__main__":
    provider, subject, *ts = sys.argv[1:]
    with torch.inference_mode():
        found = of_arcmerge(subject, [float(t) for t in ts]) if provider == "arcmerge" else of_transformers(subject)
    print(json.dumps(found))
