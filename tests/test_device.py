"""The GPU's pipeline on CPU tensors: the Triton interpreter runs the kernels, everything round them is as on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import arcmerge
import tiny
from arcmerge.merging import prepared

MODELS = ("gemma-a", "gemma-b", "gemma-c", "gemma-b-f32", "gemma-b-vocabulary")
# What each case takes beside kernels and plain copies of weights to the device.
CASES: dict[str, dict[str, Any]] = {
    "slerp": {"parameters": {"t": [0, 0.4, 1]}},
    "cast while staged": {"models": ["gemma-a", "gemma-b-f32"]},
    "rows gathered while staged": {"models": ["gemma-a", "gemma-b-vocabulary"], "tokenizer_source": "union"},
    "three inputs and a base": {
        "merge_method": "model_stock",
        "models": ["gemma-a", "gemma-b", "gemma-c"],
        "parameters": {},
    },
    "stored in float32": {"dtype": "float32", "models": ["gemma-a", "gemma-b-f32"]},
    "rounded twice, on the CPU": {"out_dtype": "float32"},
    "vectors, on the CPU": {"merge_method": "nuslerp", "parameters": {"weight": 0.5, "nuslerp_flatten": False}},
    "nearswap, on the CPU": {"merge_method": "nearswap", "parameters": {"t": 0.001}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        tiny.make(name, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_device_pipeline_makes_what_the_cpu_makes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    changes = CASES[case]
    names = changes.get("models", ["gemma-a", "gemma-b"])
    config = {
        "merge_method": "slerp",
        "dtype": "bfloat16",
        "parameters": {"t": 0.3},
        **changes,
        "base_model": str(models / names[0]),
        "models": [{"model": str(models / name)} for name in names],
    }
    if config["merge_method"] == "nuslerp":
        del config["base_model"]
    arcmerge.merge(config, tmp_path / "host", device="cpu")

    from arcmerge.merging.device import DeviceProcessor

    def on_device(self: prepared.Prepared) -> DeviceProcessor:
        rows = prepared.aligned_rows(self.plan, self.vocabulary)
        return DeviceProcessor(self.plan.jobs, rows, "cpu", self.options.thread_count)

    monkeypatch.setattr(prepared.Prepared, "processor", on_device)
    # The interpreter replaces parts of triton while a kernel runs: one thread only.
    arcmerge.merge(config, tmp_path / "device", threads=1)
    host, device = (load_file(tmp_path / name / "model.safetensors") for name in ("host", "device"))
    assert host.keys() == device.keys()
    for name in host:
        # The interpreter cuts bf16 results off where a GPU rounds them: one unit in the last place at most.
        tolerance = 2**-7 if host[name].dtype == torch.bfloat16 else 2**-22
        torch.testing.assert_close(device[name], host[name], rtol=tolerance, atol=2**-120)


def test_a_device_that_is_not_there_is_named(models: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    config = {"merge_method": "passthrough", "models": [{"model": str(models / "gemma-a")}]}
    with pytest.raises(arcmerge.ArcmergeError, match="'cuda:3' must be one of the 0 CUDA devices"):
        arcmerge.merge(config, tmp_path / "out", device="cuda:3")
