"""docs/proof.md, made from results/proof-VERSION.json of each version of Triton, and results/proof.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cells import commit, differences_table, number, ops_table, table, versions_table
from gate import union

from arcmerge.cuda.slerp import batches_of, target_of, traffic
from cases.gemma import GEMMA_2, Shape
from emulation.published import PUBLISHED
from emulation.resources import MACHINES, Machine
from emulation.roofline import LATENCY, NODE, SAMPLES, SHORT, Code, Work, predict, resident_blocks

Record = Mapping[str, Any]
NAMES = [machine.name for machine in MACHINES]

OPENING = """\
# Verification of the kernels

Made by `make prove` from `benchmarks/results/proof*.json`, not written by hand. {machine}; {versions}.

**No figure on this page was measured on a GPU.** Registers, spills and shared memory are read from compiled code.
Traffic is counted in an interpreter. Errors come from an interpreter and from an emulator of compiled code, both of
which run on a CPU. The column *emulated* says how many cases were executed: where it says 2 of 15, the other 13 were
compiled and interpreted, but not executed. Times are predicted, by a model whose errors are known for other kernels
only, which others have measured: see the table of these. {verdict}
"""

VERSIONS = """\
The compiler decides registers, spills and instructions, so everything but the predicted times was verified with each of
these versions. A cell is an op on an architecture."""

DIFFERENCES = """\
Cells in which a launcher chooses other kernels, tiles, warps or stages with one version than with another, or in which
the emulator executes other cases. Nothing is left out where a version lacks a kernel: the same launches then take the
kernel that is named, and that is what was verified. `_attention_hopper_kernel` needs Gluon as of Triton 3.9; without it
`_attention_kernel` serves sm_90. Histograms count in shared memory from Triton 3.8 on. Registers and shared memory are
the largest of a cell."""

CELLS = """\
All versions together: configurations, spills, matrix instructions and cases are sums, the other values are the largest
of any version. A cell passes if it passes with every version. Times are predicted from the code of the newest."""

EXPLANATION = """
## What each column says, and what it does not

**configurations, registers, spills, shared memory.** Each op was launched with every case of `tests/cases`: short,
awkward shapes, and every launch of a Gemma-2 with 2.6B, 9B or 27B parameters. The launchers chose tiles, warps and
stages as they do on the named architecture, and the compilers in triton's wheel (LLVM, ptxas) made the binary that a
GPU would load. A cell shows the largest value of all configurations; spills are the instructions of all
configurations together. These values are as certain as the compiler. They say nothing about configurations that no
case reaches, nor about other versions of Triton.

**matrix instructions.** The number of configurations whose code has the expected instruction of the matrix units, of
those that multiply matrices. Expected are `mma.sync` on NVIDIA, but `wgmma` on sm_90 and `tcgen05` on sm_100 for
products of 64 rows or more, and `v_mfma` on gfx942. Products in float32 that must not be rounded to TF32 have none.
How busy the units are is not checked.

**gate.** An op passes if nothing spills; no block has more shared memory than the architecture offers; matrix
instructions are wherever they are expected; no floating-point atomics are used; a kernel that may start before earlier
ones have ended waits for them before it touches global memory; on AMD, a program waits for its stores before it
releases them to others; and every figure in the row is within its bounds. Memory accesses must be wide: where the code
for sm_80 moves 16 bytes for each thread, so must the code for the target (8 bytes on gfx942, whose waves are twice as
wide). In the blocks of the models' launches that were executed for sm_80, the average request of a warp must be at
least half of the 512 bytes of such accesses (scalar accesses to bfloat16 make requests of 64 bytes).

**traffic.** Bytes loaded and stored, divided by the minimum that the contract of the op states, in those small cases
for which a ratio is stated. The interpreter counts each byte once for each launch and no masked lanes. This assumes a
cache without limits: bytes that a real cache evicts between two programs are read again, and are not counted here.

**interpreted, emulated.** The largest error of any output of any small case, as a share of its tolerance: 1 would
just pass, and where equal bits are demanded it is 0. Tolerances are derived in `tests/cases` from the rounding of the
output and of float32 sums; the reference is computed in float64. The interpreter runs the source of a kernel. The
emulator runs the PTX that the compiler made of it: registers, predicates, loops, shuffles, shared memory,
asynchronous copies and products that complete as late as they may, matrix instructions. It stops at accesses that are
out of bounds or misaligned, where a warp reads what another warp wrote without a barrier, or a release and an acquire,
in between, and where a product of a warpgroup lacks a fence or a wait. Blocks start in random order, and go on in
random order where they communicate. Of launches with more elements than 32 bits can count, the last blocks run too:
136 sequences of 8192 tokens of the 9B, whose memory exists only where it is touched.
The brackets show how many cases ran, of all; then how many have the bits of the interpreter, of those with the same
order of operations. The emulator does not know `tcgen05`, copies of tiles and AMD's code. Cases with these are compiled
and interpreted but not executed, and do not count as run.

