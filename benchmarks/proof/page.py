"""docs/proof.md, made from results/proof.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emulation.compilation import TARGETS
from emulation.resources import LIMITS, MACHINES
from emulation.roofline import ATTAINABLE_DRAM, ATTAINABLE_TENSOR, LATENCY, LAUNCH, SAMPLES

Record = Mapping[str, Any]
NAMES = [machine.name for machine in MACHINES]

OPENING = """\
# Verification of the kernels

Made by `make prove` from `benchmarks/results/proof.json`, not written by hand. {provenance}

**No figure on this page was measured on a GPU.** Registers, spills and shared memory are read from compiled code.
Traffic is counted in an interpreter. Errors come from an interpreter and from an emulator of compiled code, both of
which run on a CPU. The column *emulated* says how many cases were executed: where it says 2 of 9, the other seven were
compiled and interpreted, but not executed. Times are predicted, by a model that no measurement has checked. {verdict}
"""

EXPLANATION = """
## What each column says, and what it does not

**configurations, registers, spills, shared memory.** Each op was launched with every case of `tests/cases`: short,
awkward shapes, and every launch that a Gemma-2 of 2.6B, 9B or 27B parameters makes. The launchers chose tiles, warps
and stages, as they would for the named architecture, and the compilers in triton's wheel (LLVM, ptxas) made the
binary that a GPU would load. A cell has the largest value of any configuration; spills are instructions, of all
together. This is as certain as the compiler. It says nothing about configurations that no case reaches, nor about
another version of triton.

**matrix instructions.** In how many of the configurations that multiply matrices the code has the instruction of the
matrix units that is due: on NVIDIA `mma.sync`, but for products of 64 rows or more on sm_90 `wgmma` and on sm_100
`tcgen05`; on gfx942 `v_mfma`. float32 that must not be rounded to TF32 has none. How busy they are is not checked.

**gate.** Passed: no spills; no block has more shared memory than the architecture gives; matrix instructions wherever
they are due; no atomic operations on floating point; where the code for sm_80 moves 16 bytes a thread at a time, so
does that for the target (on gfx942 8, for its waves are twice as wide), and in the blocks of the models' launches
that were executed for sm_80 the average request of a warp is at least half of the 512 bytes that such accesses make
(scalar ones of bfloat16 make 64). And every figure in the row is within its bounds.

**traffic.** Bytes loaded and stored over the minimum that the contract of the op states, in those small cases for
which a ratio is stated, which is then exact. Counted in the interpreter: every byte once a launch, masked lanes not
at all. That assumes an endless cache: what a real one evicts between two programs is read again, and not counted
here.

