"""The tables of docs/proof.md on what all versions of Triton have in common, and on where they differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gate import ops, union

from emulation.compilation import TARGETS
from emulation.resources import LIMITS, MACHINES

Record = Mapping[str, Any]

# The versions of torch whose CUDA builds bring a Triton; pyproject.toml has the range that is allowed.
TORCH = {"3.6": "2.10, 2.11", "3.7": "2.12, 2.13", "3.8": "2.14"}


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [_line(headings), _line(["---"] * len(headings)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[str]) -> str:
    """From the first to the last."""
    return "" if not values else values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def of(proofs: Iterable[Record], kind: str, **fields: str) -> list[Record]:
    """The records of a kind that have these fields."""
    return [record for proof in proofs for record in proof[kind] if fields.items() <= record.items()]


def kernels_of(proofs: Iterable[Record], **fields: str) -> list[Record]:
    """The compiled kernels; a job that failed has none."""
    return [kernel for record in of(proofs, "compiled", **fields) for kernel in record.get("kernels", {}).values()]


# ---- versions


def versions_table(proofs: Sequence[Record], times: Record) -> list[str]:
    """A row for each version that was verified, and for those that only come with a torch."""
    headings = (
        "Triton",
        "comes with torch for CUDA",
        "configurations",
        "spills",
        "interpreted",
        "emulated",
        "cells that failed",
        "verified",
    )
    failures = union(proofs, times)
    rows = {}
    for proof in proofs:
        version, kernels = proof["triton"], kernels_of([proof])
        failed = {(each["op"], each["target"]) for each in failures if each["triton"] == version}
        rows[version] = [
            version,
            TORCH.get(minor(version), "none"),
            str(len(kernels)),
            str(sum(kernel["spills"] for kernel in kernels)),
            _ran(proof["interpreted"]),
            _ran([*proof["emulated"], *proof["corners"]]),
            str(len(failed)),
            f"{proof['date'][:10]}, commit {commit(proof)}",
        ]
    for version in set(TORCH) - set(map(minor, rows)):
        rows[version] = [version, TORCH[version], *["not verified"] * 6]
    return table(headings, (rows[version] for version in sorted(rows, key=number)))


def number(version: str) -> tuple[int, ...]:
    """A version as a key to sort by."""
    return tuple(map(int, version.split(".")))


def commit(proof: Record) -> str:
    """The commit of a proof, in words."""
    changed = " with uncommitted changes" if proof["commit"].endswith("-dirty") else ""
    return proof["commit"].removesuffix("-dirty") + changed


def _ran(records: Sequence[Record]) -> str:
    return f"{sum('error' in record for record in records):,} of {len(records):,}"


def differences_table(proofs: Sequence[Record]) -> list[str]:
    """A row for each cell in which launchers choose, or the emulator executes, not the same with every version."""
    rows = []
    for op in ops(proofs):
        for target in TARGETS:
            found = [_Cell.of(proof, op, target) for proof in proofs]
            if any(each.chosen != found[0].chosen or each.ran != found[0].ran for each in found):
                names = len({each.names for each in found}) > 1
                rows.append([f"`{op}`", target, *(each.text(names) for each in found)])
    versions = [f"Triton {proof['triton']}" for proof in proofs]
    return table(("op", "architecture", *versions), rows) if rows else ["No cell differs."]


@dataclass(frozen=True)
class _Cell:
    """What one version has in a cell. chosen: kernels with constants, warps and stages; ran: cases of the emulator."""

    kernels: Sequence[Record]
    names: tuple[str, ...]
    chosen: frozenset[tuple[Any, ...]]
    ran: str

    @classmethod
    def of(cls, proof: Record, op: str, target: str) -> _Cell:
        kernels = kernels_of([proof], op=op, target=target)
        return cls(
            kernels,
            tuple(sorted({kernel["kernel"] for kernel in kernels})),
            frozenset(
                tuple(kernel[name] for name in ("kernel", "configuration", "warps", "stages")) for kernel in kernels
            ),
            _ran(of([proof], "emulated", op=op, target=target)),
        )

    def text(self, names: bool) -> str:
        if not self.kernels:
            return "not compiled"
        largest = {name: max(kernel[name] for kernel in self.kernels) for name in ("registers", "shared")}
        kernels = [", ".join(f"`{name}`" for name in self.names)] if names else []
        facts = f"{largest['registers']} registers, {largest['shared'] / 1024:.1f} KiB, {self.ran} emulated"
        return "; ".join([*kernels, f"{len(self.chosen)} configurations", facts])


# ---- ops and architectures


def ops_table(proofs: Sequence[Record], times: Record) -> list[str]:
    """A row for each op and architecture, of all versions together."""
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
    failed = {(each["op"], each["target"]) for each in union(proofs, times)}
    rows = []
    for op in ops(proofs):
        interpreted = of(proofs, "interpreted", op=op)
        for target in TARGETS:
            verdict = "**failed**" if failed & {(op, target), (op, "")} else "passed"
            kernels = kernels_of(proofs, op=op, target=target)
            emulated = _emulated(of(proofs, "emulated", op=op, target=target))
            rows.append(
                [
                    f"`{op}`",
                    target,
                    *(_compiled(kernels, target) if kernels else ["not compiled"] * 5),
                    _traffic(interpreted),
                    _error(interpreted),
                    emulated,
                    _fractions(times, op, target),
                    verdict,
                ]
            )
    return table(headings, rows)


def _compiled(kernels: Sequence[Record], target: str) -> list[str]:
    shared = max(kernel["shared"] for kernel in kernels) / 1024
    return [
        str(len(kernels)),
        str(max(kernel["registers"] for kernel in kernels)),
        str(sum(kernel["spills"] for kernel in kernels)),
        f"{shared:.1f} ({LIMITS[target].shared_block // 1024})",
        _matrix(kernels),
    ]


def _matrix(kernels: Sequence[Record]) -> str:
    due = [kernel for kernel in kernels if kernel["matrix_due"]]
    if not due:
        return "none due"
    names = sorted({kernel["matrix_instruction"] for kernel in due if kernel["matrix"]})
    return f"{sum(kernel['matrix'] > 0 for kernel in due)} of {len(due)} ({', '.join(names)})"


def _traffic(records: Iterable[Record]) -> str:
    stated = [record["ratio"] for record in records if record["stated_ratio"] is not None and "ratio" in record]
    return spread([f"{ratio:.4f}" for ratio in sorted(stated)]) or "not stated"


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


def _fractions(times: Record, op: str, target: str) -> str:
    names = [machine.name for machine in MACHINES if machine.target == target]
    if not names:
        return "no machine chosen"
    records = [each for each in times["predicted"] if each["op"] == op and "machines" in each]
    if not records:
        return "no model launches it"
    spans = []
    for name in names:
        found = [each["machines"][name]["fraction"] for each in records]
        fractions = sorted(fraction for fraction in found if fraction is not None)
        spans.append(f"{spread([f'{fraction:.0%}' for fraction in fractions]) or 'short'} ({name})")
    return ", ".join(spans)