**What neither can show.** Deadlocks, and everything else that depends on time. The last bits of `ex2`, `tanh`,
`rcp`, `rsqrt` and the like, which a GPU approximates and the emulator computes exactly, and the order in which matrix
units add. What ptxas makes of the PTX: a GPU runs SASS. Mistakes of the interpreter and of the emulator themselves,
although both are tested, on arithmetic that is written another way and on planted faults.

**predicted.** The time that the contract allows at the published peaks, divided by the predicted time, for the
launches of the models on {machines}. The former is the larger of two times: the op's bytes at the bandwidth of DRAM,
and its operations at the rate of the matrix units. The latter comes from a model (`tests/emulation/roofline.py`). It
takes registers and shared memory from the compiled code, computes how many blocks fit on a multiprocessor, and emulates
{samples} blocks of a launch (more where blocks do little) to count their work. A launch then takes

- a node of a CUDA graph, {node:.1f} us;
- {latency:.0f} ns for each access to global memory that waits for one before it, counted along the compiled code;
- the longest of DRAM (less than its rate if too few bytes are in flight), L2, and the multiprocessor. There, matrix
  units, shared memory and the other units work at the same time only as far as there are enough warps or blocks to be
  at different places: the times of a single block add up. `wgmma` and `tcgen05` take longer where they read more from
  shared memory than it gives in the time of the products.

DRAM and matrix units reach the share of their peaks that others have measured, so that no prediction is above what was
ever measured: {attained}. The reason for the cap on matrix units is power: the clock falls when all of them are busy.
A call of less than {short:.0f} us is mostly launch and latency; the table calls it short and gives no share.