**interpreted, emulated.** The largest error of any output of any small case, as a share of its tolerance: 1 would
just pass; where equal bits are demanded it is 0. Tolerances are derived in `tests/cases`, from the rounding of the
output and of float32 sums; the truth is computed in float64. The interpreter runs the source of a kernel. The
emulator runs the PTX that the compiler made of it: registers, predicates, loops, shuffles, shared memory,
asynchronous copies that land as late as they may, matrix instructions. It stops at accesses that are out of bounds or
misaligned, and where one warp reads from shared memory what another wrote with no barrier in between. In brackets:
the cases that ran, of all; then, of those whose order of operations is the interpreter's, how many have its very
bits. What the emulator does not know (`wgmma`, `tcgen05`, bulk copies, all of AMD's code) is compiled and interpreted
but not executed, and not counted as run.

**What neither can show.** Races between blocks: here blocks run one after another, or in step (that two programs
store to one address is noticed). Deadlocks, and all else that depends on time. The last bits of `ex2`, `tanh`, `rcp`,
`rsqrt` and the like, which a GPU approximates and the emulator computes exactly, and the order in which matrix units
add. What ptxas makes of the PTX: a GPU runs SASS. Mistakes of the interpreter and of the emulator themselves, though
both are tested, on arithmetic written another way and on planted faults.

**predicted.** The time that the contract allows at the published peaks (its bytes at the bandwidth of DRAM or its
operations at the rate of the matrix units, whichever takes longer) over the time that the model predicts, for the
launches of the models on {machines}. The model takes registers and shared memory from the compiled code, works out
how many blocks a multiprocessor holds, emulates {samples} blocks of a launch, more where they do little, to count
what they do, and takes the longest of: DRAM ({dram:.0%} of its peak; less if too few bytes are under way for a
latency of {latency:.0f} ns), L2, matrix units ({tensor:.0%} of their peak), float32, float64, special functions,
instructions issued, shared memory. So {dram:.0%} is the most that a launch bound by DRAM can get. Other latencies are
taken to be hidden, caches to be cold, clocks to be at boost. A launch takes some {launch:.0f} us more where no CUDA
graph is used: in no figure here. For launches of a few microseconds that, and latencies that follow one another, are
most of the time, and the prediction means little. Counts are of PTX, not of SASS. Where a machine's code has the
configuration of that for sm_80, or cannot be emulated, the counts are those of sm_80, less what `wgmma` and `tcgen05`
do themselves; registers and shared memory are the machine's own. A real GPU will mostly be slower. The figures tell
which resource to look at, and whether anything in the code rules the roof out; they do not tell how fast it is.
"""


def page(proof: Record) -> str:
    """The whole page, as Markdown."""
    failures = proof["failures"]
    verdict = f"**{len(failures)} checks failed; they are listed below.**" if failures else "All checks passed."
    commit, changed = proof["commit"].removesuffix("-dirty"), proof["commit"].endswith("-dirty")
    commit += " with uncommitted changes" if changed else ""
    provenance = f"{proof['date'][:10]}, commit {commit}; {proof['machine']}; {proof['versions']}."
    ops = list(dict.fromkeys(record["op"] for record in proof["compiled"]))
    parts = [OPENING.format(provenance=provenance, verdict=verdict)]
    if failures:
        lines = [f"- {each['op']}, {each['target'] or 'all targets'}: {each['reason']}" for each in failures]
        parts.append("\n".join(["## What failed", "", *lines]) + "\n")
    parts.append("\n".join(["## Every op on every architecture", "", *_ops_table(proof, ops)]) + "\n")
    parts.append("\n".join(["## Predicted times at the sizes of Gemma-2", "", *_times_table(proof)]) + "\n")
    return "\n".join(parts).rstrip("\n") + "\n" + _explanation()


def _explanation() -> str:
    return EXPLANATION.format(
        machines=", ".join(NAMES),
        samples=SAMPLES[0],
        dram=ATTAINABLE_DRAM,
        tensor=ATTAINABLE_TENSOR,
        latency=LATENCY * 1e9,
        launch=LAUNCH * 1e6,
    )


def _ops_table(proof: Record, ops: Sequence[str]) -> list[str]:
    headings = (
        "op",
        "architecture",
        "configurations",
        "registers",
        "spills",
        "shared KiB (limit)",
        "matrix instructions",
        "traffic",
        "interpreted",
        "emulated",
        "predicted",
        "gate",
    )
    rows = [_row(proof, op, target) for op in ops for target in TARGETS]
    return _table(headings, rows)


def _row(proof: Record, op: str, target: str) -> list[str]:
    (compiled,) = (each for each in proof["compiled"] if (each["op"], each["target"]) == (op, target))
    failed = any(each["op"] == op and each["target"] in ("", target) for each in proof["failures"])
    if "kernels" not in compiled:
        return [f"`{op}`", target, *["not compiled"] * 9, "**failed**"]
    kernels = list(compiled["kernels"].values())
    shared = max(kernel["shared"] for kernel in kernels) / 1024
    return [
        f"`{op}`",
        target,
        str(len(kernels)),
        str(max(kernel["registers"] for kernel in kernels)),
        str(sum(kernel["spills"] for kernel in kernels)),
        f"{shared:.1f} ({LIMITS[target].shared_block // 1024})",
        _matrix(kernels),
        _traffic(record for record in proof["interpreted"] if record["op"] == op),
        _error([record for record in proof["interpreted"] if record["op"] == op]),
        _emulated([record for record in proof["emulated"] if (record["op"], record["target"]) == (op, target)]),
        _fractions(proof, op, target),
        "**failed**" if failed else "passed",
    ]


def _matrix(kernels: Sequence[Record]) -> str:
    due = [kernel for kernel in kernels if kernel["matrix_due"]]
    if not due:
        return "none due"
    names = sorted({kernel["matrix_instruction"] for kernel in due if kernel["matrix"]})
    return f"{sum(kernel['matrix'] > 0 for kernel in due)} of {len(due)} ({', '.join(names)})"


def _traffic(records: Iterable[Record]) -> str:
    stated = [record["ratio"] for record in records if record["stated_ratio"] is not None and "ratio" in record]
    return _range([f"{ratio:.4f}" for ratio in sorted(stated)]) or "not stated"


def _error(records: Sequence[Record]) -> str:
    errors = [record["error"] for record in records if "error" in record]
    return f"{max(errors):.3g} ({len(errors)} of {len(records)})" if errors else "none ran"


def _emulated(records: Sequence[Record]) -> str:
    if not records:
        return "interpreted only"
    ran = [record for record in records if "error" in record]
    if not ran:
        return f"none of {len(records)}"
    due = [record for record in ran if record.get("same_bits_due")]
    same = sum(record["same_bits"] for record in due)
    bits = f"; same bits {same} of {len(due)}" if due else ""
    return f"{max(record['error'] for record in ran):.3g} ({len(ran)} of {len(records)}{bits})"


def _fractions(proof: Record, op: str, target: str) -> str:
    names = [machine.name for machine in MACHINES if machine.target == target]
    if not names:
        return "no machine chosen"
    records = [each for each in proof["predicted"] if each["op"] == op and "machines" in each]
    if not records:
        return "no model launches it"
    spans = []
    for name in names:
        fractions = sorted(each["machines"][name]["fraction"] for each in records)
        spans.append(f"{_range([f'{fraction:.0%}' for fraction in fractions])} ({name})")
    return ", ".join(spans)


def _times_table(proof: Record) -> list[str]:
    headings = ("op", "launch", *NAMES)
    rows = []
    for record in proof["predicted"]:
        cells = (
            [
                f"{found['seconds'] * 1e6:,.1f} us, {found['fraction']:.0%}, {found['bound']}"
                for found in (record["machines"][name] for name in NAMES)
            ]
            if "machines" in record
            else ["**failed**"] * len(NAMES)
        )
        rows.append([f"`{record['op']}`", record["case"], *cells])
    intro = "Predicted time without the launch, share of the roof, and the resource that bounds it. Not measured."
    return [intro, "", *_table(headings, rows)]


def _range(values: Sequence[str]) -> str:
    return "" if not values else values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_line(headings), _line(["---"] * len(headings)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
