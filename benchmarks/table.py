"""Writes the benchmark tables of docs/performance.md and README.md, each between its two markers, from results/.

python benchmarks/table.py
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from _bench import HERE, RESULTS

HOUSE = HERE.parent
NO_ROWS = "No rows yet: run `make bench`."
DIRTY = "-dirty"
MERGE_NAMES = {
    "arcmerge": "arcmerge, durable",
    "mergekit": "mergekit 0.1.5, in the page cache",
    "cp": "`cp` of one parent, in the page cache",
    "cp and sync": "`cp` of one parent `&& sync`, durable",
    "dd": "`dd oflag=direct` of the same number of bytes, one write in flight",
}
PROVIDERS = {"transformers": "transformers, eager attention"}
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
# Operations a byte above which arithmetic takes the time, so that GFLOP/s say more than GB/s.
MANY_OPERATIONS = 20
# Ops whose counterpart multiplies bfloat16 matrices.
PRODUCTS = ("attention", "attention_decode", "linear", "linear_geglu", "lm_head")
MARK = "¹"
NO_BFLOAT16 = (
    f"{MARK} Measured on a processor without bfloat16 instructions. torch has no vectorized bfloat16 matrix product "
    "for such processors, so the ratio says little about processors that have these instructions."
)

Rows = Sequence[dict[str, str]]


def newest(benchmark: str, **columns: str) -> Rows:
    """The rows of the last run of a benchmark that have these values in these columns, if there is one.

    A run from a committed tree precedes later ones from a changed tree.
    """
    path = RESULTS / f"{benchmark}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[key] == value for key, value in columns.items())]
    last = max(((not row["commit"].endswith(DIRTY), row["date"]) for row in rows), default=(False, ""))
    return [row for row in rows if row["date"] == last[1]]


def lacks_bfloat16(rows: Rows) -> bool:
    """Whether the rows were measured on a processor known to have no bfloat16 instructions."""
    return any("(avx2)" in row["machine"] or "(avx512)" in row["machine"] for row in rows)


def medians(rows: Rows, *keys: str) -> dict[str, list[float]]:
    """The median of each column for each provider."""
    providers = dict.fromkeys(row["provider"] for row in rows)
    return {
        name: [statistics.median(float(row[key]) for row in rows if row["provider"] == name) for key in keys]
        for name in providers
    }


def readme_table() -> str:
    """The four figures of the first screen, each next to the figure of another program."""
    merges, sweeps = newest("merge"), newest("sweep")
    speed, memory = newest("gemma2", task="speed"), newest("gemma2", task="score")
    if not (merges and sweeps and speed and memory):
        return NO_ROWS
    merge = medians(merges, "seconds", "peak_anonymous_mb")
    sweep = medians(sweeps, "candidate_seconds")
    prefill = medians(speed, "prefill_tokens_per_s")
    decode = medians(speed, "decode_tokens_per_s")
    ours, theirs = merge["arcmerge"], merge["mergekit"]
    candidate, other = sweep["arcmerge"][0], sweep["mergekit + transformers"][0]

    def rates(values: Mapping[str, Sequence[float]], form: str) -> tuple[str, str]:
        llama, eager = values["llama.cpp"][0], values["transformers"][0]
        return (
            f"{values['arcmerge'][0]:{form}} tokens/s",
            f"llama.cpp {llama:{form}}, transformers{MARK} {eager:{form}} tokens/s",
        )

    rows = [
        (
            "merge two models of 5.2 GB each",
            f"{ours[0]:.1f} s, {ours[1]:,.0f} MB of memory",
            f"mergekit 0.1.5: {theirs[0]:.0f} s, {theirs[1]:,.0f} MB",
            f"{theirs[0] / ours[0]:.0f} x",
        ),
        (
            "merge and score a candidate of a sweep",
            f"{candidate:.0f} s",
            f"mergekit + transformers{MARK}: {other:.0f} s",
            f"{other / candidate:.0f} x",
        ),
        ("read a prompt of 512 tokens", *rates(prefill, ".1f"), ""),
        ("decode after 512 tokens", *rates(decode, ".2f"), ""),
    ]
    head = ["| Gemma-2 2.6B, bfloat16, two CPU cores | arcmerge | compared with | speedup |", "|---|---|---|---:|"]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([*head, *lines, "", NO_BFLOAT16])


def merge_table() -> str:
    """Medians of the runs of each provider, and the ratio of its wall time to arcmerge's."""
    rows = newest("merge")
    if not rows:
        return NO_ROWS
    found = medians(rows, "seconds", "cpu_seconds", "peak_anonymous_mb")
    ours = found["arcmerge"][0]
    lines = ["| | wall time | ratio to arcmerge | CPU time | peak anonymous memory |", "|---|---:|---:|---:|---:|"]
    for name in (name for name in MERGE_NAMES if name in found):
        seconds, cpu, memory = found[name]
        lines.append(
            f"| {MERGE_NAMES[name]} | {seconds:.1f} s | {seconds / ours:.2f} x | {cpu:.1f} s | {memory:,.0f} MB |"
        )
    count = sum(row["provider"] == "arcmerge" for row in rows)
    lines += ["", f"Medians of {count} interleaved runs. {origin(rows)}"]
    return "\n".join(lines)


