"""The predictions against what others have measured, and against the roofs that no one has exceeded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emulation.prover import predicted_times
from emulation.published import FASTEST_CAUSAL, PUBLISHED, READINGS, UNVERIFIED, Published
from emulation.resources import MACHINES, Machine
from emulation.roofline import LATENCY, NODE, SHORT

ROOT = Path(__file__).resolve().parents[2]
Record = dict[str, Any]

every_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)


@pytest.fixture(scope="module")
def predictions() -> list[Record]:
    return list(json.loads((ROOT / "benchmarks" / "results" / "proof.json").read_text())["predicted"])


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda each: f"{each.kernel}, {each.machine.name}, {each.shape}")
def test_the_model_is_near_what_others_measured(published: Published) -> None:
    # Kernels that fill the GPU. Decoding has overheads that the model leaves out: it is too fast, by up to 1.9.
    assert (-0.05 <= published.error <= 0.95) if published.unit == "us" else abs(published.error) <= 0.22


def test_every_kind_of_kernel_is_held_against_a_measurement() -> None:
    kinds = {(each.kernel, each.shape.partition(",")[0]) for each in PUBLISHED}
    assert {("FlashAttention 2", "heads of 256"), ("FlashAttention 2", "heads of 128")} <= kinds
    assert {("FlashAttention 3", "heads of 256"), ("FlashAttention 3", "heads of 128")} <= kinds
    assert {"cuBLAS product", "device copy", "FlashInfer decode"} <= {each.kernel for each in PUBLISHED}


def test_every_figure_says_where_it_is_and_whether_we_have_read_it_there() -> None:
    for each in PUBLISHED:
        assert each.source.place
        assert each.source.read in READINGS
        assert str(each.source).startswith(f"{each.source.place}: {each.source.read}")
    # Figures that could not be verified set a cap below the peak, and nothing else.
    unverified = [each for each in PUBLISHED if each.source.read == UNVERIFIED]
    assert all(each.sets_cap and each.measured * 1e12 < each.machine.tensor for each in unverified)


def test_the_caps_are_the_figures_with_a_star() -> None:
    """So that a cap is never above what someone has measured."""
    for machine in MACHINES:
        starred = {each.unit: each.measured * 1e12 for each in PUBLISHED if each.sets_cap and each.machine is machine}
        if "TFLOP/s" in starred:
            assert machine.attained_tensor * machine.tensor == pytest.approx(starred["TFLOP/s"])
        if "TB/s" in starred:
            assert machine.attained_bandwidth * machine.bandwidth == pytest.approx(starred["TB/s"])


def test_errors_have_the_sign_of_the_speed() -> None:
    for each in PUBLISHED:
        faster = each.predicted < each.measured if each.unit == "us" else each.predicted > each.measured
        assert (each.error > 0) == faster
    assert {each.unit for each in PUBLISHED if each.error > 0} == {"us", "TFLOP/s", "TB/s"}


@every_machine
def test_nothing_is_predicted_above_what_was_measured(machine: Machine, predictions: list[Record]) -> None:
    assert len(predictions) > 100
    for record in predictions:
        seconds = record["machines"][machine.name]["seconds"]
        name = f"{record['op']}: {record['case']}"
        assert record["minimum_bytes"] / seconds <= machine.attained_bandwidth * machine.bandwidth, name
        assert record["operations"] / seconds <= machine.attained_tensor * machine.tensor, name
        head_dim = 128 if record["case"].startswith("27B") else 256
        fastest = FASTEST_CAUSAL.get((machine.name, head_dim))
        if record["op"] == "attention" and fastest is not None:
            assert record["operations"] / seconds <= fastest * 1e12, name


@every_machine
def test_short_calls_have_no_share_of_the_roof(machine: Machine, predictions: list[Record]) -> None:
    found = [record["machines"][machine.name] for record in predictions]
    assert {each["seconds"] < SHORT for each in found} == {True, False}
    assert all((each["fraction"] is None) == (each["seconds"] < SHORT) for each in found)
    assert all(each["seconds"] >= NODE + LATENCY for each in found)


def test_the_stored_times_are_those_of_the_model(predictions: list[Record]) -> None:
    """After a change of the model, `python benchmarks/proof/prove.py model` predicts them again."""
    for record in predictions:
        assert record["machines"] == predicted_times(record), record["case"]
