"""A merge in memory equals the same merge on disk: bytes, addresses, tokens; its Gram matrices and errors."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import arcmerge
import decoders
import tiny
from arcmerge.gemma2.merged_model import MergedGemma2
from arcmerge.merging.execution import memory
from arcmerge.merging.execution.cpu.processor import CpuProcessor

V_CURVE = [0, 0.5, 1, 0.5, 0]
FILTERS = [{"filter": "mlp", "value": [0.2, 0.8]}, {"filter": "self_attn", "value": 1}, {"value": 0.4}]
MLP_APART = [{"filter": "mlp", "value": 0.1}, {"value": 0.7}]
PROMPT = [2, 17, 45, 300, 9]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("gemma-a", "gemma-b", "gemma-c"):
        tiny.make(name, tmp_path)
    return tmp_path


def recipe(models: Path, *names: str, **changes: Any) -> dict[str, Any]:
    listed = [{"model": str(models / name)} for name in names or ("gemma-a", "gemma-b")]
    slerp = {"merge_method": "slerp", "dtype": "bfloat16", "parameters": {"t": 0.3}}
    return {**slerp, "base_model": listed[0]["model"], "models": listed, **changes}


def open_merge(config: dict[str, Any], **options: Any) -> MergedGemma2:
    return arcmerge.Gemma2.from_merge(config, "cpu", **options)


def tensors(model: MergedGemma2) -> dict[str, torch.Tensor]:
    weights = model.network.weights
    found = {"model.embed_tokens.weight": weights.embed_tokens, "model.norm.weight": weights.norm}
    for number, layer in enumerate(weights.layers):
        for name, tensor in vars(layer).items():
            part = "" if name.endswith("layernorm") else "self_attn." if name[0] in "qkvo" else "mlp."
            part = "mlp." if name in ("up_proj", "down_proj", "gate_proj") else part
            found[f"model.layers.{number}.{part}{name}.weight"] = tensor
    return found


def assert_as_on_disk(model: MergedGemma2, config: dict[str, Any], out: Path) -> None:
    """The weights equal, bit for bit, those that the command writes for a configuration with these parameters."""
    arcmerge.merge(config, out, device="cpu")
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors(model).keys()
    for name, tensor in tensors(model).items():
        assert torch.equal(tensor.view(torch.int16), written[name].view(torch.int16)), name


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are measured."""
    found: list[str] = []
    original = CpuProcessor.measure

    def measure(self: CpuProcessor, requests: Any) -> Any:
        found.extend(self._jobs[piece.job].output.name for piece, _ in requests)
        return original(self, requests)

    monkeypatch.setattr(CpuProcessor, "measure", measure)
    return found


def test_every_t_has_the_bits_of_the_merge_on_disk(models: Path, tmp_path: Path) -> None:
    model = open_merge(recipe(models))
    assert_as_on_disk(model, recipe(models), tmp_path / "first")
    for number, t in enumerate((0, 1, 0.7, V_CURVE, FILTERS, {"filter": "*", "value": 0.1}, 0.3)):
        model.set_t(t)
        assert_as_on_disk(model, recipe(models, parameters={"t": t}), tmp_path / str(number))


def test_only_tensors_whose_coefficients_change_are_merged_again(models: Path) -> None:
    model = open_merge(recipe(models, parameters={"t": V_CURVE}))
    total = len(tensors(model))
    assert model.set_t(V_CURVE) == 0
    assert model.set_t(0.5) > 0
    # One layer; the zero tensor of layer 3 has the same coefficients for any t but 0 and 1.
    changed = model.set_t([{"filter": "layers.0.", "value": 0.25}, {"value": 0.5}])
    assert changed == total_of_layer(model, 0)
    assert model.set_t(0.5) == changed
    assert model.set_t(0) == total


def total_of_layer(model: MergedGemma2, number: int) -> int:
    return sum(f"layers.{number}." in name for name in tensors(model))


