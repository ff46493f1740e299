"""The quick part of the proof of every kernel on a machine without a GPU. `make prove` does all of it.

A process without the interpreter compiles and emulates in the background while this one interprets.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cases import MODELS, SMALL, Case
from cases.corners import CORNERS, Corner
from emulation import prover
from emulation.compilation import TARGETS
from emulation.evidence import Evidence, interpreted, same_values, targets_of
from emulation.prover import Record

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU")
every_case = pytest.mark.parametrize("case", SMALL, ids=str)

OPS = tuple(dict.fromkeys(case.op for case in SMALL + MODELS))
ROOT = Path(__file__).resolve().parents[2]

Background = tuple[subprocess.Popen[str], Path]
Facts = dict[str, list[Record]]


@pytest.fixture(scope="session")
def background(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    folder = tmp_path_factory.mktemp("proof")
    process = prover.start("quick", folder)
    yield process, folder
    prover.stop(process)


@pytest.fixture(scope="session")
def facts(background: Background) -> Facts:
    return prover.finished(*background)


@cache
def evidence(case: Case, target: str = "sm_80") -> Evidence:
    return interpreted(case, target)


def record_of(facts: Facts, kind: str, **fields: str) -> Record:
    (record,) = (each for each in facts[kind] if fields.items() <= each.items())
    return record


@every_case
def test_the_interpreter_agrees_with_the_truth_with_the_tiles_of_every_architecture(
    case: Case, background: Background
) -> None:
    for target in targets_of(case, list(TARGETS)):
        found = evidence(case, target)
        assert found.error <= 1, target
        if case.traffic is not None:
            assert found.ratio == pytest.approx(case.traffic, rel=1e-12), target


@every_case
def test_the_code_for_sm_80_agrees_with_the_truth_and_the_interpreter(
    case: Case, facts: Facts, background: Background
) -> None:
    record = record_of(facts, "emulated", op=case.op, case=case.name, target="sm_80")
    assert "error" in record, record
    assert record["error"] <= 1
    if case.exact:
        outputs = torch.load(background[1] / record["file"])
        assert set(outputs) == set(evidence(case).outputs)
        assert [name for name, got in outputs.items() if not same_values(got, evidence(case).outputs[name])] == []


@pytest.mark.parametrize("case", [case for case in SMALL if case.op in prover.BY_WARPGROUPS], ids=str)
def test_the_code_for_sm_90_agrees_with_the_truth(case: Case, facts: Facts) -> None:
    record = record_of(facts, "emulated", op=case.op, case=case.name, target="sm_90")
    assert "error" in record, record
    assert record["error"] <= 1


@pytest.mark.parametrize("target", prover.QUICK_TARGETS)
@pytest.mark.parametrize("corner", CORNERS, ids=str)
def test_the_code_for_the_far_corner_of_a_large_launch_is_right(corner: Corner, target: str, facts: Facts) -> None:
    record = record_of(facts, "corners", op=corner.op, case=corner.name, target=target)
    assert "error" in record, record
    assert record["error"] <= 1


@pytest.mark.parametrize("target", prover.QUICK_TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_what_gemma_2_launches_passes_the_gate(op: str, target: str, facts: Facts) -> None:
    assert prover.failures(facts).get((op, target), []) == []
    record = record_of(facts, "compiled", op=op, target=target)
    assert list(record["launched"]) == [case.name for case in MODELS if case.op == op]


# The kernels of a decode step, and those of a prompt that have no more to do than to move bytes.
DEPENDENT = {
    op for op in OPS if op.startswith(("rmsnorm", "rope_cache", "attention_decode", "geglu", "linear", "lm_head"))
}


def test_the_kernels_of_a_step_start_before_the_one_before_has_ended_where_a_gpu_can(facts: Facts) -> None:
    for target in prover.QUICK_TARGETS:
        for op in OPS:
            kernels = record_of(facts, "compiled", op=op, target=target)["kernels"].values()
            assert {each["dependent"] for each in kernels} == {op in DEPENDENT and target == "sm_90"}, (op, target)


def test_combine_rounds_every_product_and_writes_sixteen_bytes_at_a_time(facts: Facts) -> None:
    for target in prover.QUICK_TARGETS:
        kernels = record_of(facts, "compiled", op="combine", target=target)["kernels"].values()
        assert len(kernels) == 7  # of 2 to 8 inputs
        assert [kernel for kernel in kernels if kernel["fused"] or not kernel["wide_stores"]] == []


# ---- faults are named


def _spill(record: Record) -> None:
    next(iter(record["kernels"].values()))["faults"].append("5 accesses to spilled registers")


def _store_narrowly(record: Record) -> None:
    for kernel in record["kernels"].values():
        kernel["wide_stores"] = 0


def _load_narrowly(record: Record) -> None:
    for kernel in record["kernels"].values():
        kernel["wide_loads"] = 0


def _multiply_more(record: Record) -> None:
    record["launched"]["2.6B gate_proj of 2"]["operations_per_byte"] = 100.0


@pytest.mark.parametrize(
    ("change", "reason", "count"),
    [
        (_spill, "5 accesses to spilled registers", 1),
        (_store_narrowly, "no stores of 16 bytes, which sm_80 has", 9),  # one for each launch of the models
        (_load_narrowly, "no loads of 16 bytes, which sm_80 has", 18),  # and that they are promised
        (_multiply_more, "2.6B gate_proj of 2: no matrix instructions for 100 operations a byte", 1),
        (lambda record: record.update(failed="ptxas died"), "compilation: ptxas died", 1),
    ],
)
def test_the_gate_names_what_is_wrong_with_code(
    change: Callable[[Record], None], reason: str, count: int, facts: Facts
) -> None:
    changed = {**facts, "compiled": copy.deepcopy(facts["compiled"])}
    change(record_of(changed, "compiled", op="combine", target="sm_90"))
    reasons = prover.failures(changed).pop(("combine", "sm_90"))
    assert len(reasons) == count
    assert any(each.endswith(reason) for each in reasons)


def test_scalar_accesses_and_faults_are_named() -> None:
    scalar = {"op": "gram", "case": "2.6B", "bytes_per_request": 64.0, "access_bytes": 16}
    fault = {"op": "gram", "case": "small", "target": "sm_86", "fault": "out of bounds"}
    assert prover.failures({"emulated": [fault], "compiled": [], "predicted": [scalar]}) == {
        ("gram", "sm_86"): ["small: out of bounds"],
        ("gram", "sm_80"): ["2.6B: 64 bytes a request of a warp, where 16 bytes a lane are promised"],
    }


# ---- the page


@pytest.fixture(scope="module")
def proof_page() -> ModuleType:
    specification = importlib.util.spec_from_file_location("proof_page", ROOT / "benchmarks" / "proof" / "page.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_says_what_the_results_say(proof_page: ModuleType) -> None:
    proof = json.loads((ROOT / "benchmarks" / "results" / "proof.json").read_text())
    assert (ROOT / "docs" / "proof.md").read_text() == proof_page.page(proof)


def test_the_page_shows_what_failed(proof_page: ModuleType) -> None:
    proof = json.loads((ROOT / "benchmarks" / "results" / "proof.json").read_text())
    proof["failures"] = [{"op": "gram", "target": "sm_90", "reason": "it spills"}]
    lines = proof_page.page(proof).splitlines()
    assert "- gram, sm_90: it spills" in lines
    (cell,) = (line for line in lines if line.startswith("| `gram` | sm_90 |"))
    assert cell.endswith("| **failed** |")
    assert not any(line.startswith("| `gram` | sm_80 |") and "**failed**" in line for line in lines)
