"""The quick part of the proof of every kernel on a machine without a GPU. `make prove` does all of it.

A process without the interpreter compiles and emulates in the background while this one interprets.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

from cases import MODELS, SMALL, Blank, Case
from cases.corners import CORNERS, Corner
from emulation import prover
from emulation.compilation import TARGETS, Facts, as_json
from emulation.evidence import Evidence, interpreted, launches_of, same_values, targets_of
from emulation.prover import Record

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU")
every_case = pytest.mark.parametrize("case", SMALL, ids=str)

OPS = tuple(dict.fromkeys(case.op for case in SMALL + MODELS))
ROOT = Path(__file__).resolve().parents[2]

Background = tuple[subprocess.Popen[str], Path]
Found = dict[str, list[Record]]


@pytest.fixture(scope="session")
def background(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    folder = tmp_path_factory.mktemp("proof")
    process = prover.start("quick", folder)
    yield process, folder
    prover.stop(process)


@pytest.fixture(scope="session")
def facts(background: Background) -> Found:
    return prover.finished(*background)


@cache
def evidence(case: Case, target: str = "sm_80") -> Evidence:
    return interpreted(case, target)


def record_of(facts: Found, kind: str, **fields: str) -> Record:
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
    case: Case, facts: Found, background: Background
) -> None:
    record = record_of(facts, "emulated", op=case.op, case=case.name, target="sm_80")
    assert "error" in record, record
    assert record["error"] <= 1
    if case.exact:
        outputs = torch.load(background[1] / record["file"])
        assert set(outputs) == set(evidence(case).outputs)
        assert [name for name, got in outputs.items() if not same_values(got, evidence(case).outputs[name])] == []


@pytest.mark.parametrize("case", [case for case in SMALL if case.op in prover.BY_WARPGROUPS], ids=str)
def test_the_code_for_sm_90_agrees_with_the_truth(case: Case, facts: Found) -> None:
    record = record_of(facts, "emulated", op=case.op, case=case.name, target="sm_90")
    assert "error" in record, record
    assert record["error"] <= 1


@pytest.mark.parametrize("target", prover.QUICK_TARGETS)
@pytest.mark.parametrize("corner", CORNERS, ids=str)
def test_the_code_for_the_far_corner_of_a_large_launch_is_right(corner: Corner, target: str, facts: Found) -> None:
    record = record_of(facts, "corners", op=corner.op, case=corner.name, target=target)
    assert "error" in record, record
    assert record["error"] <= 1


@pytest.mark.parametrize("target", prover.QUICK_TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_what_gemma_2_launches_passes_the_gate(op: str, target: str, facts: Found) -> None:
    assert prover.failures(facts).get((op, target), []) == []
    record = record_of(facts, "compiled", op=op, target=target)
    assert list(record["launched"]) == [case.name for case in MODELS if case.op == op]


# The choices of this launcher do not depend on the target, and its calls take long to build.
@pytest.mark.parametrize("op", [op for op in OPS if op != "consensus_combine"])
def test_what_gemma_2_launches_on_other_targets_is_in_the_proof(op: str) -> None:
    """A launcher chooses something else? `make prove` compiles it."""
    stored = ROOT / "benchmarks" / "results" / f"proof-{triton.__version__}.json"
    if not stored.exists():
        pytest.skip("the kernels were not verified with this version of Triton")
    compiled = {
        (record["target"], each["kernel"], each["configuration"], each["warps"], each["stages"])
        for record in json.loads(stored.read_text())["compiled"]
        if record["op"] == op
        for each in record["kernels"].values()
    }
    for call in (case.build(Blank()) for case in MODELS if case.op == op):
        for target in (target for target in TARGETS if target not in prover.QUICK_TARGETS):
            for launch in launches_of(call, target):
                chosen = ", ".join(f"{name}={value}" for name, value in launch.constants.items())
                options = launch.options["num_warps"], launch.options.get("num_stages")
                assert any(
                    known[:3] == (target, launch.kernel, chosen)
                    and known[3] == options[0]
                    and options[1] in (None, known[4])
                    for known in compiled
                ), (target, launch)


# The kernels of a model.
DEPENDENT = {op for op in OPS if op.startswith(("rmsnorm", "rope_cache", "attention", "geglu", "linear", "lm_head"))}


def test_the_kernels_of_a_step_start_before_the_one_before_has_ended_where_a_gpu_can(facts: Found) -> None:
    for target in prover.QUICK_TARGETS:
        for op in OPS:
            kernels = record_of(facts, "compiled", op=op, target=target)["kernels"].values()
            assert {each["dependent"] for each in kernels} == {op in DEPENDENT and target == "sm_90"}, (op, target)


def test_combine_rounds_every_product_and_writes_sixteen_bytes_at_a_time(facts: Found) -> None:
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
    change: Callable[[Record], None], reason: str, count: int, facts: Found
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


# ---- several versions of Triton, and the page

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def proof_page() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks" / "proof"))
        yield importlib.import_module("page")


@pytest.fixture
def times() -> Record:
    return dict(json.loads((RESULTS / "proof.json").read_text()))


def proof_of(version: str, *, kernel: str = "_sum", spills: int = 0, registers: int = 40, gate: ModuleType) -> Record:
    """A made-up proof: one op, with one kernel on each architecture, which spills on sm_90."""
    compiled: list[Record] = []
    for target in TARGETS:
        fields = {field.name: 0 for field in dataclasses.fields(Facts)}
        numbers = {"registers": registers, "shared": 2048, "spills": spills if target == "sm_90" else 0}
        names = {"kernel": kernel, "target": target, "configuration": "TILE=8", "matrix_instruction": "mma.sync"}
        facts = as_json(Facts(**{**fields, **numbers, **names}))
        launched = {"small": {"kernels": ["key"], "operations_per_byte": 0.0}}
        compiled.append({"op": "sum", "target": target, "kernels": {"key": facts}, "launched": launched})
    interpreted = [{"op": "sum", "case": "small", "stated_ratio": 1.0, "ratio": 1.0, "error": 0.5}]
    emulated = [{"op": "sum", "case": "small", "target": "sm_90", "error": 0.25}]
    found: dict[str, list[Record]] = {
        "compiled": compiled,
        "emulated": emulated,
        "corners": [],
        "interpreted": interpreted,
    }
    source = {"triton": version, "date": "2026-11-28", "commit": "0123456789"}
    return {**source, "failures": gate.shortcomings(found), **found}


@pytest.fixture
def gate(proof_page: ModuleType) -> ModuleType:
    return importlib.import_module("gate")


def row_of(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_cell_fails_if_it_spills_with_one_version(proof_page: ModuleType, gate: ModuleType, times: Record) -> None:
    proofs = [proof_of("3.6.0", spills=5, registers=255, gate=gate), proof_of("3.9.0", gate=gate)]
    assert [(each["triton"], each["op"], each["target"]) for each in gate.union(proofs, times)] == [
        ("3.6.0", "sum", "sm_90")
    ]
    text = proof_page.page(proofs, times)
    assert "- sum, sm_90, Triton 3.6.0: _sum (TILE=8): 5 accesses to spilled registers" in text.splitlines()
    # Two configurations, the largest count of registers, all spills.
    assert row_of(text, "`sum` | sm_90")[2:5] == ["2", "255", "5"]
    assert row_of(text, "`sum` | sm_90")[-1] == "**failed**"
    assert row_of(text, "`sum` | sm_80")[-1] == "passed"
    assert row_of(text, "3.6.0")[3:7] == ["5", "1 of 1", "1 of 1", "1"]
    assert row_of(text, "3.9.0")[3:7] == ["0", "1 of 1", "1 of 1", "0"]


def test_versions_that_do_not_spill_pass(proof_page: ModuleType, gate: ModuleType, times: Record) -> None:
    proofs = [proof_of("3.6.0", gate=gate), proof_of("3.10.0", gate=gate)]
    assert gate.union(proofs, times) == []
    text = proof_page.page(proofs, times)
    assert "**failed**" not in text
    assert "No cell differs." in text
    assert text.index("| 3.6.0 |") < text.index("| 3.7 |") < text.index("| 3.10.0 |")
    assert row_of(text, "3.7")[2:] == ["not verified"] * 6


def test_a_cell_that_one_version_does_not_have_fails(gate: ModuleType, times: Record) -> None:
    proofs = [proof_of("3.6.0", gate=gate), proof_of("3.9.0", gate=gate)]
    del proofs[0]["compiled"][2]
    (failure,) = gate.union(proofs, times)
    assert failure == {"triton": "3.6.0", "op": "sum", "target": list(TARGETS)[2], "reason": "not compiled"}


def test_the_page_names_the_kernel_that_serves_where_another_is_missing(
    proof_page: ModuleType, gate: ModuleType, times: Record
) -> None:
    proofs = [proof_of("3.6.0", gate=gate), proof_of("3.9.0", kernel="_sum_specialised", gate=gate)]
    proofs[1]["compiled"][0] = copy.deepcopy(proofs[0]["compiled"][0])
    text = proof_page.page(proofs, times)
    differing = text[text.index("## Where the versions differ") : text.index("## Every op")]
    cell = "1 configurations; 40 registers, 2.0 KiB, 1 of 1 emulated"
    assert row_of(differing, "`sum` | sm_90")[2:] == [f"`_sum`; {cell}", f"`_sum_specialised`; {cell}"]
    assert "| `sum` | sm_80 |" not in differing


def test_the_page_says_what_the_results_say(proof_page: ModuleType, times: Record) -> None:
    assert (ROOT / "docs" / "proof.md").read_text() == proof_page.page(proof_page.stored(RESULTS), times)


def test_results_are_of_versions_that_make_prove_verifies(proof_page: ModuleType) -> None:
    makefile = (ROOT / "Makefile").read_text()
    newest = re.findall(r"^triton==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    oldest = re.findall(r"^OLDEST_TRITON := (.*)$", makefile, re.MULTILINE)
    (between,) = re.findall(r"^TRITONS := \$\(OLDEST_TRITON\)(.*)\$\(NEWEST_TRITON\)$", makefile, re.MULTILINE)
    versions = {proof["triton"] for proof in proof_page.stored(RESULTS)}
    assert set(newest) <= versions <= {*oldest, *between.split(), *newest}
