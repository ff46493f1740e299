"""Writes the README's benchmark tables, each between its two markers, from the newest rows in results/.

python benchmarks/table.py
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable, Sequence

from _bench import HERE, RESULTS

README = HERE.parent / "README.md"
NO_ROWS = "No rows yet: run `make bench`."
MERGE_NAMES = {
    "arcmerge": "arcmerge, durable",
    "mergekit": "mergekit 0.1.5, in the page cache",
    "cp": "`cp` of one parent, in the page cache",
    "cp and sync": "`cp` of one parent `&& sync`, durable",
    "dd": "the disk alone: `dd oflag=direct` of the same bytes",
}

Rows = Sequence[dict[str, str]]


def newest(benchmark: str) -> Rows:
    """The rows of the last run of a benchmark, if there was one."""
    path = RESULTS / f"{benchmark}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = max(row["date"] for row in rows)
    return [row for row in rows if row["date"] == last]


def merge_table() -> str:
    """Medians of the runs of each provider, and how many times arcmerge's wall time each is."""
    rows = newest("merge")
    if not rows:
        return NO_ROWS
    by_provider = {name: [row for row in rows if row["provider"] == name] for name in MERGE_NAMES}
    medians = {
        name: [
            statistics.median(float(row[key]) for row in runs)
            for key in ("seconds", "cpu_seconds", "peak_anonymous_mb")
        ]
        for name, runs in by_provider.items()
        if runs
    }
    ours = medians["arcmerge"][0]
    lines = ["| | wall | of arcmerge's | CPU | peak anonymous memory |", "|---|---:|---:|---:|---:|"]
    for name, (seconds, cpu, memory) in medians.items():
        lines.append(
            f"| {MERGE_NAMES[name]} | {seconds:.1f} s | {seconds / ours:.2f} x | {cpu:.1f} s | {memory:,.0f} MB |"
        )
    lines += ["", f"Medians of {len(by_provider['arcmerge'])} interleaved runs. {origin(rows)}"]
    return "\n".join(lines)


def gemma2_table() -> str:
    """Prefill and decode of each provider, in tokens a second."""
    rows = [row for row in newest("gemma2") if row["task"] == "speed"]
    if not rows:
        return NO_ROWS
    lines = ["| | prefill, 512 tokens | decode, 512 tokens of context |", "|---|---:|---:|"]
    for provider in dict.fromkeys(row["provider"] for row in rows):
        runs = [row for row in rows if row["provider"] == provider]
        rates = [
            statistics.median(float(row[key]) for row in runs)
            for key in ("prefill_tokens_per_s", "decode_tokens_per_s")
        ]
        lines.append(f"| {provider} | {rates[0]:.1f} tokens/s | {rates[1]:.2f} tokens/s |")
    return "\n".join([*lines, "", f"Medians of {len(runs)} interleaved runs. {origin(rows)}"])


def ops_table() -> str:
    """GB/s of each way to do an op, and its share of a copy by memcpy on the same thread."""
    lines = ["| op | by | GB/s (20th to 80th percentile) | of a copy |", "|---|---|---:|---:|"]
    rows: Rows = []
    for op in ("gram", "combine"):
        rows = newest(op)
        for row in rows:
            spread = f"{row['gb_per_s_median']} ({row['gb_per_s_p20']} to {row['gb_per_s_p80']})"
            lines.append(f"| `{op}` | {row['provider']} | {spread} | {row['percent_of_copy']} % |")
    return "\n".join([*lines, "", origin(rows)]) if rows else NO_ROWS


def origin(rows: Rows) -> str:
    """Where and when: machine, file system if it matters, versions, date, commit."""
    row = rows[0]
    places = [row["machine"], *([row["file_system"]] if "file_system" in row else []), row["versions"]]
    return f"{'; '.join(places)}; {row['date'][:10]}; commit {row['commit']}."


def fill(text: str, name: str, table: Callable[[], str]) -> str:
    """`text` with what lies between the markers of `name` replaced. Raises ValueError if it lacks them."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    filled, found = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table()}\n{end}", text, flags=re.DOTALL
    )
    if found != 1:
        raise ValueError(f"README.md must hold '{begin}' and '{end}' once, found {found} times")
    return filled


def main() -> None:
    text = README.read_text()
    for name, table in (("merge table", merge_table), ("ops table", ops_table), ("gemma2 table", gemma2_table)):
        text = fill(text, name, table)
    README.write_text(text)


if __name__ == "__main__":
    main()
