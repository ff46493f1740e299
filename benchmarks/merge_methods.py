"""Merge two 2.6B checkpoints and their base by methods that trim and mask, compared with multislerp of the same three.

    python benchmarks/merge_methods.py                       makes A, B and C in .bench/ (15.7 GB) the first time
    python benchmarks/merge_methods.py --mergekit ties       also runs mergekit once for these methods: minutes each
    python benchmarks/merge_methods.py --tiny                tries everything out on tiny models; records nothing

Runs are prepared as in benchmarks/merge.py. multislerp reads the same three checkpoints twice, as the other methods
do, and is the measure of what they add. mergekit 0.1.5 runs on the CPU, in the way it is fastest there.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from _bench import append, interleaved, provenance
from full_size_pair import TINY, Geometry, make_models
from merge import SCRIPTS, Provider, file_system, measure, remove

ROUNDS = 3
METHODS = {
    "multislerp": {},
    "ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
}


def recipe(method: str, models: list[Path], folder: Path) -> Path:
    """A recipe of three models, the first of which is the base."""
    base, *others = models
    lines = [f"merge_method: {method}", f"base_model: {base}", "dtype: bfloat16", "models:"]
    for weight, model in zip((0.6, 0.5), others, strict=True):
        parameters = ", ".join(f"{key}: {value}" for key, value in {"weight": weight, **METHODS[method]}.items())
        lines += [f"  - model: {model}", f"    parameters: {{{parameters}}}"]
    path = folder / f"{method}.yml"
    path.write_text("\n".join(lines) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where the models and the outputs lie")
    parser.add_argument("--tiny", action="store_true", help="tiny models; nothing is recorded")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each method (default {ROUNDS})")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="these alone")
    parser.add_argument("--mergekit", nargs="+", choices=METHODS, default=[], help="run mergekit for these, once")
    arguments = parser.parse_args()

    model = "tiny" if arguments.tiny else "2.6B"
    folder = arguments.folder.resolve() / model
    models = make_models(folder, TINY if arguments.tiny else Geometry(), 3)
    inputs = sorted(path for one in models for path in one.glob("*.safetensors"))
    out = folder / "out"
    recipes = {method: recipe(method, models, folder) for method in METHODS}
    ours = [
        Provider(name, [f"{SCRIPTS}/arcmerge", "merge", f"{recipes[name]}", f"{out}"], out)
        for name in arguments.methods
    ]
    theirs = [
        Provider(f"mergekit {name}", [f"{SCRIPTS}/mergekit-yaml", f"{recipes[name]}", f"{out}"], out)
        for name in arguments.mergekit
    ]
    origin, rows = {**provenance("arcmerge", "mergekit", "torch"), "file_system": file_system(folder)}, []
    for number, provider in [*interleaved(ours, arguments.rounds), *((0, one) for one in theirs)]:
        usage = measure(provider, inputs)
        remove(provider.out)
        print(f"round {number + 1}  {provider.name:<20}{usage.seconds:8.2f} s", flush=True)
        rows.append(
            {
                **origin,
                "model": model,
                "provider": provider.name,
                "seconds": round(usage.seconds, 3),
                "cpu_seconds": round(usage.cpu_seconds, 2),
                "peak_anonymous_mb": round(usage.peak_anonymous_mb),
            }
        )
    for name in dict.fromkeys(str(row["provider"]) for row in rows):
        mine = [row for row in rows if row["provider"] == name]
        wall, cpu, peak = (
            statistics.median(float(row[key]) for row in mine)
            for key in ("seconds", "cpu_seconds", "peak_anonymous_mb")
        )
        print(f"{name:<20}{wall:8.2f} s wall{cpu:8.2f} s CPU{peak:8.0f} MB")
    if not arguments.tiny:
        print(f"recorded in {append('merge_methods', rows)}")


if __name__ == "__main__":
    main()