The model assumes cold caches and boost clocks, and that an atomic operation takes as long as a sector of L2. Counts are
of PTX, not of SASS. Where the code of a machine has the configuration of that for sm_80, or cannot be emulated, the
counts are those of sm_80 without the work of `wgmma` and `tcgen05`; registers, shared memory, latencies and the
operands of these instructions are the machine's own. The figures show which resource to look at, and whether anything
in the code rules out the roof. They do not show how fast the code is.
"""


def stored(results: Path) -> list[Record]:
    """The proofs of all versions of Triton in a folder, the oldest first."""
    proofs = [json.loads(path.read_text()) for path in results.glob("proof-*.json")]
    return sorted(proofs, key=lambda proof: number(proof["triton"]))


def page(proofs: Sequence[Record], times: Record) -> str:
    """The whole page, as Markdown.

    Args:
        proofs: of each version of Triton, the oldest first.
        times: results/proof.json.
    """
    failures = union(proofs, times)
    verdict = f"**{len(failures)} checks failed; they are listed below.**" if failures else "All checks passed."
    parts = [OPENING.format(machine=times["machine"], versions=times["versions"], verdict=verdict)]
    if failures:
        lines = [
            f"- {each['op']}, {each['target'] or 'all targets'}, Triton {each['triton']}: {each['reason']}"
            for each in failures
        ]
        parts.append("\n".join(["## What failed", "", *lines]) + "\n")
    for title, lines in (
        ("Versions of Triton", [VERSIONS, "", *versions_table(proofs, times)]),
        ("Where the versions differ", [DIFFERENCES, "", *differences_table(proofs)]),
        ("Every op on every architecture", [CELLS, "", *ops_table(proofs, times)]),
        ("Predicted times at the sizes of Gemma-2", _times_table(times)),
        ("A decoded token, predicted", _steps_table(times)),
        ("Spherical interpolation in one launch, predicted", _slerp_table(times)),
        ("Kernels that others have measured, and the model", _published_table()),
    ):
        parts.append("\n".join([f"## {title}", "", *lines]) + "\n")
    return "\n".join(parts).rstrip("\n") + "\n" + _explanation()


def _explanation() -> str:
    attained = ", ".join(
        f"{machine.name} {machine.attained_bandwidth:.1%} of DRAM and {machine.attained_tensor:.1%} of the matrix units"
        for machine in MACHINES
    )
    return EXPLANATION.format(
        machines=", ".join(NAMES),
        samples=SAMPLES[0],
        node=NODE * 1e6,
        latency=LATENCY * 1e9,
        attained=attained,
        short=SHORT * 1e6,
    )


def _times_table(times: Record) -> list[str]:
    rows = []
    for record in times["predicted"]:
        cells = (
            [_time(record["machines"][name]) for name in NAMES] if "machines" in record else ["**failed**"] * len(NAMES)
        )
        rows.append([f"`{record['op']}`", record["case"], *cells])
    intro = (
        "Predicted time of a call in a CUDA graph, its share of the roof, and what takes the longest. Not measured. "
        f"The work was counted {times['date'][:10]}, commit {commit(times)}; {times['versions']}."
    )
    return [intro, "", *table(("op", "launch", *NAMES), rows)]


def _time(found: Record) -> str:
    share = "short" if found["fraction"] is None else f"{found['fraction']:.0%}"
    return f"{found['seconds'] * 1e6:,.1f} us, {share}, {found['bound']}"


def _steps_table(times: Record) -> list[str]:
    """The sums of the predicted times of all kernels of a step."""
    records = {(each["op"], each["case"]): each for each in times["predicted"] if "machines" in each}
    rows = []
    for shape in GEMMA_2:
        kernels = _step(shape)
        cells = []
        for machine in MACHINES:
            if not all(kernel in records for kernel in kernels):
                cells.append("**failed**")
            elif sum(count * records[kernel]["minimum_bytes"] for kernel, count in kernels.items()) > machine.memory:
                cells.append("does not fit")
            else:
                found = {kernel: records[kernel]["machines"][machine.name]["seconds"] for kernel in kernels}
                seconds = sum(count * found[kernel] for kernel, count in kernels.items())
                cells.append(f"{seconds * 1e3:.2f} ms, {1 / seconds:,.0f} tokens/s")
        rows.append([shape.name, str(sum(kernels.values())), *cells])
    intro = (
        "One sequence of 512 tokens, the kernels of a step one after another in a CUDA graph. Not measured, and "
        "without what the host does between steps. For the steps of other engines the model is too fast: see the last "
        "row of the next table."
    )
    return [intro, "", *table(("model", "calls", *NAMES), rows)]


def _step(shape: Shape) -> dict[tuple[str, str], int]:
    """(op, case) and how often a step calls it. Every other layer has a window."""
    windowed = (shape.layers + 1) // 2
    return {
        ("rmsnorm", f"{shape.name} 1 rows of float32"): 1,
        ("linear", f"{shape.name} q|k|v, 1 tokens"): shape.layers,
        ("attention_decode", f"{shape.name} 512 tokens, a window of {shape.sliding_window}"): windowed,
        ("attention_decode", f"{shape.name} 512 tokens"): shape.layers - windowed,
        ("linear", f"{shape.name} o, 1 tokens"): shape.layers,
        ("linear_geglu", f"{shape.name} gate|up, 1 tokens"): shape.layers,
        ("linear", f"{shape.name} down, 1 tokens"): shape.layers,
        ("rmsnorm_add_rmsnorm", f"{shape.name} 1 rows on float32"): 2 * shape.layers,
        ("lm_head_argmax", shape.name): 1,
    }


def _slerp_table(times: Record) -> list[str]:
    rows = []
    for shape in GEMMA_2:
        elements = shape.elements()
        cells = [
            _slerp(times["slerp"], machine, elements) if 6 * sum(elements) < machine.memory else "does not fit"
            for machine in MACHINES
        ]
        rows.append([shape.name, f"{sum(elements) / 1e9:.2f}", *cells])
    intro = (
        "`csrc/cuda/slerp.cu` on two parents in the memory of the GPU: bytes of DRAM for each element, the time, and "
        "what takes the longest. Not measured. The kernel reads the segments of a batch in reverse order for the "
        "output, and half of L2 is taken to hold what was read last; else it would move 10 bytes. The instructions are "
        "those of a pair of four segments, which was emulated. A batch has a barrier: the accesses that wait for one "
        "another are counted for each."
    )
    return [intro, "", *table(("model", "billion elements", *NAMES), rows)]


def _slerp(found: Record, machine: Machine, elements: Sequence[int]) -> str:
    number = machine.target.removeprefix("sm_")
    record = found.get(target_of((int(number[:-1]), int(number[-1]))))
    if record is None:
        return "not compiled"
    cache, share = int(machine.cache), sum(elements) / record["elements"]
    code = Code(**record["code"])
    code = replace(code, dependent_loads=code.dependent_loads * (len(batches_of(elements, cache)) - 1))
    resident = resident_blocks(machine.limits, code.registers, code.shared, code.warps)
    work = {name: amount * share for name, amount in record["work"].items()}
    moved = traffic(elements, cache)
    whole = Work(**{**work, "blocks": resident * machine.multiprocessors})
    prediction = predict(machine, code, whole, moved * sum(elements))
    return f"{moved:.2f} bytes, {prediction.seconds * 1e3:.1f} ms, {prediction.bound}"


def _published_table() -> list[str]:
    rows = [
        [
            f"{each.kernel}{'*' if each.sets_cap else ''}",
            each.machine.name,
            each.shape,
            f"{each.measured:,.4g} {each.unit}",
            str(each.source),
            f"{each.predicted:,.4g} {each.unit}",
            f"{round(each.error * 100) or 0:+d}%",
        ]
        for each in PUBLISHED
    ]
    intro = (
        "The column *measured by others* is from the source that is named; no figure in it is ours. A source is "
        "quoted, read from the numbers of a plot, taken from others who report it, or not verified, where we know the "
        "figure but could not read it in its place again. The same model predicts each, from the tiles that the "
        "kernel's source names. Error: predicted over measured speed, less 1; above 0 the model is too fast. The model "
        "takes a cap from the figures with a star, which therefore check little. No constant was fitted to the others."
    )
    headings = ("kernel", "GPU", "shape", "measured by others", "source", "predicted", "error")
    return [intro, "", *table(headings, rows)]
