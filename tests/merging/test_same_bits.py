"""Methods that choose elements give the same bits for any threads, instruction set, pieces and files."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import arcmerge
import tiny
from arcmerge import _C
from arcmerge.merging.methods.registry import METHODS
from golden.compare import assert_same_bits, load
from operands import using

Tensors = dict[str, Tensor]

CASES: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3},
    "ties-paper": {"density": 0.3, "variant": "paper"},
    "ties-rescaled": {"density": [{"filter": "mlp", "value": 0.2}, {"value": [0.3, 0.9]}], "rescale": True},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.4, "gamma": 0.2, "rescale": True},
    "dare_linear": {"density": 0.4},
    "dare_linear-paper": {"density": 0.4, "variant": "paper"},
    "dare_ties": {"density": [0.2, 0.9]},
    "della": {"density": 0.5},
    "della-paper": {"density": 0.5, "variant": "paper"},
    "della_linear": {"density": 0.6, "epsilon": 0.3},
    "sce": {},
    "sce-selected": {"select_topk": 0.3},
    "sce-paper": {"select_topk": 0.3, "variant": "paper"},
    "ram": {"epsilon": 0.05},
    "ramplus_tl": {"epsilon": 0.05, "r": 0.3, "alpha": 2},
    "arcee_fusion": {},
    "magmax": {"lambda": 0.7},
    "median": {},
}
MODELS = ("base", "first", "second", "third")
WEIGHTS = (0.61, -0.37, 0.17)


def weighed(case: str) -> bool:
    return any(parameter.name == "weight" for parameter in METHODS[case.partition("-")[0]].parameters)


def parents(case: str) -> tuple[str, ...]:
    """As many models beside the base as the method takes."""
    return MODELS[1:][: METHODS[case.partition("-")[0]].maximum]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of one layer and models near it."""
    folder, geometry = tmp_path_factory.mktemp("models"), replace(tiny.GEOMETRY, num_hidden_layers=1)
    base = tiny.weights(1, geometry=geometry)
    for seed, name in enumerate(MODELS):
        weights = tiny.perturbed(base, seed, 0.1) if seed else base
        tiny.write_checkpoint(folder / name, tiny.Model(lambda weights=weights: weights, geometry=geometry))
    longer = {**base, tiny.EMBEDDING: np.concatenate([base[tiny.EMBEDDING], base[tiny.EMBEDDING][:16]])}
    more = replace(geometry, vocab_size=336)
    tiny.write_checkpoint(folder / "longer", tiny.Model(lambda: longer, geometry=more, extra_tokens=16))
    return folder


def recipe(models: Path, case: str, *names: str, **changes: Any) -> dict[str, Any]:
    listed = [
        {"model": str(models / name), "parameters": {"weight": weight} if weighed(case) else {}}
        for name, weight in zip(names or parents(case), WEIGHTS, strict=False)
    ]
    method = {"merge_method": case.partition("-")[0], "base_model": str(models / "base"), "models": listed}
    return {**method, "parameters": CASES[case], "dtype": "bfloat16", **changes}


@pytest.fixture(scope="module")
def merged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one thread gives for a case and a dtype, whole tensors at once."""

    @functools.cache
    def result(case: str, dtype: str) -> Tensors:
        out = tmp_path_factory.mktemp("merged") / "out"
        arcmerge.merge(recipe(models, case, dtype=dtype), out, device="cpu", threads=1)
        return load(out)

    return result


def in_pieces(patch: pytest.MonkeyPatch, elements: int, nbytes: int) -> None:
    """Cut tensors into pieces of so many elements, files into chunks of so many bytes."""
    for module in ("work_units", "memory"):
        patch.setattr(f"arcmerge.merging.execution.{module}.PIECE_ELEMENTS", elements)
    for module in ("work_units", "to_disk"):
        patch.setattr(f"arcmerge.merging.execution.{module}.CHUNK_BYTES", nbytes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
class TestSameBits:
    def test_for_any_threads_and_instruction_set(
        self, models: Path, tmp_path: Path, merged: Any, case: str, dtype: str
    ) -> None:
        for threads, variant in enumerate(_C.variants(), start=2):
            with using(variant):
                arcmerge.merge(recipe(models, case, dtype=dtype), tmp_path / variant, device="cpu", threads=threads)
            assert_same_bits(load(tmp_path / variant), merged(case, dtype))

    def test_for_any_pieces_and_shards(
        self, models: Path, tmp_path: Path, merged: Any, case: str, dtype: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected, config = merged(case, dtype), recipe(models, case, dtype=dtype)
        in_pieces(monkeypatch, 97, 4096)
        arcmerge.merge(config, tmp_path / "out", device="cpu", threads=8, out_shard_size=15_000)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
        assert_same_bits(load(tmp_path / "out"), expected)

    def test_of_tensors_in_memory(self, models: Path, merged: Any, case: str, dtype: str) -> None:
        base, *others = (
            {name: tensor.to(getattr(torch, dtype)) for name, tensor in load(models / model).items()}
            for model in (MODELS[0], *parents(case))
        )
        parameters = {**CASES[case], **({"weight": list(WEIGHTS)} if weighed(case) else {})}
        if case == "ties-rescaled":
            parameters["density"] = lambda name: 0.2 if "mlp" in name else 0.9 if "layers" in name else 0.3
        if case == "dare_ties":
            parameters["density"] = lambda name: 0.9 if "layers" in name else 0.2
        found = arcmerge.merge_state_dicts(others, case.partition("-")[0], base=base, parameters=parameters)
        assert_same_bits(found, merged(case, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("d")])
def test_the_seed_decides(models: Path, tmp_path: Path, merged: Any, case: str, dtype: str) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        arcmerge.merge(recipe(models, case, dtype=dtype), tmp_path / name, device="cpu", random_seed=seed)
    assert_same_bits(load(tmp_path / "same"), merged(case, dtype))
    other, expected = load(tmp_path / "other"), merged(case, dtype)
    differ = [name for name, tensor in expected.items() if not torch.equal(other[name], tensor)]
    assert len(differ) > 0.9 * len(expected)


@pytest.mark.parametrize("case", ["ties-rescaled", "dare_ties", "della", "sce-selected", "ramplus_tl", "magmax"])
def test_rows_that_are_matched_by_token(
    models: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding of a union has rows that a model lacks."""
    config = recipe(models, case, "longer", "first", tokenizer_source="union")
    arcmerge.merge(config, tmp_path / "whole", device="cpu", threads=1)
    in_pieces(monkeypatch, 97, 4096)
    arcmerge.merge(config, tmp_path / "pieces", device="cpu", threads=8)
    whole = load(tmp_path / "whole")
    assert whole[tiny.EMBEDDING].shape == (336, 32)
    assert_same_bits(load(tmp_path / "pieces"), whole)
