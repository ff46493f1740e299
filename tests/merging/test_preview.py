"""arcmerge.plan and arcmerge.inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import arcmerge
import tiny
from arcmerge.merging.inspect.relations import relation


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Any]:
    a, b = (str(tiny.make(name, tmp_path)) for name in ("gemma-a", "gemma-b"))
    return {"merge_method": "slerp", "base_model": a, "models": [{"model": a}, {"model": b}]}


def test_a_plan_has_a_job_for_each_tensor_of_the_merge(pair: dict[str, Any], tmp_path: Path) -> None:
    config = {**pair, "parameters": {"t": [0, 1]}}
    jobs = {job.output.name: job for job in arcmerge.plan(config).jobs}
    arcmerge.merge(config, tmp_path / "out", device="cpu")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == jobs.keys()
    ends = [jobs[f"model.layers.{layer}.mlp.up_proj.weight"].values.shared["t"] for layer in (0, 5)]
    assert ends == [0, 1]


def test_a_plan_refuses_as_a_merge_does(pair: dict[str, Any], tmp_path: Path) -> None:
    sentences = []
    for call in (lambda: arcmerge.plan(pair), lambda: arcmerge.merge(pair, tmp_path / "out")):
        with pytest.raises(arcmerge.ArcmergeError) as caught:
            call()
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]
    assert sentences[0].startswith("'t' must have a value for ")


def test_an_inspection_compares_every_tensor(pair: dict[str, Any]) -> None:
    seen: list[tuple[int, int]] = []
    pairs = arcmerge.inspect(
        pair["base_model"],
        pair["models"][1]["model"],
        device="cpu",
        threads=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(pairs) == len(arcmerge.plan({**pair, "parameters": {"t": 0.5}}).jobs)
    assert {item.layer for item in pairs} == {None, *range(6)}
    # As tiny.py makes them: independent, and 1 % of noise.
    angles = [relation(item for item in pairs if item.layer == layer).angle for layer in (0, 1)]
    assert angles[0] == pytest.approx(90, abs=5)
    assert angles[1] == pytest.approx(0.57, abs=0.1)
    assert seen[-1][0] == seen[-1][1] > 0


def test_an_inspection_needs_two_models(pair: dict[str, Any]) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match="must be two models, got"):
        arcmerge.inspect(pair["base_model"], pair["base_model"])
