"""Candidates of a 2.6B merge an hour: merged and scored in memory, against mergekit and transformers for each.

    python benchmarks/sweep.py                    makes the pair in .bench/ (10.5 GB) the first time; needs 16 GB there
    python benchmarks/sweep.py --tiny             tries everything out on tiny models and records nothing

A candidate is a t, scored on 2,000 tokens in windows of 500. `set_t` is compared with the time that memory takes to
read both parents and write the result, measured right before it. Nothing is recorded unless both programs give the last
t the same score.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import sysconfig
import time
from pathlib import Path

from _bench import HERE, append, provenance, run_process, warm
from full_size_pair import TINY, Geometry, make_pair
from merge import RECIPE

TS = (0.3, 0.6)
AGREEMENT = 0.005  # of the mean negative log-probability: bf16 rounds every step of transformers


def worker(*arguments: str) -> tuple[dict[str, object], float]:
    """The figures that a worker prints, and its peak of anonymous memory in MB."""
    usage = run_process([sys.executable, str(HERE / "sweep_worker.py"), *arguments])
    return json.loads(usage.output.splitlines()[-1]), usage.peak_anonymous_mb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where the pair and the output lie")
    parser.add_argument("--tiny", action="store_true", help="tiny models; nothing is recorded")
    arguments = parser.parse_args()
    name = "tiny" if arguments.tiny else "2.6B"
    folder = arguments.folder.resolve() / name
    a, b = make_pair(folder, TINY if arguments.tiny else Geometry())
    recipe, out = folder / "candidate.yml", folder / "candidate"
    recipe.write_text(RECIPE.format(a=a, b=b, t=TS[-1]))
    origin = provenance("arcmerge", "mergekit", "torch", "transformers")
    warm([*sorted(a.glob("*.safetensors")), *sorted(b.glob("*.safetensors"))])

    # The first candidate is left out, because its t is that of the recipe and set_t has nothing to merge.
    ours, our_memory = worker("arcmerge", str(recipe), *map(str, (TS[-1], *TS)))
    seconds = [merge + score for merge, score in zip(ours["set_t"], ours["scoring"], strict=True)][1:]
    ratios = [merge / floor for merge, floor in zip(ours["set_t"], ours["floor"], strict=True)][1:]

    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    scripts = sysconfig.get_path("scripts")
    run_process([f"{scripts}/mergekit-yaml", str(recipe), str(out)], {**os.environ, "HF_HUB_OFFLINE": "1"})
    merged = time.perf_counter() - started
    theirs, their_memory = worker("transformers", str(out))
    whole = time.perf_counter() - started
    shutil.rmtree(out)

    scores = ours["scores"][-1], theirs["scores"][0]
    if not abs(scores[0] - scores[1]) <= AGREEMENT * scores[1]:
        sys.exit(
            f"the scores differ: {scores[0]:.4f} of arcmerge, {scores[1]:.4f} of transformers; nothing was recorded"
        )
    rows = [
        {
            **origin,
            "model": name,
            "provider": "arcmerge",
            "open_seconds": round(ours["open"], 2),
            "merge_seconds": round(statistics.median(ours["set_t"][1:]), 3),
            "merge_of_floor": round(statistics.median(ratios), 3),
            "candidate_seconds": round(statistics.median(seconds), 2),
            "score": round(scores[0], 5),
            "peak_anonymous_mb": round(our_memory),
        },
        {
            **origin,
            "model": name,
            "provider": "mergekit + transformers",
            "open_seconds": round(theirs["open"], 2),
            "merge_seconds": round(merged, 3),
            "merge_of_floor": None,
            "candidate_seconds": round(whole, 2),
            "score": round(scores[1], 5),
            "peak_anonymous_mb": round(their_memory),
        },
    ]
    for row in rows:
        print(
            f"{row['provider']:<26}a candidate {row['candidate_seconds']:8.1f} s, merging {row['merge_seconds']} s "
            f"({row['merge_of_floor']} of the floor), score {row['score']}"
        )
    if not arguments.tiny:
        print(f"recorded in {append('sweep', rows)}")


if __name__ == "__main__":
    main()
