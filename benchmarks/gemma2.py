"""Running a 2.6B Gemma-2 on the CPU: prefill, decode, memory and scores, against transformers and llama.cpp.

    python benchmarks/gemma2.py                    makes the model in .bench/ (5.2 GB) the first time
    python benchmarks/gemma2.py --tiny             tries everything out on a tiny model and records nothing
    python benchmarks/gemma2.py --llama-bench PATH --gguf PATH         also run llama.cpp's benchmark

`accelerated` is transformers with our ops inside. Tasks: `speed`, a prompt of 512 tokens and 16 steps of decoding
after it; `memory`, a prompt of 2,048 and four steps; `score`, the last 32 tokens of sequences of 512. Every run is a
process of its own, and providers take turns. The roofs of prefill and decode, torch.mm and reading the weights, are
measured in arcmerge's own runs, after it.

Nothing is recorded unless arcmerge and transformers agree on the scores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from _bench import HERE, append, interleaved, provenance, run_process, warm
from full_size_pair import TINY, Geometry, make_pair
from gemma2_worker import CONTEXT, STEPS, TASKS

ROUNDS = 3
# bf16 rounds transformers' every step: of log-probabilities of some -12 a token by a few thousandths on average.
AGREEMENT = 0.01
COLUMNS = (
    "open_seconds",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "gflop_per_s_of_torch",
    "read_gb_per_s",
    "score_seconds",
    "logprob",
    "peak_anonymous_mb",
)

Row = Mapping[str, object]


def worker(provider: str, model: Path, task: str, sequences: int) -> dict[str, float]:
    """The figures of one run, with the peak of its anonymous memory."""
    command = [sys.executable, str(HERE / "gemma2_worker.py"), provider, str(model), task, "--sequences"]
    usage = run_process([*command, str(sequences)])
    return {**json.loads(usage.output.splitlines()[-1]), "peak_anonymous_mb": usage.peak_anonymous_mb}


def llama_bench(program: Path, gguf: Path, threads: int) -> dict[str, float]:
    """llama.cpp's own figures for the same prompt and steps."""

    def rate(*options: str) -> float:
        command = [str(program), "-m", str(gguf), "-t", str(threads), "-r", "1", "-o", "json", *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout)[0]["avg_ts"])

    return {
        "prefill_tokens_per_s": rate("-p", str(CONTEXT), "-n", "0"),
        "decode_tokens_per_s": rate("-p", "0", "-n", str(STEPS), "-d", str(CONTEXT)),
    }


def check_agreement(rows: Sequence[Row]) -> None:
    """Raise SystemExit unless all providers found the same scores, up to rounding."""
    found = {str(row["provider"]): float(str(row["logprob"])) for row in rows if row.get("logprob") is not None}
    first = next(iter(found.values()), 0.0)
    for name, logprob in found.items():
        if not abs(logprob - first) <= AGREEMENT * abs(first):
            sys.exit(f"{name} disagrees on the scores: {found}; nothing was recorded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where the model lies")
    parser.add_argument("--tiny", action="store_true", help="a tiny model; nothing is recorded")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each provider (default {ROUNDS})")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="these alone")
    parser.add_argument("--sequences", type=int, default=8, help="that are scored (default 8)")
    parser.add_argument("--only", nargs="+", metavar="PROVIDER", help="these alone; nothing is recorded")
    parser.add_argument("--llama-bench", type=Path, help="the program of that name, of llama.cpp")
    parser.add_argument("--gguf", type=Path, help="the same model for it")
    arguments = parser.parse_args()
    if (arguments.llama_bench is None) != (arguments.gguf is None):
        parser.error("--llama-bench and --gguf go together")

    name = "tiny" if arguments.tiny else "2.6B"
    geometry = TINY if arguments.tiny else Geometry()
    model, _ = make_pair(arguments.folder.resolve() / name, geometry)
    origin = provenance("arcmerge", "torch", "transformers")
    threads = len(os.sched_getaffinity(0))
    providers = ["arcmerge", "transformers", "accelerated", *(["llama.cpp"] if arguments.gguf else [])]
    jobs = [
        (provider, task)
        for task in arguments.tasks
        for provider in providers
        if provider in (arguments.only or providers) and (task == "speed" or provider != "llama.cpp")
    ]
    warm([*sorted(model.glob("*.safetensors")), *([arguments.gguf] if arguments.gguf else [])])
    rows: list[Row] = []
    for number, (provider, task) in interleaved(jobs, arguments.rounds):
        if provider == "llama.cpp":
            figures = llama_bench(arguments.llama_bench, arguments.gguf, threads)
        else:
            figures = worker(provider, model, task, arguments.sequences)
        said = ", ".join(f"{key} {value:.2f}" for key, value in figures.items())
        print(f"round {number + 1}  {task:<8}{provider:<14}{said}", flush=True)
        columns = {key: round(figures[key], 4) if key in figures else None for key in COLUMNS}
        run = {"model": name, "provider": provider, "task": task, "sequences": arguments.sequences}
        rows.append({**origin, **run, **columns})
    check_agreement(rows)
    if not arguments.tiny and not arguments.only:
        print(f"recorded in {append('gemma2', rows)}")


if __name__ == "__main__":
    main()
