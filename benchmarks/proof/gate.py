"""What the gate refuses: shortcomings of the facts that one version of Triton gives, and of all versions together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emulation import prover
from emulation.compilation import TARGETS

Record = dict[str, Any]


def shortcomings(facts: Mapping[str, Sequence[Record]]) -> list[Record]:
    """Everything that is not as it must be: op, target ("": all targets), reason.

    Args:
        facts: records by kind, as the prover and the interpreter give them; a kind may be missing.
    """
    kinds: dict[str, Sequence[Record]] = {"compiled": [], "emulated": [], "corners": [], "interpreted": [], **facts}
    found = [
        {"op": op, "target": target, "reason": reason}
        for (op, target), reasons in prover.failures({"predicted": [], **kinds}).items()
        for reason in reasons
    ]

    def missing(record: Record, target: str, reason: str) -> None:
        found.append({"op": record["op"], "target": target, "reason": f"{record['case']}: {reason}"})

    for record in kinds["interpreted"]:
        if "failed" in record:
            continue  # named by failures()
        if record["error"] > 1:
            missing(record, "", f"interpreted, {record['error']:.3g} times the tolerance from the truth")
        if record["stated_ratio"] is not None and abs(record["ratio"] - record["stated_ratio"]) > 1e-12:
            missing(record, "", f"moves {record['ratio']!r} of the minimum, {record['stated_ratio']!r} is stated")
    for record in [*kinds["emulated"], *kinds["corners"]]:
        if record.get("error", 0.0) > 1:
            missing(record, record["target"], f"emulated, {record['error']:.3g} times the tolerance from the truth")
        if record.get("same_bits_due") and not record["same_bits"]:
            missing(record, record["target"], "emulated, other bits than the interpreter's")
    return found


def union(proofs: Iterable[Record], times: Record) -> list[Record]:
    """The failures of all versions, each with its version (triton), and the cells that a version does not have.

    Args:
        proofs: what results/proof-VERSION.json holds, of each version.
        times: what results/proof.json holds.
    """
    proofs = list(proofs)
    cells = {(op, target) for op in ops(proofs) for target in TARGETS}
    found = [{"triton": proof["triton"], **failure} for proof in proofs for failure in proof["failures"]]
    for proof in proofs:
        absent = cells - {(each["op"], each["target"]) for each in proof["compiled"]}
        found += [
            {"triton": proof["triton"], "op": op, "target": target, "reason": "not compiled"}
            for op, target in sorted(absent)
        ]
    return found + [{"triton": times["triton"], **failure} for failure in times["failures"]]


def ops(proofs: Iterable[Record]) -> list[str]:
    """All ops, in the order of the cases."""
    return list(dict.fromkeys(record["op"] for proof in proofs for record in proof["compiled"]))