def test_parameters_replace_those_of_every_level(models: Path, tmp_path: Path) -> None:
    sources = [{"model": str(models / name), "layer_range": [0, 6]} for name in ("gemma-a", "gemma-b")]
    config = recipe(models, slices=[{"sources": sources, "parameters": {"t": V_CURVE}}])
    del config["models"]
    model = open_merge(config)
    assert_as_on_disk(model, config, tmp_path / "slices")
    model.set_t(0.6)
    assert_as_on_disk(model, recipe(models, parameters={"t": 0.6}), tmp_path / "whole")
    assert "0.6" in model.recipe
    assert "0.5" not in model.recipe


@pytest.mark.parametrize(
    ("method", "first", "then"),
    [
        ("slerp", {"t": 0.2, "slerp_normalize": False}, {"t": 0.4, "slerp_normalize": True}),
        ("nuslerp", {"weight": 0.5}, {"weight": [{"filter": "mlp", "value": 0.1}, {"value": 0.6}]}),
        ("nuslerp", {"weight": 0.5}, {"weight": 0.25, "nuslerp_flatten": False}),
        ("linear", {"weight": 0.5}, {"weight": 0.25, "normalize": False}),
        ("task_arithmetic", {"weight": 0.5}, {"weight": 0.25, "lambda": 0.5}),
        ("karcher", {}, {"max_iter": 2}),
        ("geometric_median", {}, {"max_iter": 1}),
        ("delerp", {"t": 0.3}, {"t": 0.8}),
        ("model_stock", {}, {"filter_wise": True}),
        ("nearswap", {"t": 0.001}, {"t": 0.01}),
        ("ties", {"weight": 0.5, "density": 0.3}, {"density": 0.6, "rescale": True}),
        ("ties", {"weight": 0.5, "density": 0.3, "variant": "paper"}, {"density": MLP_APART}),
        ("breadcrumbs", {"weight": 0.5, "density": 0.3}, {"density": 0.6, "gamma": 0.1}),
        ("breadcrumbs_ties", {"weight": 0.5, "density": 0.3}, {"density": [0.2, 0.9], "lambda": 0.5}),
        ("dare_linear", {"weight": 0.5, "density": 0.3}, {"density": 0.6, "variant": "paper"}),
        ("dare_ties", {"weight": 0.5, "density": 0.3}, {"density": MLP_APART}),
        ("della", {"weight": 0.5, "density": 0.3}, {"density": 0.5, "epsilon": 0.4}),
        ("della_linear", {"weight": 0.5, "density": 1}, {"density": 0.5, "normalize": True}),
    ],
)
def test_parameters_of_other_methods(
    models: Path, tmp_path: Path, method: str, first: dict[str, Any], then: dict[str, Any]
) -> None:
    several = "density" in first or method in ("karcher", "model_stock")
    names = ("gemma-a", "gemma-b", "gemma-c") if several else ("gemma-a", "gemma-b")
    config = recipe(models, *names, merge_method=method, parameters=first)
    if method in ("nuslerp", "linear", "karcher"):
        del config["base_model"]
    model = open_merge(config)
    assert_as_on_disk(model, config, tmp_path / "first")
    model.set_parameters(**then)
    assert_as_on_disk(model, {**config, "parameters": {**first, **then}}, tmp_path / "then")


def test_addresses_stay_and_generation_uses_the_new_weights(models: Path, tmp_path: Path) -> None:
    model = open_merge(recipe(models))
    before = {name: tensor.data_ptr() for name, tensor in tensors(model).items()}
    assert all(address % memory.ALIGNMENT == 0 for address in before.values())
    model.generate(PROMPT, max_new_tokens=4)
    model.set_t(V_CURVE)
    assert {name: tensor.data_ptr() for name, tensor in tensors(model).items()} == before
    model.save(tmp_path / "saved")
    written = arcmerge.Gemma2.from_pretrained(tmp_path / "saved", "cpu")
    assert model.generate(PROMPT, max_new_tokens=12) == written.generate(PROMPT, max_new_tokens=12)
    assert model.score([(PROMPT, [5, 6])]) == written.score([(PROMPT, [5, 6])])
    assert torch.equal(model.logits([PROMPT]), written.logits([PROMPT]))


