"""A short version of `make torture`, models with very many shards, and weights that shrink while they are used."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torture
from torture import Bench, bench

import tiny
from arcmerge.checkpoint.reader import Checkpoint

__all__ = ["bench"]

SHARDS = 1100
OPEN_FILES = 256


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torture, "KILLS", 16)
    monkeypatch.setattr(torture, "STEPS", 6)


def test_merges_that_are_killed(bench: Bench) -> None:
    torture.test_merges_that_are_killed(bench)


def test_parents_that_shrink(bench: Bench) -> None:
    torture.test_parents_that_shrink_at_any_moment(bench)


@torture.needs_root
def test_a_disk_that_is_full(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    torture.test_disks_that_are_full_at_every_stage(bench, "tmpfs", monkeypatch)


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (8, 8) for layer in range(SHARDS)}
    for number, name in enumerate("ab"):
        weights = {tensor: tiny.normal(number, tensor, shape, 1.0) for tensor, shape in shapes.items()}
        model = tiny.Model(lambda weights=weights: weights, family="llama", shards=SHARDS)
        tiny.write_checkpoint(tmp_path / name, model)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "num_hidden_layers": SHARDS}))
    (tmp_path / "recipe.yml").write_text(
        f"models: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\n"
        f"merge_method: slerp\nbase_model: {tmp_path}/a\nparameters: {{t: 0.3}}\n"
    )
    call = [sys.executable, "-m", "arcmerge", "merge", "recipe.yml", "out", "--out-shard-size", "100"]
    limit = (OPEN_FILES, OPEN_FILES)
    done = subprocess.run(
        [*call, "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit),
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == SHARDS
    assert len(Checkpoint(tmp_path / "out").tensors) == SHARDS


SHRINKS = """
import os, sys
from arcmerge import ArcmergeError, Gemma2

model = Gemma2.from_pretrained(sys.argv[1], "cpu", "bfloat16")
model.generate([2, 5], max_new_tokens=2)
os.truncate(sys.argv[1] + "/model.safetensors", 4096)
for call in (lambda: model.generate([2, 5], max_new_tokens=2), lambda: model.score([([2], [5])])):
    try:
        call()
    except ArcmergeError as error:
        print(error)
"""


def test_weights_that_shrink_as_a_model_runs(tmp_path: Path) -> None:
    model = tiny.make("gemma-a", tmp_path)
    done = subprocess.run([sys.executable, "-c", SHRINKS, str(model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("model.safetensors must be readable to its end") + done.stdout.count("has changed while") == 2
    )
    assert os.path.getsize(model / "model.safetensors") == 4096
