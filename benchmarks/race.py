"""Sweeps with and without a race, over several orders of the windows: the winners, and the share of the tokens.

    python benchmarks/race.py                     the pair of `make demo` in .demo, four cases, ten orders
    python benchmarks/race.py --replay --recipe recipe.yml --text long.txt --window 512 --grid t=0:1:0.1
                                                  any pair; candidates are scored once, and the races read the losses

Every race must have the winner of the sweep without one and score at most 40 % of its tokens on the average; otherwise
the command fails. The rows are recorded in results/race.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import arcmerge
from _bench import append, provenance
from arcmerge.merging.recipe.recipe import load_recipe
from arcmerge.sweeping.candidates import of_grid, parents
from arcmerge.sweeping.scores import Item, Perplexity
from arcmerge.sweeping.sweep import score_candidates

DEMO = Path(".demo")
# The windows and grids that are tried on the pair of the demo.
DEMO_CASES = (
    (128, "t=0:1:0.1"),
    (128, "t=0:1:0.05"),
    (64, "t=0:1:0.1"),
    (64, "t:self_attn=0:1:0.25,t:mlp=0:1:0.25"),
)
MAX_SHARE = 0.4


class Recorded(Perplexity):
    """A perplexity that keeps the losses of every candidate, and gives them again instead of running the model."""

    def __init__(self, texts: Sequence[str], window: int) -> None:
        super().__init__(texts, window)
        self.known: dict[str, list[float]] = {}
        self.replays = False
        self._items: list[Item] = []

    def items(self, model: arcmerge.Gemma2) -> list[Item]:
        self._items = self._items or [
            Item(item.size, item.pairs, index) for index, item in enumerate(super().items(model))
        ]
        return self._items

    def losses(self, model: arcmerge.Gemma2, items: Sequence[Item]) -> list[float]:
        if self.replays:
            return [self.known[model.recipe][item.answer] for item in items]
        found = super().losses(model, items)
        if len(items) == len(self._items):
            self.known[model.recipe] = found
        return found


def read_grid(text: str) -> dict[str, str]:
    """{"t:mlp": "0:1:0.5", ...} from "t:mlp=0:1:0.5,...": a comma separates axes where a name and '=' follow."""
    axes: dict[str, str] = {}
    for part in text.split(","):
        name, equals, values = part.partition("=")
        if equals:
            axes[name] = values
        else:
            axes[list(axes)[-1]] += f",{part}"
    return axes


def measure(
    recipe: str, texts: Sequence[str], window: int, grid: str, orders: int, replay: bool, device: str
) -> dict[str, object]:
    """Sweep once without a race and once for each order with one. Returns the figures of a row."""
    config, score = load_recipe(Path(recipe)), Recorded(texts, window)
    candidates = [*of_grid(read_grid(grid), config), *parents(config)]
    shares, winners, seconds, lost = [], [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        whole = score_candidates(config.text, candidates, score, Path(folder) / "whole", device=device)
        without = time.perf_counter() - started
        score.replays = replay
        for order in range(orders):
            started = time.perf_counter()
            out = Path(folder) / str(order)
            result = score_candidates(config.text, candidates, score, out, race=order, device=device)
            seconds.append(time.perf_counter() - started)
            with (out / "results.csv").open(newline="") as file:
                tokens = sum(int(row["tokens"]) for row in csv.DictReader(file))
            shares.append(tokens / (result.best.amount * len(result.scored)))
            winners.append(result.best.name)
            lost += result.best.name != whole.best.name
            print(
                f"  order {order}: {result.best.name}, {shares[-1]:.1%} of the tokens, {seconds[-1]:.0f} s", flush=True
            )
    return {
        "window": window,
        "grid": grid,
        "candidates": len(whole.scored),
        "tokens": result.best.amount,
        "winner": whole.best.name,
        "orders": orders,
        "lost": lost,
        "share": round(statistics.mean(shares), 4),
        "largest_share": round(max(shares), 4),
        "seconds_without": round(without, 1),
        "seconds": None if replay else round(statistics.median(seconds), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="examples/tiny-pair.yml")
    parser.add_argument("--text", type=Path, nargs="+", default=[DEMO / "validation.txt"])
    parser.add_argument("--window", type=int, help="tokens in a window (default: four cases for the demo)")
    parser.add_argument("--grid", default="t=0:1:0.1", help="axes as NAME=VALUES, separated by commas")
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--replay", action="store_true", help="score every candidate once only")
    arguments = parser.parse_args()
    cases = [(arguments.window, arguments.grid)] if arguments.window else DEMO_CASES
    texts = [file.read_text(encoding="utf-8") for file in arguments.text]
    origin, rows = provenance("arcmerge", "torch"), []
    for window, grid in cases:
        print(f"{arguments.recipe}, windows of {window} tokens, {grid}", flush=True)
        found = measure(arguments.recipe, texts, window, grid, arguments.orders, arguments.replay, arguments.device)
        rows.append({**origin, "recipe": arguments.recipe, **found})
        print(f"  winner {found['winner']}, lost {found['lost']} times; {found['share']:.1%} of the tokens", flush=True)
    print(f"recorded in {append('race', rows)}")
    if any(row["lost"] or row["share"] > MAX_SHARE for row in rows):
        sys.exit("a race had another winner, or scored more than 40 % of the tokens")


if __name__ == "__main__":
    main()
