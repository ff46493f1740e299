"""lm-eval on a local task with a 2.6B, by arcmerge and by lm-eval's own model for transformers.

    python benchmarks/lm_eval_tasks.py --tokenizer FOLDER      makes the model in .bench/ (5.2 GB) the first time

FOLDER holds Gemma-2's tokenizer.json and tokenizer_config.json. The task is multiple choice: questions of real text,
four answers each. Weights are random, so accuracies mean nothing but that they are equal. Time is that of the
evaluation; memory is what it takes beyond the loaded model. Nothing is recorded unless both find the same
log-likelihoods.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import yaml

from _bench import HERE, anonymous_mb, append, provenance, run_process, warm
from full_size_pair import Geometry, make_pair

QUESTIONS, CHOICES = 4, 4
AGREEMENT = 0.01  # of the sum of all log-likelihoods: bf16 rounds every step of transformers
PROVIDERS = ("arcmerge", "hf")


def make_task(folder: Path) -> None:
    """Questions of about sixty words, with answers of one to twelve words."""
    words = " ".join(topics[name] for name in sorted(topics)).split()
    lines = []
    for number in range(QUESTIONS):
        place = 500 * number
        starts = [place + 100 + 20 * choice for choice in range(CHOICES)]
        choices = [" " + " ".join(words[start : start + 1 + start % 12]) for start in starts]
        lines.append({"question": " ".join(words[place : place + 60]), "choices": choices, "answer": number % CHOICES})
    folder.mkdir(exist_ok=True)
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "local.yaml").write_text(yaml.safe_dump(task))


def evaluate(provider: str, model: str, tasks: str) -> dict[str, float]:
    """Runs in a process of its own and prints the figures for `measure`."""
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    if provider == "arcmerge":
        from arcmerge.integrations.lm_eval import ArcmergeLM

        loaded: Any = ArcmergeLM(pretrained=model, device="cpu")
    else:
        from lm_eval.models.huggingface import HFLM

        loaded = HFLM(model, device="cpu", dtype="bfloat16", batch_size=4, attn_implementation="eager")
    manager = TaskManager(include_path=tasks, include_defaults=False)
    assert loaded.tokenizer_name  # which opens ours; theirs is open
    before, started = anonymous_mb(os.getpid()), time.perf_counter()
    with torch.inference_mode():
        found = lm_eval.simple_evaluate(model=loaded, tasks=["local"], task_manager=manager, bootstrap_iters=0)
    seconds = time.perf_counter() - started
    scores = [float(one[0]) for sample in found["samples"]["local"] for one in sample["filtered_resps"]]
    return {"seconds": seconds, "before": before, "acc": found["results"]["local"]["acc,none"], "sum": sum(scores)}


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] in PROVIDERS:
        print(json.dumps(evaluate(*sys.argv[1:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where the model lies")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve() / "2.6B"
    weights, _ = make_pair(folder, Geometry())
    model, tasks = folder / "with-tokenizer", folder / "tasks"
    model.mkdir(exist_ok=True)
    names = ("tokenizer.json", "tokenizer_config.json")
    for file in (*weights.iterdir(), *(arguments.tokenizer.resolve() / name for name in names)):
        if not (model / file.name).exists():
            (model / file.name).symlink_to(file)
    make_task(tasks)
    warm(sorted(model.glob("*.safetensors")))
    origin, rows = provenance("arcmerge", "torch", "transformers", "lm_eval"), []
    for provider in PROVIDERS:
        usage = run_process([sys.executable, str(HERE / "lm_eval_tasks.py"), provider, str(model), str(tasks)])
        found = json.loads(usage.output.splitlines()[-1])
        extra = usage.peak_anonymous_mb - found["before"]
        print(f"{provider:<10}{found['seconds']:8.1f} s, {extra:6.0f} MB, acc {found['acc']}, sum {found['sum']:.2f}")
        rows.append(
            {
                **origin,
                "provider": provider,
                "questions": QUESTIONS,
                "seconds": round(found["seconds"], 2),
                "extra_mb": round(extra),
                "acc": found["acc"],
                "log_likelihood": round(found["sum"], 3),
            }
        )
    ours, theirs = (float(row["log_likelihood"]) for row in rows)
    if rows[0]["acc"] != rows[1]["acc"] or not abs(ours - theirs) <= AGREEMENT * abs(theirs):
        sys.exit("the two disagree; nothing was recorded")
    print(f"recorded in {append('lm_eval_tasks', rows)}")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
