"""arcmerge inside mergekit: which of the two runs a merge, equal bits, and undo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit import merge as their_merge
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

import arcmerge
from arcmerge.integrations import mergekit as host
from arcmerge.merging.methods.method import Method
from arcmerge.merging.methods.registry import METHODS


def parameters_of(method: Method) -> set[str]:
    return {parameter.name for parameter in method.parameters}


def recipe(models: Path, **changes: Any) -> dict[str, Any]:
    listed = [{"model": str(models / name)} for name in ("gemma-a", "gemma-b")]
    slerp = {"merge_method": "slerp", "dtype": "bfloat16", "parameters": {"t": [0, 0.3, 1]}}
    return {**slerp, "base_model": listed[0]["model"], "models": listed, **changes}


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls of mergekit's run_merge, which is replaced."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(host, "_run_merge", lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize("by_source", [True, False])
def test_arcmerge_runs_supported_merges(
    models: Path, tmp_path: Path, theirs: list[tuple[Any, ...]], by_source: bool
) -> None:
    config = recipe(models)
    parsed, text = MergeConfiguration.model_validate(config), yaml.safe_dump(config)
    with host.take_over():
        their_merge.run_merge(parsed, str(tmp_path / "out"), MergeOptions(), text if by_source else None)
    arcmerge.merge(config, tmp_path / "expected", device="cpu")
    files = [tmp_path / name / "model.safetensors" for name in ("out", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not theirs


CHOOSING = [name for name, one in METHODS.items() if "density" in parameters_of(one)]


@pytest.mark.parametrize("method", [*CHOOSING, "sce", "ram", "ramplus_tl", "arcee_fusion", "magmax", "median"])
def test_arcmerge_runs_methods_that_choose_elements(
    models: Path, tmp_path: Path, theirs: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture, method: str
) -> None:
    values = {"weight": 0.6, "density": [0.4, 0.6], "lambda": 0.8, "gamma": 0.05, "epsilon": 0.1}
    values |= {"select_topk": 0.3, "r": 0.2, "alpha": 0.5}
    values |= dict.fromkeys(("normalize", "rescale", "int8_mask"), True)
    known = {name: value for name, value in values.items() if name in parameters_of(METHODS[method])}
    for seed in (None, 3):
        config, out = recipe(models, merge_method=method, parameters=known), tmp_path / str(seed)
        with host.take_over():
            parsed, options = MergeConfiguration.model_validate(config), MergeOptions(random_seed=seed, device="cpu")
            their_merge.run_merge(parsed, str(out), options, yaml.safe_dump(config))
        arcmerge.merge(config, tmp_path / f"expected-{seed}", device="cpu", random_seed=seed)
        files = [folder / "model.safetensors" for folder in (out, tmp_path / f"expected-{seed}")]
        assert files[0].read_bytes() == files[1].read_bytes()
    seeds_differ = len({(tmp_path / seed / "model.safetensors").read_bytes() for seed in ("None", "3")}) == 2
    assert seeds_differ == METHODS[method].random
    assert not theirs
    assert not caplog.messages


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"merge_method": "ties", "parameters": {"density": 2, "weight": 0.5}}, {}, "density"),
        ({}, {"safe_serialization": False}, "pickled output"),
        ({}, {"random_seed": -1}, "random_seed"),
        ({"models": [{"model": "gemma-nowhere"}, {"model": "gemma-b"}]}, {}, "gemma-nowhere"),
    ],
)
def test_mergekit_runs_all_others(
    models: Path,
    tmp_path: Path,
    theirs: list[tuple[Any, ...]],
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    options: dict[str, Any],
    reason: str,
) -> None:
    parsed, given = MergeConfiguration.model_validate({**recipe(models), **changes}), MergeOptions(**options)
    host.run(parsed, str(tmp_path / "out"), given)
    assert theirs == [(parsed, str(tmp_path / "out"), given, None)]
    assert "mergekit runs this merge: " in caplog.text
    assert reason in caplog.text
    assert not (tmp_path / "out").exists()


def test_arcmerge_gets_the_seed_of_mergekit(
    models: Path, tmp_path: Path, theirs: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int | None] = []
    monkeypatch.setattr(host, "merge", lambda text, out, *, random_seed, **options: seeds.append(random_seed))
    for seed in (None, 7):
        parsed = MergeConfiguration.model_validate(recipe(models))
        host.run(parsed, str(tmp_path / "out"), MergeOptions(random_seed=seed))
    assert seeds == [None, 7]
    assert not theirs


def test_undo() -> None:
    before = their_merge.run_merge
    undo = host.take_over()
    assert their_merge.run_merge is host.run
    undo.undo()
    assert their_merge.run_merge is before


def test_the_command_takes_the_flags_of_mergekit(models: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe(models)))
    command = [sys.executable, "-m", "arcmerge.integrations.mergekit", "recipe.yml", "out", "--no-write-model-card"]
    subprocess.run([*command, "--lazy-unpickle"], cwd=tmp_path, check=True, capture_output=True)
    arcmerge.merge(recipe(models), tmp_path / "expected", device="cpu", write_model_card=False)
    files = [tmp_path / name / "model.safetensors" for name in ("out", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_missing_recipe_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "arcmerge.integrations.mergekit", "recipe.yml", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "arcmerge: recipe.yml: No such file or directory\n")


def test_a_key_that_mergekit_does_not_know_changes_nothing_but_the_log(
    models: Path, tmp_path: Path, theirs: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    for name, extra in (("plain", {}), ("theirs", {"normalize": True}), ("ours", {"slerp_normalize": True})):
        config = recipe(models, parameters={"t": 0.4, **extra})
        host.run(MergeConfiguration.model_validate(config), str(tmp_path / name), MergeOptions(device="cpu"))
    plain, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "theirs", "ours"))
    assert plain == same
    assert plain != other
    assert not theirs
    assert caplog.messages == [
        "parameters.normalize: `slerp` has no such parameter, ignored as in mergekit; "
        "arcmerge has an extension called `slerp_normalize`"
    ]


def test_a_source_of_one_line(models: Path, tmp_path: Path, theirs: list[tuple[Any, ...]]) -> None:
    config = recipe(models)
    text = yaml.safe_dump(config, default_flow_style=True, width=10_000).strip()
    assert "\n" not in text
    host.run(MergeConfiguration.model_validate(config), str(tmp_path / "out"), MergeOptions(device="cpu"), text)
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == text
    assert not theirs
