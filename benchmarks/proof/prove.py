"""Verifies the kernels as far as is possible without a GPU; writes results/proof.json and docs/proof.md.

python benchmarks/proof/prove.py [all|predictions|model]

This process interprets every case. A background process on two cores compiles, emulates and predicts. Exits with 1 if
anything fails; both files list the failures.

predictions: count again only the work from which times are predicted, and keep the rest of results/proof.json.
model: predict the times again from the work in results/proof.json, after a change of the model.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))

import torch
from page import page

from _bench import RESULTS, provenance
from cases import SMALL, Case
from emulation import interpreter, prover
from emulation.compilation import TARGETS
from emulation.evidence import Evidence, interpreted, same_values, targets_of
from emulation.nvcc import slerp_work

PAGE = Path(__file__).resolve().parents[2] / "docs" / "proof.md"
Record = dict[str, Any]


def interpret(case: Case) -> tuple[Record, Evidence | None]:
    """A case in the interpreter, with the tiles of every architecture, whose worst results count.

    Without evidence if one raises, as for an access out of bounds. The evidence is that of the tiles for sm_80.
    """
    record: Record = {"op": case.op, "case": case.name, "stated_ratio": case.traffic}
    try:
        found = [interpreted(case, target) for target in targets_of(case, list(TARGETS))]
    except Exception as error:
        return {**record, "failed": f"{type(error).__name__}: {error}"[:2000]}, None
    ratios = [each.ratio for each in found if each.ratio is not None]
    return {**record, "error": max(each.error for each in found), "ratio": max(ratios, default=None)}, found[0]


def compare(record: Record, case: Case, evidence: Evidence | None, folder: Path) -> Record:
    """The record of an emulated case, with whether its outputs have the bits of the interpreter."""
    if "file" not in record or evidence is None:
        return record
    outputs = torch.load(folder / record.pop("file"))
    same = all(same_values(got, evidence.outputs[name]) for name, got in outputs.items())
    return {**record, "same_bits": same, "same_bits_due": case.exact}


def shortcomings(proof: dict[str, Any]) -> list[Record]:
    """Everything that is not as it must be: op, target (none: all), reason."""
    found = [
        {"op": op, "target": target, "reason": reason}
        for (op, target), reasons in prover.failures(proof).items()
        for reason in reasons
    ]

    def missing(record: Record, target: str, reason: str) -> None:
        found.append({"op": record["op"], "target": target, "reason": f"{record['case']}: {reason}"})

    for record in proof["interpreted"]:
        if "failed" in record:
            continue  # named by failures()
        if record["error"] > 1:
            missing(record, "", f"interpreted, {record['error']:.3g} times the tolerance from the truth")
        if record["stated_ratio"] is not None and abs(record["ratio"] - record["stated_ratio"]) > 1e-12:
            missing(record, "", f"moves {record['ratio']!r} of the minimum, {record['stated_ratio']!r} is stated")
    for record in proof["emulated"] + proof.get("corners", []):
        if record.get("error", 0.0) > 1:
            missing(record, record["target"], f"emulated, {record['error']:.3g} times the tolerance from the truth")
        if record.get("same_bits_due") and not record["same_bits"]:
            missing(record, record["target"], "emulated, other bits than the interpreter's")
    return found


def lines(proof: dict[str, Any]) -> str:
    """JSON with a line for each record, so that two proofs can be compared."""
    fields = []
    for name, value in proof.items():
        text = ",\n".join(map(json.dumps, value)) if isinstance(value, list) else json.dumps(value)
        fields.append(f"{json.dumps(name)}: " + (f"[\n{text}\n]" if isinstance(value, list) else text))
    return "{\n" + ",\n".join(fields) + "\n}\n"


def everything() -> dict[str, Any]:
    """All records."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = prover.start("full", folder)
        try:
            results = {(case.op, case.name): (case, *interpret(case)) for case in SMALL}
            slerp = slerp_work(folder)
            proof: dict[str, Any] = {**prover.finished(process, folder), "slerp": slerp}
        finally:
            prover.stop(process)
        proof["interpreted"] = [record for _, record, _ in results.values()]
        proof["emulated"] = [
            compare(record, case, evidence, folder)
            for record in proof["emulated"]
            for case, _, evidence in [results[record["op"], record["case"]]]
        ]
    return proof


def predictions() -> dict[str, Any]:
    """The records of predicted times."""
    with tempfile.TemporaryDirectory() as name:
        process = prover.start("predictions", Path(name))
        try:
            slerp = slerp_work(Path(name))
            return {"predicted": prover.finished(process, Path(name))["predicted"], "slerp": slerp}
        finally:
            prover.stop(process)


def main(part: str = "all") -> int:
    source = provenance("arcmerge", "torch", "triton", "numpy")
    if part == "all":
        interpreter.install()
        proof = {**source, "failures": [], "predictions_from": source, **everything()}
    else:
        proof = json.loads((RESULTS / "proof.json").read_text())
        if part == "predictions":
            proof |= {"predictions_from": source, **predictions()}
        for record in proof["predicted"]:
            if "failed" not in record:
                record["machines"] = prover.predicted_times(record)
    proof["failures"] = shortcomings(proof)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "proof.json").write_text(lines(proof))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(proof))
    for failure in proof["failures"]:
        print(f"FAILED {failure['op']} {failure['target'] or 'everywhere'}: {failure['reason']}")
    print(f"{len(proof['failures'])} failures; written: {RESULTS / 'proof.json'}, {PAGE}")
    return 1 if proof["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
