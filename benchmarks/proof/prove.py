"""Verifies the kernels as far as is possible without a GPU; writes results/proof*.json and docs/proof.md.

python benchmarks/proof/prove.py code|predictions|model|page

code: everything that depends on the version of Triton, with the one that this process imports (PYTHONPATH chooses it):
    results/proof-VERSION.json. This process interprets every case; a background process on two cores compiles and
    emulates.
predictions: count the work from which times are predicted: results/proof.json.
model: predict the times again from the work in results/proof.json, after a change of the model.
page: nothing else.

All but `code` write docs/proof.md from the results of all versions, and exit with 1 if any of them failed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))

import torch
import triton
from gate import shortcomings, union
from page import page, stored

from _bench import RESULTS, provenance
from cases import SMALL, Case
from emulation import interpreter, prover
from emulation.compilation import TARGETS
from emulation.evidence import Evidence, interpreted, same_values, targets_of
from emulation.nvcc import slerp_work

PAGE = Path(__file__).resolve().parents[2] / "docs" / "proof.md"
TIMES = RESULTS / "proof.json"
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


def lines(proof: dict[str, Any]) -> str:
    """JSON with a line for each record, so that two proofs can be compared."""
    fields = []
    for name, value in proof.items():
        text = ",\n".join(map(json.dumps, value)) if isinstance(value, list) else json.dumps(value)
        fields.append(f"{json.dumps(name)}: " + (f"[\n{text}\n]" if isinstance(value, list) else text))
    return "{\n" + ",\n".join(fields) + "\n}\n"


def code() -> dict[str, list[Record]]:
    """The facts that depend on the version of Triton."""
    interpreter.install()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = prover.start("code", folder)
        try:
            results = {}
            for number, case in enumerate(SMALL, 1):
                results[case.op, case.name] = (case, *interpret(case))
                if number % 20 == 0:
                    print(f"{number} of {len(SMALL)} cases interpreted", flush=True)
            facts = prover.finished(process, folder)
        finally:
            prover.stop(process)
        del facts["predicted"]
        facts["emulated"] = [
            compare(record, case, evidence, folder)
            for record in facts["emulated"]
            for case, _, evidence in [results[record["op"], record["case"]]]
        ]
        facts["interpreted"] = [record for _, record, _ in results.values()]
    return facts


def predictions() -> dict[str, Any]:
    """The work of every launch of the models, from which its times are predicted."""
    with tempfile.TemporaryDirectory() as name:
        process = prover.start("predictions", Path(name))
        try:
            slerp = slerp_work(Path(name))
            return {"predicted": prover.finished(process, Path(name))["predicted"], "slerp": slerp}
        finally:
            prover.stop(process)


def main(part: str) -> int:
    started = time.monotonic()
    source = {"triton": triton.__version__, **provenance("arcmerge", "torch", "triton", "numpy")}
    print(f"Triton {triton.__version__}: {part}", flush=True)
    if part == "code":
        facts = code()
        proof = {**source, "failures": shortcomings(facts), **facts}
        file = RESULTS / f"proof-{triton.__version__}.json"
        file.write_text(lines(proof))
        taken = time.monotonic() - started
        print(f"{len(proof['failures'])} failures; written after {taken / 60:.0f} minutes: {file}", flush=True)
        return 0
    times = {**source, "failures": [], **predictions()} if part == "predictions" else json.loads(TIMES.read_text())
    if part != "page":
        for record in times["predicted"]:
            if "failed" not in record:
                record["machines"] = prover.predicted_times(record)
        times["failures"] = shortcomings({"predicted": times["predicted"]})
        TIMES.write_text(lines(times))
    proofs = stored(RESULTS)
    PAGE.write_text(page(proofs, times))
    failures = union(proofs, times)
    for failure in failures:
        where = f"{failure['op']} {failure['target'] or 'everywhere'}"
        print(f"FAILED with Triton {failure['triton']}, {where}: {failure['reason']}")
    versions = ", ".join(proof["triton"] for proof in proofs)
    print(f"{len(failures)} failures with Triton {versions}; written: {PAGE}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