def test_save_writes_the_files_of_the_command(models: Path, tmp_path: Path) -> None:
    model = open_merge(recipe(models))
    model.set_t(V_CURVE)
    model.save(tmp_path / "saved")
    arcmerge.merge(recipe(models, parameters={"t": V_CURVE}), tmp_path / "merged", device="cpu")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()
    arcmerge.merge(model.recipe, tmp_path / "again", device="cpu")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()


def test_a_merged_vocabulary(models: Path, tmp_path: Path) -> None:
    tiny.make("gemma-b-vocabulary", models)
    config = recipe(models, "gemma-a", "gemma-b-vocabulary", tokenizer_source="union")
    model = open_merge(config)
    assert model.config.vocab_size == 336
    assert model.tokenizer.backend.get_vocab_size() == 336
    assert_as_on_disk(model, config, tmp_path / "first")
    model.set_t(0.6)
    assert_as_on_disk(model, {**config, "parameters": {"t": 0.6}}, tmp_path / "then")


# ---- Gram matrices


def gram_file(models: Path) -> Path:
    (file,) = (models / "gemma-a").glob(".arcmerge-grams-*.json")
    return file


def test_gram_matrices_are_summed_once(models: Path, sums: list[str]) -> None:
    model = open_merge(recipe(models, parameters={"t": 0}))
    assert len(set(sums)) == len(tensors(model))
    sums.clear()
    for t in (0.5, V_CURVE, 1, 0.25):
        model.set_t(t)
    open_merge(recipe(models, parameters={"t": 0.8}))
    open_merge(recipe(models, "gemma-b", "gemma-a", base_model=str(models / "gemma-a")))  # in another order
    assert not [name for name in sums if sums.count(name) > 1]


def test_matrices_of_vectors_are_summed_once_to_open(models: Path, sums: list[str]) -> None:
    config = recipe(models, merge_method="nuslerp", parameters={"weight": 0.5, "nuslerp_flatten": False})
    del config["base_model"]
    open_merge(config)
    assert sums
    assert len(sums) == len(set(sums))


def test_histograms_are_counted_once_for_every_density_and_weight(models: Path, sums: list[str]) -> None:
    parameters = {"weight": 0.5, "density": 0.2, "rescale": True}
    model = open_merge(recipe(models, "gemma-a", "gemma-b", "gemma-c", merge_method="ties", parameters=parameters))
    assert len(set(sums)) == len(tensors(model))
    sums.clear()
    for changes in ({"density": 0.6}, {"density": [0.1, 0.9], "weight": -1}, {"lambda": 2}, {"rescale": False}):
        assert model.set_parameters(**changes) > 0
    assert not sums


def test_masks_are_counted_again_only_for_other_probabilities(models: Path, sums: list[str]) -> None:
    parameters = {"weight": 0.5, "density": 0.2}
    model = open_merge(recipe(models, "gemma-a", "gemma-b", "gemma-c", merge_method="dare_ties", parameters=parameters))
    sums.clear()
    assert model.set_parameters(weight=0.9) > 0
    assert not sums
    model.set_parameters(density=[{"filter": "layers.2.", "value": 0.5}, {"value": 0.2}])
    assert sums
    assert all(".layers.2." in name for name in sums)


