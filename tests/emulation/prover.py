"""The part of a proof that needs a process without the interpreter: compile, emulate, predict.

`start` runs this module as such a process. It writes FOLDER/facts.json, and for each emulated case a file with its
outputs. The mode "quick", for the tests, compiles the launches of Gemma-2 for two targets and emulates SMALL for
sm_80, and for sm_90 the ops that multiply by warpgroups. "code" compiles every case for every target, and emulates it
for every target of NVIDIA whose instructions the emulator knows; "predictions" counts the work from which times are
predicted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from cases import MODELS, SMALL, Blank, Case
from cases.corners import CORNERS
from paths import PYTHONPATH, ROOT

from .compilation import TARGETS, Facts, as_json, compiling_for, describe, narrowed
from .emulator import Execution, emulating
from .evidence import emulated, emulated_corner
from .ptx.program import Fault, Unsupported
from .resources import MACHINES, Machine
from .roofline import MOST_INSTRUCTIONS, SAMPLES, SHORT, Code, Work, predict_call, roof, sampled, work

QUICK_TARGETS = ("sm_80", "sm_90")
BY_WARPGROUPS = ("attention", "lm_head_argmax", "lm_head_logprob")
# Operations a byte above which the float32 units could not keep up with the DRAM of an A100, nor of a B200: 9.6, 9.7.
SCALAR_INTENSITY = 16.0
Record = dict[str, Any]


def start(mode: str, folder: Path) -> subprocess.Popen[str]:
    """Start the process in the background; `finished` waits for it, `stop` ends it and its own processes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}  # one process a core
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / ".triton-cache"))
    command = [sys.executable, "-m", "emulation.prover", mode, str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def stop(process: subprocess.Popen[str]) -> None:
    """End the process and its own processes, whether they have finished or not."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finished(process: subprocess.Popen[str], folder: Path) -> dict[str, list[Record]]:
    """The facts that the process found. Raises RuntimeError if it failed."""
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the prover failed: {errors[-4000:]}")
    return dict(json.loads((folder / "facts.json").read_text()))


def failures(facts: Mapping[str, Sequence[Record]]) -> dict[tuple[str, str], list[str]]:
    """Jobs that failed and faults of the compile gate, by op and target ("": all targets)."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in (record for records in facts.values() for record in records):
        for key in ("failed", "fault"):
            if key in record:
                found.setdefault((record["op"], record.get("target", "")), []).append(
                    f"{record.get('case', 'compilation')}: {record[key]}"
                )
    compiled = {(each["op"], each["target"]): each for each in facts["compiled"] if "failed" not in each}
    for (op, target), record in compiled.items():
        faults = [
            f"{kernel['kernel']} ({kernel['configuration']}): {fault}"
            for kernel in record["kernels"].values()
            for fault in kernel["faults"]
        ]
        for case in (case for case in MODELS if case.op == op):
            kernels = _launched(record, case)
            verdicts = narrowed(kernels, _launched(compiled[op, "sm_80"], case)) if (op, "sm_80") in compiled else []
            if case.access_bytes >= 16 and not any(kernel["wide_loads"] for kernel in kernels):
                verdicts.append("no loads of 16 bytes, which are promised")
            intensity = record["launched"][case.name]["operations_per_byte"]
            if intensity > SCALAR_INTENSITY and not any(kernel["matrix"] for kernel in kernels):
                verdicts.append(f"no matrix instructions for {intensity:.0f} operations a byte")
            faults += [f"{case.name}: {verdict}" for verdict in verdicts]
        if faults:
            found.setdefault((op, target), []).extend(faults)
    for record in facts["predicted"]:
        if "failed" not in record and record["bytes_per_request"] < record["access_bytes"] * 32 / 2:
            found.setdefault((record["op"], "sm_80"), []).append(
                f"{record['case']}: {record['bytes_per_request']:.0f} bytes a request of a warp, "
                f"where {record['access_bytes']} bytes a lane are promised"
            )
    return found


def _launched(record: Record, case: Case) -> list[Record]:
    return [record["kernels"][key] for key in record["launched"][case.name]["kernels"]]


def compile_op(op: str, target: str, names: Sequence[str]) -> Record:
    """The facts about every kernel that the named cases of an op launch, and for each case the names of its kernels."""
    facts: dict[str, Facts] = {}
    launched: dict[str, Record] = {}
    for case in _cases(op):
        if case.name not in names:
            continue
        call = case.build(Blank())
        with compiling_for(target) as kernels:
            call.launch()
        intensity = call.operations / max(call.minimum_bytes, 1)
        keys = [kernel.hash[:16] for kernel in kernels]  # short, as results/ keeps them
        launched[case.name] = {"kernels": keys, "operations_per_byte": intensity}
        facts |= {key: describe(kernel, target) for key, kernel in zip(keys, kernels, strict=True) if key not in facts}
    return {
        "op": op,
        "target": target,
        "kernels": {key: as_json(value) for key, value in facts.items()},
        "launched": launched,
    }


def emulate_case(op: str, name: str, target: str, file: Path) -> Record:
    """The error of the outputs of a case's PTX; the outputs are written to `file`."""
    record = {"op": op, "case": name, "target": target}
    try:
        evidence = emulated(_case(op, name), target)
    except Unsupported as refusal:
        return {**record, "unsupported": str(refusal)}
    except Fault as fault:
        return {**record, "fault": str(fault)}
    torch.save(evidence.outputs, file)
    return {**record, "error": evidence.error, "file": file.name}


def emulate_corner(op: str, name: str, target: str) -> Record:
    """The error of the last blocks of a large launch."""
    (corner,) = (corner for corner in CORNERS if (corner.op, corner.name) == (op, name))
    record = {"op": op, "case": name, "target": target}
    try:
        return {**record, "error": emulated_corner(corner, target)}
    except Unsupported as refusal:
        return {**record, "unsupported": str(refusal)}
    except Fault as fault:
        return {**record, "fault": str(fault)}


def predict_case(op: str, name: str) -> Record:
    """The code and the work of a case on every target, from a few emulated blocks of its launches, and its times."""
    case = _case(op, name)
    facts, executions = _sample(case, "sm_80")
    assert executions is not None
    accesses = [access for each in executions for access in (each.counts.loads, each.counts.stores)]
    launches = {"sm_80": _launches(facts, executions, "sm_80", "sm_80")}
    for target in dict.fromkeys(machine.target for machine in MACHINES):
        if target not in launches:
            own_facts, own = _sample(case, target, facts)
            launches[target] = _launches(own_facts, own or executions, target, target if own else "sm_80")
    call = case.build(Blank())
    record = {
        "op": op,
        "case": name,
        "access_bytes": case.access_bytes,
        "bytes_per_request": sum(access.bytes for access in accesses) / sum(access.requests for access in accesses),
        "minimum_bytes": call.minimum_bytes,
        "operations": call.operations,
        "traffic": case.traffic or 1.0,
        "launches": launches,
    }
    return {**record, "machines": predicted_times(record)}


def predicted_times(record: Record) -> dict[str, Record]:
    """What the model says of a record of `predict_case`, for every machine. fraction: None for short launches."""
    return {machine.name: _prediction(machine, record) for machine in MACHINES}


def _sample(case: Case, target: str, like: Sequence[Facts] | None = None) -> tuple[list[Facts], list[Execution] | None]:
    """Facts about a case's launches, and counts of a few blocks: None if equal to those of `like`, or not emulated."""
    call = case.build(Blank())
    with compiling_for(target) as kernels:
        call.launch()
    facts = [describe(kernel, target) for kernel in kernels]
    configured = [(each.configuration, each.warps) for each in facts]
    if like is not None and configured == [(each.configuration, each.warps) for each in like]:
        return facts, None
    for count in SAMPLES:
        call = case.build(Blank())
        try:
            with emulating(target, ctas=sampled(count), reachable=call.reachable) as executions:
                call.launch()
        except Unsupported:
            return facts, None
        if sum(each.counts.instructions.total() for each in executions) > MOST_INSTRUCTIONS:
            break
    return facts, executions


def _launches(facts: Sequence[Facts], executions: Sequence[Execution], target: str, counts_of: str) -> list[Record]:
    """The code and the work of each launch, where the work may have been counted for another target."""
    codes = [Code.of(each) for each in facts]
    return [
        {
            "code": asdict(code),
            "work": asdict(
                work(
                    each.counts,
                    each.blocks,
                    each.grid[0] * each.grid[1] * each.grid[2],
                    by_groups=target != counts_of and code.by_groups,
                )
            ),
            "counts_of": counts_of,
        }
        for code, each in zip(codes, executions, strict=True)
    ]


def _prediction(machine: Machine, record: Record) -> Record:
    launches = record["launches"][machine.target]
    codes = [Code(**launch["code"]) for launch in launches]
    works = [Work(**launch["work"]) for launch in launches]
    seconds, longest = predict_call(machine, codes, works, record["minimum_bytes"] * record["traffic"])
    short = seconds < SHORT
    return {
        "seconds": seconds,
        "fraction": None if short else roof(machine, record["minimum_bytes"], record["operations"]) / seconds,
        "bound": longest.bound,
        "resident_blocks": longest.resident,
        "needs": dict(longest.needs),
    }


def _cases(op: str) -> Iterator[Case]:
    return (case for case in SMALL + MODELS if case.op == op)


def _case(op: str, name: str) -> Case:
    (case,) = (case for case in _cases(op) if case.name == name)
    return case


def _attempt(job: partial[Record]) -> Record:
    """Run a job. If it fails, the others go on, and its record counts as a failure."""
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = job()
    except Exception as error:
        names = ("op", "target") if job.func is compile_op else ("op", "case", "target")
        record = {**dict(zip(names, job.args, strict=False)), "failed": f"{type(error).__name__}: {error}"[:2000]}
    return {**record, "seconds_taken": round(time.perf_counter() - started, 2)}


def prove(mode: str, folder: Path) -> dict[str, list[Record]]:
    """Run all jobs of a mode and collect their records, by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    ops = list(dict.fromkeys(case.op for case in SMALL + MODELS))
    quick = mode == "quick"
    every = SMALL + MODELS
    compiled = {"quick": MODELS, "code": every, "predictions": []}[mode]
    nvidia = [target for target in TARGETS if target.startswith("sm_")]
    emulated_on = {"quick": QUICK_TARGETS, "code": nvidia, "predictions": []}[mode]
    jobs: dict[str, list[partial[Record]]] = {
        "emulated": [
            partial(emulate_case, case.op, case.name, target, folder / f"{case.op}-{number}-{target}.pt")
            for target in emulated_on
            for number, case in enumerate(SMALL)
            if not quick or target == "sm_80" or case.op in BY_WARPGROUPS
        ],
        "compiled": [
            partial(compile_op, op, target, [case.name for case in compiled if case.op == op])
            for target in (QUICK_TARGETS if quick else TARGETS)
            for op in ops
            if compiled
        ],
        "corners": [
            partial(emulate_corner, corner.op, corner.name, target) for target in emulated_on for corner in CORNERS
        ],
        "predicted": [partial(predict_case, case.op, case.name) for case in MODELS if mode == "predictions"],
    }
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        # The longest first, so that both processes end at about the same time.
        running = {kind: list(map(partial(pool.submit, _attempt), jobs[kind])) for kind in reversed(jobs)}
        pending = [each for kind in running.values() for each in kind]
        for number, _ in enumerate(as_completed(pending), 1):
            if number % 50 == 0 and not quick:
                print(f"{number} of {len(pending)} jobs done", flush=True)
        return {kind: [each.result() for each in running[kind]] for kind in jobs}


if __name__ == "__main__":
    mode, folder = sys.argv[1], Path(sys.argv[2])
    (folder / "facts.json").write_text(json.dumps(prove(mode, folder)))
