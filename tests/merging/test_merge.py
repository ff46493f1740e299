"""Merges from a recipe to a folder: equal bits for any threads and chunks, bounded memory, complete or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import arcmerge
import tiny
from arcmerge.merging.execution import to_disk, work_units

SLERP: dict[str, Any] = {"merge_method": "slerp", "dtype": "bfloat16", "parameters": {"t": [0, 0.3, 1]}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("gemma-a", "gemma-b", "gemma-b-f32", "gemma-b-spurious-head", "gemma-b-untied", "qwen2-a", "qwen2-b"):
        tiny.make(name, folder)
    return folder


def recipe(models: Path, *names: str, **changes: Any) -> dict[str, Any]:
    listed = [{"model": str(models / name)} for name in names]
    return {**SLERP, "base_model": listed[0]["model"], "models": listed, **changes}


def digest(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_bits_do_not_depend_on_threads(models: Path, tmp_path: Path, threads: int) -> None:
    config = recipe(models, "gemma-a", "gemma-b")
    arcmerge.merge(config, tmp_path / "one", threads=1)
    arcmerge.merge(config, tmp_path / "many", threads=threads)
    assert digest(tmp_path / "one") == digest(tmp_path / "many")


@pytest.mark.parametrize("chunk", [4096, 8192])
def test_bits_do_not_depend_on_chunks(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """A tiny file is usually one chunk; with small chunks nearly every tensor lies in several."""
    config = recipe(models, "gemma-a", "gemma-b-f32")
    arcmerge.merge(config, tmp_path / "whole")
    for module in (work_units, to_disk):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    arcmerge.merge(config, tmp_path / "cut")
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_gram_matrix_of_many_pieces(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other pieces change a Gram matrix by 1e-7 at these sizes, and thereby single weights by one unit of bf16."""
    config = recipe(models, "gemma-a", "gemma-b")
    arcmerge.merge(config, tmp_path / "whole")
    monkeypatch.setattr(work_units, "PIECE_ELEMENTS", 100)
    arcmerge.merge(config, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    differ = sum(int((whole[name] != cut[name]).sum()) for name in whole)
    assert differ <= 1e-3 * sum(tensor.numel() for tensor in whole.values())
    assert all(torch.allclose(whole[name].float(), cut[name].float(), rtol=2**-7, atol=0) for name in whole)


def test_shards_hold_the_tensors_of_one_file(models: Path, tmp_path: Path) -> None:
    config = recipe(models, "gemma-a", "gemma-b")
    arcmerge.merge(config, tmp_path / "one")
    arcmerge.merge(config, tmp_path / "many", out_shard_size="20K")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == one.keys()
    assert len(set(index["weight_map"].values())) > 3
    for name, file in index["weight_map"].items():
        assert bool((load_file(tmp_path / "many" / file)[name] == one[name]).all())
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


@pytest.fixture
def longer(tmp_path: Path) -> Path:
    """gemma-b in float32 with tokens that gemma-a does not have; only their rows do not fit into bfloat16."""
    model = tiny.MODELS["gemma-b-vocabulary"]
    tiny.write_checkpoint(tmp_path / "longer", dataclasses.replace(model, dtype="F32"))
    return tmp_path / "longer"


@pytest.mark.parametrize("method", ["linear", "slerp", "nuslerp", "nearswap"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_rows_of_a_float32_model_stand_in_for_those_of_a_bfloat16_model(
    models: Path, longer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: str | None
) -> None:
    """A token of one model alone is merged with itself, so that with every method its row keeps its direction."""
    config = {
        "merge_method": method,
        "models": [{"model": str(models / "gemma-a")}, {"model": str(longer)}],
        "base_model": None if method == "nuslerp" else str(models / "gemma-a"),
        "tokenizer": {"source": "union", "pad_to_multiple_of": 64},
        "parameters": {"t" if method in ("slerp", "nearswap") else "weight": 0.5},
        "dtype": dtype,
    }
    arcmerge.merge(config, tmp_path / "whole")
    found = load_file(tmp_path / "whole" / "model.safetensors")[tiny.EMBEDDING]
    rows = load_file(longer / "model.safetensors")[tiny.EMBEDDING][320:]
    assert (found.dtype, found.shape[0]) == (torch.float32, 384)
    scale = float(found[320, 0] / rows[0, 0])
    assert scale == pytest.approx(1.0, abs=0.01)
    torch.testing.assert_close(found[320:336], scale * rows, rtol=2**-20, atol=0)
    for module in (work_units, to_disk):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4096)
    arcmerge.merge(config, tmp_path / "cut")
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_an_embedding_that_is_used_as_lm_head_is_filtered_as_lm_head(models: Path, tmp_path: Path) -> None:
    weight = [{"filter": "lm_head", "value": 1}, {"value": 0}]
    listed = [
        {"model": str(models / "gemma-a"), "parameters": {"weight": weight}},
        {"model": str(models / "gemma-b-untied"), "parameters": {"weight": 1}},
    ]
    config = {"merge_method": "linear", "models": listed, "parameters": {"normalize": False}, "dtype": "float32"}
    arcmerge.merge(config, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    a, b = (load_file(models / name / "model.safetensors") for name in ("gemma-a", "gemma-b-untied"))
    assert torch.equal(found[tiny.EMBEDDING], b[tiny.EMBEDDING].float())
    assert torch.equal(found[tiny.HEAD], a[tiny.EMBEDDING].float() + b[tiny.HEAD].float())


def test_config_json_has_the_rows_of_the_embedding(models: Path, longer: Path, tmp_path: Path) -> None:
    """The embedding comes from the first slice, the rest of config.json from the base model."""
    slices = [{"sources": [{"model": str(longer), "layer_range": layers}]} for layers in ([0, 3], [3, 6])]
    arcmerge.merge(
        {"merge_method": "passthrough", "slices": slices, "base_model": str(models / "gemma-a")}, tmp_path / "out"
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 336


def test_an_embedding_and_a_head_of_different_vocabularies_are_refused(
    models: Path, longer: Path, tmp_path: Path
) -> None:
    ends = [(longer, [0, 3]), (models / "gemma-b-untied", [3, 6])]
    slices = [{"sources": [{"model": str(model), "layer_range": layers}]} for model, layers in ends]
    with pytest.raises(arcmerge.ArcmergeError, match=r"embed_tokens\.weight 336, lm_head\.weight 320; .*tokenizer"):
        arcmerge.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")


def test_the_report_counts_the_branches(models: Path, tmp_path: Path) -> None:
    report = arcmerge.merge(recipe(models, "gemma-a", "gemma-b", parameters={"t": 0.3}), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert report.merged + report.copied == len(tensors)
    # Layer 1 is near-collinear (11 tensors), layer 4 has an antipodal and an equal tensor.
    assert report.linear == 13
    assert report.nbytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert "slerp" in str(report)
    assert "13" in str(report)


def test_progress_ends_at_the_total(models: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    arcmerge.merge(
        recipe(models, "gemma-a", "gemma-b"), tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


def test_warnings_reach_the_caller(models: Path, tmp_path: Path) -> None:
    config = recipe(models, "gemma-a", "gemma-b", colour="red")
    with pytest.warns(UserWarning, match="colour"):
        report = arcmerge.merge(config, tmp_path / "out")
    assert any("colour" in sentence for sentence in report.warnings)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("t", [0, 0.3], ids=["copied", "merged"])
def test_a_value_that_is_not_finite_is_named(models: Path, tmp_path: Path, value: float, t: float) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    weights = tiny.weights(3)
    weights[name][3, 5] = value
    tiny.write_checkpoint(tmp_path / "broken", tiny.Model(lambda: weights))
    config = {**recipe(models, "gemma-a"), "base_model": str(tmp_path / "broken"), "parameters": {"t": t}}
    with pytest.raises(arcmerge.ArcmergeError) as caught:
        arcmerge.merge(config, tmp_path / "out")
    (sentence,) = caught.value.problems
    assert name in sentence
    assert f"1 in {tmp_path / 'broken'}" in sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]

    arcmerge.merge(config, tmp_path / "out", allow_nonfinite=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert not bool(merged[name].isfinite().all())
    assert all(bool(tensor.isfinite().all()) for other, tensor in merged.items() if other != name)


def test_overflow_of_the_output_dtype_is_named(tmp_path: Path) -> None:
    large = {name: tensor * 1e6 for name, tensor in tiny.weights(3).items()}
    tiny.write_checkpoint(tmp_path / "large", tiny.Model(lambda: large))
    config = recipe(tmp_path, "large", merge_method="linear", parameters={"weight": 1}, dtype="bfloat16")
    with pytest.raises(arcmerge.ArcmergeError, match=r"in which the result is stored, got .*; set out_dtype: bfloat16"):
        arcmerge.merge({**config, "out_dtype": "float16"}, tmp_path / "out")


def test_a_failure_leaves_the_older_output(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arcmerge.merge(recipe(models, "gemma-a", "gemma-b"), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(arcmerge.ArcmergeError):
        arcmerge.merge(recipe(models, "gemma-a", "qwen2-b"), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_older_output_is_replaced_completely(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arcmerge.merge(recipe(models, "gemma-a", "gemma-b"), out, out_shard_size="20K")
    arcmerge.merge(recipe(models, "gemma-a", "gemma-b"), out)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_killed_run_leaves_the_older_output_and_the_next_run_removes_the_rest(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = recipe(models, "gemma-a", "gemma-b")
    arcmerge.merge(config, out)
    before = digest(out)
    script = (
        "import json, sys, time, arcmerge\n"
        "from arcmerge.merging.execution import to_disk\n"
        "to_disk.DiskMerge._forget = lambda self, piece: time.sleep(60)\n"
        "arcmerge.merge(json.loads(sys.argv[1]), sys.argv[2])\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, json.dumps(config), str(out)])
    while len(list(tmp_path.glob(".out.partial-*/*.safetensors"))) == 0:
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert digest(out) == before
    assert list(tmp_path.glob(".out.partial-*"))
    arcmerge.merge(config, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_leaves_nothing(models: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arcmerge.merge(recipe(models, "gemma-a", "gemma-b"), tmp_path / "out", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_merge_on_the_cpu_loads_neither_torch_nor_triton(models: Path, tmp_path: Path) -> None:
    script = (
        "import json, sys, arcmerge\n"
        "arcmerge.merge(json.loads(sys.argv[1]), sys.argv[2], device='cpu')\n"
        "print(*sorted({'torch', 'triton', 'transformers', 'tokenizers', 'rich'} & sys.modules.keys()))\n"
    )
    config = json.dumps(recipe(models, "gemma-a", "gemma-b"))
    done = subprocess.run(
        [sys.executable, "-c", script, config, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """192 MB of inputs, mostly one tensor, are merged with buffers of 96 MB; other memory is mapped, not allocated."""
    sizes = tiny.Geometry(vocab_size=49152, hidden_size=512)
    for seed, name in enumerate("ab"):
        tiny.write_checkpoint(
            tmp_path / name, tiny.Model(lambda seed=seed: tiny.weights(seed, geometry=sizes), geometry=sizes)
        )
    script = (
        "import json, sys, arcmerge\n"
        "def peak():\n"
        "    status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "    return int(status['RssAnon'].split()[0])\n"
        "import arcmerge.merging.merge\n"
        "before, highest = peak(), 0\n"
        "def look(done, total):\n"
        "    global highest\n"
        "    highest = max(highest, peak())\n"
        "arcmerge.merge(json.loads(sys.argv[1]), sys.argv[2], progress=look, device='cpu')\n"
        "print(highest - before)\n"
    )
    config = json.dumps(recipe(tmp_path, "a", "b", parameters={"t": 0.4}))
    done = subprocess.run(
        [sys.executable, "-c", script, config, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    buffers = to_disk.BUFFERS * work_units.CHUNK_BYTES / 1024
    assert int(done.stdout) < buffers + 32 * 1024


def test_a_head_that_repeats_the_embedding_is_left_out(models: Path, tmp_path: Path) -> None:
    arcmerge.merge(recipe(models, "gemma-a", "gemma-b-spurious-head"), tmp_path / "out")
    assert tiny.HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_two_roundings_where_the_recipe_asks_for_two(models: Path, tmp_path: Path) -> None:
    """dtype: bfloat16 with out_dtype: float32 stores bf16 values, widened."""
    config = recipe(models, "gemma-a", "gemma-b")
    arcmerge.merge(config, tmp_path / "narrow")
    arcmerge.merge({**config, "out_dtype": "float32"}, tmp_path / "wide")
    narrow, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("narrow", "wide"))
    assert {str(tensor.dtype) for tensor in wide.values()} == {"torch.float32"}
    assert all(bool((wide[name] == narrow[name].float()).all()) for name in narrow)


def test_output_files_are_readable_by_others(models: Path, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        arcmerge.merge(recipe(models, "gemma-a", "gemma-b"), tmp_path / "out")
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


def test_a_vocabulary_needs_an_embedding_to_align(models: Path, tmp_path: Path) -> None:
    renamed = {name.replace("embed_tokens", "rows"): tensor for name, tensor in tiny.weights(3).items()}
    for name in "ab":
        tiny.write_checkpoint(tmp_path / name, tiny.Model(lambda: renamed))
    config = recipe(tmp_path, "a", "b", tokenizer_source="union")
    with pytest.raises(arcmerge.ArcmergeError, match="must not be set for models without an embedding"):
        arcmerge.merge(config, tmp_path / "out")
