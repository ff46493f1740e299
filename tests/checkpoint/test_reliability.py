"""Merges whose inputs change, whose files cannot be written past the page cache, and with wrong options."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

import arcmerge
import tiny
from arcmerge.checkpoint.writer import ShardFile
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.to_disk import DiskMerge

Recipe = dict[str, Any]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    a, b = tiny.make("gemma-a", tmp_path), tiny.make("gemma-b", tmp_path)
    return {
        "merge_method": "slerp",
        "base_model": str(a),
        "models": [{"model": str(a)}, {"model": str(b)}],
        "parameters": {"t": 0.4},
    }


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("change", ["written", "replaced", "removed"])
def test_an_input_that_changes_during_a_merge_leaves_the_older_output(
    recipe: Recipe, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arcmerge.merge(recipe, tmp_path / "out")
    before = weights(tmp_path / "out")
    source = tmp_path / "gemma-b" / "model.safetensors"
    run = DiskMerge.run

    def run_and_change(self: DiskMerge, progress: Any) -> None:
        run(self, progress)
        content = source.read_bytes()
        if change != "written":
            source.unlink()
        if change != "removed":
            source.write_bytes(content)

    monkeypatch.setattr(DiskMerge, "run", run_and_change)
    with pytest.raises(ArcmergeError, match=r"gemma-b/model\.safetensors must stay .* has changed while it was read"):
        arcmerge.merge({**recipe, "parameters": {"t": 0.9}}, tmp_path / "out")
    assert weights(tmp_path / "out") == before
    assert not list(tmp_path.glob(".out*"))


def test_buffered_writes_give_the_same_bits(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arcmerge.merge(recipe, tmp_path / "direct")
    monkeypatch.setattr(ShardFile, "_set_direct", lambda self, direct: False)
    arcmerge.merge(recipe, tmp_path / "buffered")
    assert weights(tmp_path / "buffered") == weights(tmp_path / "direct")


def test_merges_may_run_at_the_same_time(recipe: Recipe, tmp_path: Path) -> None:
    """Four into one folder and two into others, from threads of one process."""
    arcmerge.merge(recipe, tmp_path / "alone")
    names = ["out", "out", "out", "out", "b", "c"]
    threads = [threading.Thread(target=arcmerge.merge, args=(recipe, tmp_path / name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {weights(tmp_path / name) for name in names} == {weights(tmp_path / "alone")}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": "2"}, "'threads' must be a whole number"),
        ({"threads": 0}, "'threads' must be a whole number"),
        ({"threads": 10**9}, "from 1 to 1024"),
        ({"device": None}, "'device' must be"),
        ({"device": "tpu"}, "'device' must be"),
        ({"allow_nonfinite": "no"}, "'allow_nonfinite' must be True or False"),
        ({"out_shard_size": None}, "'out_shard_size' must be a number of bytes"),
    ],
    ids=str,
)
def test_wrong_options_are_named(recipe: Recipe, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArcmergeError, match=words):
        arcmerge.merge(recipe, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


SHRINKING = """
import os, sys
from arcmerge.merging.execution.to_disk import DiskMerge
run = DiskMerge.run
def shrink_and_run(self, progress):
    os.truncate(sys.argv[1], 4096)
    run(self, progress)
DiskMerge.run = shrink_and_run
from arcmerge.cli import main
sys.exit(main(["merge", *sys.argv[2:]]))
"""


def test_an_input_that_shrinks_during_a_merge_leaves_the_older_output(recipe: Recipe, tmp_path: Path) -> None:
    """The system would end the process with SIGBUS, as the mapped file no longer has the bytes that it reads."""
    source, out = tmp_path / "gemma-b" / "model.safetensors", tmp_path / "out"
    arcmerge.merge(recipe, out)
    before, content = weights(out), source.read_bytes()
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    call = [sys.executable, "-c", SHRINKING, str(source), str(tmp_path / "recipe.yml"), str(out)]
    ended = subprocess.run(call, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert f"{source} must stay the same" in ended.stderr
    assert weights(out) == before
    source.write_bytes(content)
    arcmerge.merge(recipe, out)
    assert not list(tmp_path.glob(".out*"))
