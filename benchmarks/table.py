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
GEMMA2_OPS = (
    "rmsnorm",
    "rmsnorm_add_rmsnorm",
    "rope_cache",
    "attention",
    "attention_decode",
    "geglu",
    "linear",
    "linear_geglu",
    "lm_head",
)
# Operations a byte past which arithmetic is what takes the time, and GFLOP/s say more than GB/s.
MANY_OPERATIONS = 20

Rows = Sequence[dict[str, str]]


def newest(benchmark: str, **columns: str) -> Rows:
    """The rows of the last run of a benchmark, if there was one, of those that have these values in these columns."""
    path = RESULTS / f"{benchmark}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[key] == value for key, value in columns.items())]
    last = max((row["date"] for row in rows), default="")
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
    """What each provider reaches in each task; the newest run of each counts."""
    runs = {task: newest("gemma2", task=task) for task in ("speed", "memory", "score")}
    if not any(runs.values()):
        return NO_ROWS
    lines = [
        "| | prefill, 512 tokens | decode, 512 tokens of context | peak anonymous memory, 2,048 tokens"
        " | 32 tokens scored of each 512 | memory of that |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for provider in sorted({row["provider"] for rows in runs.values() for row in rows}):

        def median(task: str, key: str, form: str, provider: str = provider) -> str:
            values = [float(row[key]) for row in runs[task] if row["provider"] == provider]
            return form.format(statistics.median(values)) if values else ""

        cells = [
            median("speed", "prefill_tokens_per_s", "{:.1f} tokens/s"),
            median("speed", "decode_tokens_per_s", "{:.2f} tokens/s"),
            median("memory", "peak_anonymous_mb", "{:,.0f} MB"),
            median("score", "score_seconds", "{:.0f} s"),
            median("score", "peak_anonymous_mb", "{:,.0f} MB"),
        ]
        lines.append(f"| {provider} | {' | '.join(cells)} |")
    for task, rows in runs.items():
        if rows:
            count = sum(row["provider"] == "arcmerge" for row in rows)
            what = f"score of {rows[0]['sequences']} sequences" if task == "score" else task
            lines += ["", f"{what.capitalize()}: medians of interleaved runs, {count} of each. {origin(rows)}"]
    return "\n".join(lines)


def gemma2_ops_table() -> str:
    """A call of each op, what that is of the roof that it has, and how many times as long another takes."""
    lines = ["| op | operands | time | rate | of reading memory | instead |", "|---|---|---:|---:|---:|---|"]
    rows: Rows = []
    for op in GEMMA2_OPS:
        rows = newest(op)
        for memory, ours, theirs in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
            times = [float(row["microseconds_median"]) for row in (ours, theirs)]
            gigabytes, gigaflops = float(ours["gb_per_s"]), float(ours["gflop_per_s"])
            if gigaflops > MANY_OPERATIONS * gigabytes:
                rate, share = f"{gigaflops:.0f} GFLOP/s", ""
            else:
                rate, share = f"{gigabytes:.1f} GB/s", f"{gigabytes / float(memory['gb_per_s']):.0%}"
            instead = f"{theirs['provider']}: {times[1] / times[0]:.1f} x"
            lines.append(f"| `{op}` | {ours['case']} | {duration(times[0])} | {rate} | {share} | {instead} |")
    return "\n".join([*lines, "", origin(rows)]) if rows else NO_ROWS


def duration(microseconds: float) -> str:
    return f"{microseconds / 1000:.3g} ms" if microseconds >= 1000 else f"{microseconds:.0f} us"


def sweep_table() -> str:
    """A candidate of a merge, merged and scored."""
    rows = newest("sweep")
    if not rows:
        return NO_ROWS
    lines = ["| | a candidate | of it merging | peak anonymous memory |", "|---|---:|---:|---:|"]
    for row in rows:
        floor = f", {float(row['merge_of_floor']):.2f} x the floor" if row["merge_of_floor"] else ""
        whole, merging, memory = (
            float(row[key]) for key in ("candidate_seconds", "merge_seconds", "peak_anonymous_mb")
        )
        lines.append(f"| {row['provider']} | {whole:.0f} s | {merging:.1f} s{floor} | {memory:,.0f} MB |")
    return "\n".join([*lines, "", origin(rows)])


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
    tables = {
        "merge table": merge_table,
        "ops table": ops_table,
        "gemma2 table": gemma2_table,
        "gemma2 ops table": gemma2_ops_table,
        "sweep table": sweep_table,
    }
    for name, table in tables.items():
        text = fill(text, name, table)
    README.write_text(text)


if __name__ == "__main__":
    main()