def methods_table() -> str:
    """Medians of each method, the ratio of its wall time to multislerp's, and mergekit's time, each of the last run."""
    path = RESULTS / "merge_methods.csv"
    if not path.exists():
        return NO_ROWS
    with path.open(newline="") as file:
        providers = dict.fromkeys(row["provider"] for row in csv.DictReader(file))
    runs = {provider: newest("merge_methods", provider=provider) for provider in providers}
    ours = {name: rows for name, rows in runs.items() if not name.startswith("mergekit ")}
    theirs = {name.removeprefix("mergekit "): rows for name, rows in runs.items() if name not in ours}
    multislerp = statistics.median(float(row["seconds"]) for row in ours["multislerp"])
    lines = [
        "| method | wall time | ratio to multislerp | CPU time | peak anonymous memory | mergekit 0.1.5 | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in sorted(ours, key=lambda name: float(medians(ours[name], "seconds")[name][0])):
        seconds, cpu, memory = medians(ours[name], "seconds", "cpu_seconds", "peak_anonymous_mb")[name]
        compared = ["", ""]
        if name in theirs:
            alike = newest("merge_methods", provider=name, machine=theirs[name][0]["machine"])
            other, own = (statistics.median(float(row["seconds"]) for row in rows) for rows in (theirs[name], alike))
            compared = [f"{other:,.0f} s", f"{other / own:,.0f} x"]
        cells = [f"{seconds:.1f} s", f"{seconds / multislerp:.2f} x", f"{cpu:.1f} s", f"{memory:,.0f} MB", *compared]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    count = len(ours["multislerp"])
    lines += ["", f"arcmerge: medians of {count} interleaved runs. {origin(ours['multislerp'])}"]
    if theirs:
        lines += ["", "The last column compares mergekit with arcmerge's last run on the same kind of machine."]
    for name, rows in theirs.items():
        lines += ["", f"mergekit's `{name}`: one run. {origin(rows)}"]
    return "\n".join(lines)


def gemma2_table() -> str:
    """The figures of each provider in each task, from the newest run of the task."""
    runs = {task: newest("gemma2", task=task) for task in ("speed", "memory", "score")}
    if not any(runs.values()):
        return NO_ROWS
    lines = [
        "| | prefill, 512 tokens | decode, 512 tokens of context | peak anonymous memory, 2,048 tokens"
        " | score the last 32 tokens of 512 | peak anonymous memory of scoring |",
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
        mark = MARK if provider == "transformers" else ""
        lines.append(f"| {PROVIDERS.get(provider, provider)}{mark} | {' | '.join(cells)} |")
    for task, rows in runs.items():
        if rows:
            count = sum(row["provider"] == "arcmerge" for row in rows)
            what = f"scores of {rows[0]['sequences']} sequences" if task == "score" else task
            runs_of_each = "one run of each" if count == 1 else f"medians of {count} interleaved runs of each"
            lines += ["", f"{what.capitalize()}: {runs_of_each}. {origin(rows)}"]
    lines += ["", NO_BFLOAT16]
    return "\n".join(lines)


def gemma2_ops_table() -> str:
    """The time of each op, its share of the memory bandwidth, and the ratio of another library's time to it."""
    lines = ["| op | operands | time | rate | of memory bandwidth | ratio of time |", "|---|---|---:|---:|---:|---:|"]
    origins: dict[str, list[str]] = {}
    marked = False
    for op in GEMMA2_OPS:
        rows = newest(op)
        if rows:
            origins.setdefault(origin(rows), []).append(f"`{op}`")
        mark = MARK if op in PRODUCTS and lacks_bfloat16(rows) else ""
        marked = marked or bool(mark)
        for memory, ours, theirs in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
            times = [float(row["microseconds_median"]) for row in (ours, theirs)]
            gigabytes, gigaflops = float(ours["gb_per_s"]), float(ours["gflop_per_s"])
            if gigaflops > MANY_OPERATIONS * gigabytes:
                rate, share = f"{gigaflops:.0f} GFLOP/s", ""
            else:
                rate, share = f"{gigabytes:.1f} GB/s", f"{gigabytes / float(memory['gb_per_s']):.0%}"
            other = f"{theirs['provider']}: {times[1] / times[0]:.1f} x{mark}"
            lines.append(f"| `{op}` | {ours['case']} | {duration(times[0])} | {rate} | {share} | {other} |")
    if not origins:
        return NO_ROWS
    for where, ops in origins.items():
        lines += ["", f"{', '.join(ops)}: {where}"]
    return "\n".join([*lines, *(["", NO_BFLOAT16] if marked else [])])


def duration(microseconds: float) -> str:
    return f"{microseconds / 1000:.3g} ms" if microseconds >= 1000 else f"{microseconds:.0f} us"


def sweep_table() -> str:
    """The time to merge and score one candidate."""
    rows = newest("sweep")
    if not rows:
        return NO_ROWS
    lines = ["| | time per candidate | of which merging | peak anonymous memory |", "|---|---:|---:|---:|"]
    for row in rows:
        floor = f", {float(row['merge_of_floor']):.2f} x the memory floor" if row["merge_of_floor"] else ""
        whole, merging, memory = (
            float(row[key]) for key in ("candidate_seconds", "merge_seconds", "peak_anonymous_mb")
        )
        mark = MARK if "transformers" in row["provider"] and lacks_bfloat16(rows) else ""
        lines.append(f"| {row['provider']}{mark} | {whole:.0f} s | {merging:.1f} s{floor} | {memory:,.0f} MB |")
    return "\n".join([*lines, "", origin(rows), *(["", NO_BFLOAT16] if lacks_bfloat16(rows) else [])])


def race_table() -> str:
    """The winners of races, and the tokens that they need, for every case."""
    rows = newest("race")
    if not rows:
        return NO_ROWS
    lines = [
        "| grid | candidates | windows of | same winner | tokens scored, mean (largest) |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        same = int(row["orders"]) - int(row["lost"])
        shares = f"{float(row['share']):.0%} ({float(row['largest_share']):.0%})"
        lines.append(
            f"| `{row['grid']}` | {row['candidates']} | {row['window']} tokens | {same} of {row['orders']} | {shares} |"
        )
    return "\n".join([*lines, "", origin(rows)])


def lm_eval_table() -> str:
    """The time and the extra memory of one evaluation, for every recorded run."""
    path = RESULTS / "lm_eval_tasks.csv"
    if not path.exists():
        return NO_ROWS
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| run | arcmerge | lm-eval's `hf` | ratio |", "|---|---:|---:|---:|"]
    for date in dict.fromkeys(row["date"] for row in rows):
        found = {row["provider"]: row for row in rows if row["date"] == date}
        cells = [f"{float(row['seconds']):.1f} s, {float(row['extra_mb']):,.0f} MB" for row in found.values()]
        ratio = float(found["hf"]["seconds"]) / float(found["arcmerge"]["seconds"])
        mark = MARK if lacks_bfloat16(rows) else ""
        lines.append(f"| {date[:10]}, {found['arcmerge']['commit']} | {' | '.join(cells)} | {ratio:.1f} x{mark} |")
    return "\n".join([*lines, "", origin(rows[-2:]), "", NO_BFLOAT16])


def ops_table() -> str:
    """GB/s of each implementation of an op, and its share of the rate of memcpy on the same thread."""
    lines = ["| op | implementation | GB/s (20th to 80th percentile) | share of a copy |", "|---|---|---:|---:|"]
    origins: dict[str, list[str]] = {}
    for op in ("gram", "combine", "magnitude_histogram", "consensus_combine"):
        rows = newest(op)
        if rows:
            origins.setdefault(origin(rows), []).append(f"`{op}`")
        for row in rows:
            spread = f"{row['gb_per_s_median']} ({row['gb_per_s_p20']} to {row['gb_per_s_p80']})"
            lines.append(f"| `{op}` | {row['provider']} | {spread} | {row['percent_of_copy']} % |")
    for where, ops in origins.items():
        lines += ["", f"{', '.join(ops)}: {where}"]
    return "\n".join(lines) if origins else NO_ROWS


def origin(rows: Rows) -> str:
    """Where and when the rows were measured: machine, file system if it matters, versions, date, commit."""
    row = rows[0]
    places = [row["machine"], *([row["file_system"]] if "file_system" in row else []), row["versions"]]
    commit = row["commit"].removesuffix(DIRTY)
    changed = " with uncommitted changes" if row["commit"].endswith(DIRTY) else ""
    return f"{'; '.join(places)}; {row['date'][:10]}; commit {commit}{changed}."


def fill(text: str, name: str, table: Callable[[], str]) -> str:
    """`text` with the part between the markers of `name` replaced. Raises ValueError if it lacks them."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    filled, found = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table()}\n{end}", text, flags=re.DOTALL
    )
    if found != 1:
        raise ValueError(f"the page must hold '{begin}' and '{end}' once, got {found} times")
    return filled


PAGES: Mapping[Path, Mapping[str, Callable[[], str]]] = {
    HOUSE / "README.md": {"figures table": readme_table},
    HOUSE / "docs" / "performance.md": {
        "merge table": merge_table,
        "methods table": methods_table,
        "ops table": ops_table,
        "gemma2 table": gemma2_table,
        "gemma2 ops table": gemma2_ops_table,
        "sweep table": sweep_table,
        "race table": race_table,
        "lm_eval table": lm_eval_table,
    },
}


def pages() -> dict[Path, str]:
    """Every page that holds tables, with its tables made anew."""
    found = {}
    for path, tables in PAGES.items():
        text = path.read_text(encoding="utf-8")
        for name, table in tables.items():
            text = fill(text, name, table)
        found[path] = text
    return found


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