@pytest.mark.parametrize("change", ["time", "size", "header", "damaged", "not JSON", "another format"])
def test_a_stale_file_is_ignored(models: Path, sums: list[str], change: str) -> None:
    model = open_merge(recipe(models))
    file, weights = gram_file(models), models / "gemma-b" / "model.safetensors"
    content = json.loads(file.read_bytes())
    if change == "time":
        os.utime(weights, ns=(1, 1))
    elif change == "size":
        content["shards"][str(models / "gemma-b")]["model.safetensors"][0] += 1
    elif change == "header":
        content["shards"][str(models / "gemma-b")]["model.safetensors"][2] = "0" * 64
    elif change == "damaged":
        content["grams"] = {key: [[1.0, 2.0]] for key in content["grams"]}
    else:
        content["format"] = 0
    if change != "time":
        file.write_text("{" if change == "not JSON" else json.dumps(content))
    sums.clear()
    open_merge(recipe(models))
    assert len(set(sums)) == len(tensors(model))
    assert gram_file(models) == file
    sums.clear()
    open_merge(recipe(models))
    assert not sums


def test_a_read_only_folder_has_no_file_of_gram_matrices(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    model = open_merge(recipe(models))
    assert model.set_t(0.5) > 0
    assert not list((models / "gemma-a").glob(".arcmerge*"))


# ---- errors


def assert_raises(model: MergedGemma2, t: Any, message: str) -> None:
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    with pytest.raises(arcmerge.ArcmergeError, match=message):
        model.set_t(t)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())


def test_wrong_parameters_change_nothing(models: Path) -> None:
    model = open_merge(recipe(models))
    assert_raises(model, {"filter": "mlp", "value": 0.1}, r"no filter of parameters\.t matches its name")
    assert_raises(model, "much", "'parameters.t' must be a finite number, got 'much'")
    assert_raises(model, [], "must have a value, got an empty list")
    assert_raises(model, {"weight": 0.5}, r"'parameters\.t' must have a `value`, got \{'weight': 0\.5\}")
    assert_raises(model, object(), "'recipe' must have values of YAML's types only")
    assert model.set_t(0.3) == 0


def test_missing_memory_raises(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(arcmerge.ArcmergeError, match=r"memory must have 0\.0 GB free for .*, .* too little"):
        open_merge(recipe(models))


def test_merges_that_cannot_run_raise(models: Path) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match="must be bfloat16 or float32 to run the merge, got float16"):
        open_merge(recipe(models, out_dtype="float16"))
    tiny.make("qwen2-a", models)
    tiny.make("qwen2-b", models)
    with pytest.raises(arcmerge.ArcmergeError, match="'model_type' must be 'gemma2'"):
        open_merge(recipe(models, "qwen2-a", "qwen2-b"))


def test_from_merge_and_save_take_every_option_of_a_merge() -> None:
    for function in (arcmerge.Gemma2.from_merge, MergedGemma2.save):
        parameters = inspect.signature(function).parameters
        for option in dataclasses.fields(arcmerge.Options):
            default = "cpu" if (function, option.name) == (MergedGemma2.save, "device") else option.default
            assert parameters[option.name].default == default


def test_nonfinite_weights_raise(models: Path) -> None:
    broken = load_file(models / "gemma-b" / "model.safetensors")
    broken["model.norm.weight"][3] = float("nan")
    torch_save(broken, models / "gemma-b" / "model.safetensors")
    with pytest.raises(arcmerge.ArcmergeError, match="weights must be finite"):
        open_merge(recipe(models))


def torch_save(weights: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, file, metadata={"format": "pt"})


def test_stored_rope_frequencies_are_ignored(models: Path) -> None:
    settings = json.loads((models / "gemma-a" / "config.json").read_text())
    stored = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float64)}  # as float32
    old = decoders.write(models / "old", {**tiny.MODELS["gemma-a"].weights(), **stored}, settings)
    (old / "tokenizer.json").write_bytes((models / "gemma-a" / "tokenizer.json").read_bytes())
    with pytest.warns(UserWarning, match=r"inv_freq \(1 tensor\) copied from"):
        model = open_merge(recipe(models, "old", "gemma-b"))
    assert len(model.generate(PROMPT, max_new_tokens=2)) > 0
