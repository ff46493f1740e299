"""The code of the GPU. On CPU tensors the Triton interpreter runs the kernels, and everything else is as on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import arcmerge
import tiny
from arcmerge.merging.execution import in_memory, memory
from arcmerge.merging.execution.choose import aligned_rows
from arcmerge.merging.execution.memory import GpuMemory
from arcmerge.merging.prepare import Prepared

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
MODELS = ("gemma-a", "gemma-b", "gemma-c", "gemma-b-f32", "gemma-b-vocabulary")
# Changes to a plain slerp of two models; each case needs more than kernels and plain copies to the GPU.
CASES: dict[str, dict[str, Any]] = {
    "slerp": {"parameters": {"t": [0, 0.4, 1]}},
    "cast while staged": {"models": ["gemma-a", "gemma-b-f32"]},
    "rows gathered while staged": {"models": ["gemma-a", "gemma-b-vocabulary"], "tokenizer_source": "union"},
    "three inputs and a base": {
        "merge_method": "model_stock",
        "models": ["gemma-a", "gemma-b", "gemma-c"],
        "parameters": {},
    },
    "nine inputs and rows gathered": {
        "merge_method": "karcher",
        "models": ["gemma-a", "gemma-b-vocabulary", "gemma-c"] * 3,
        "tokenizer_source": "union",
        "parameters": {},
    },
    "ten inputs and a base, stored in float32": {
        "merge_method": "model_stock",
        "models": ["gemma-a", *["gemma-b-f32", "gemma-c"] * 5],
        "dtype": "float32",
        "parameters": {},
    },
    "stored in float32": {"dtype": "float32", "models": ["gemma-a", "gemma-b-f32"]},
    "rounded twice, on the CPU": {"out_dtype": "float32"},
    "vectors, on the CPU": {"merge_method": "nuslerp", "parameters": {"weight": 0.5, "nuslerp_flatten": False}},
    "ties, with equal magnitudes at the cuts": {
        "merge_method": "ties",
        "models": ["gemma-a", "gemma-b", "gemma-c"],
        "parameters": {"weight": 0.5, "density": 0.4},
    },
    "breadcrumbs in float32, by two histograms": {
        "merge_method": "breadcrumbs_ties",
        "models": ["gemma-a", "gemma-b-f32", "gemma-c"],
        "dtype": "float32",
        "parameters": {"weight": 0.5, "density": 0.4, "gamma": 0.05, "rescale": True},
    },
    "dare, with rows gathered": {
        "merge_method": "dare_ties",
        "models": ["gemma-a", "gemma-b-vocabulary"],
        "tokenizer_source": "union",
        "parameters": {"weight": 0.5, "density": 0.4},
    },
    "della, on the CPU": {
        "merge_method": "della",
        "models": ["gemma-a", "gemma-b", "gemma-c"],
        "parameters": {"weight": 0.5, "density": 0.4},
    },
    "sce, of variances": {
        "merge_method": "sce",
        "models": ["gemma-a", "gemma-b", "gemma-c"],
        "parameters": {"select_topk": 0.3},
    },
    "arcee_fusion, of rows with a scale": {"merge_method": "arcee_fusion", "parameters": {}},
    "nearswap, on the CPU": {"merge_method": "nearswap", "parameters": {"t": 0.001}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        tiny.make(name, folder)
    return folder


def configuration(models: Path, case: str) -> dict[str, Any]:
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
    return config


@pytest.mark.parametrize("case", CASES)
def test_the_gpu_gives_the_result_of_the_cpu(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    config = configuration(models, case)
    arcmerge.merge(config, tmp_path / "cpu", device="cpu")

    from arcmerge.merging.execution.gpu.processor import GpuProcessor

    def on_device(prepared: Prepared) -> GpuProcessor:
        rows = aligned_rows(prepared.plan, prepared.vocabulary)
        return GpuProcessor(prepared.plan.jobs, rows, DEVICE, prepared.options.thread_count)

    monkeypatch.setattr("arcmerge.merging.merge.processor_for", on_device)
    # The interpreter replaces parts of triton while a kernel runs, so only one thread may use it.
    arcmerge.merge(config, tmp_path / "gpu", threads=1)
    on_cpu, on_gpu = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", "gpu"))
    assert on_cpu.keys() == on_gpu.keys()
    for name in on_cpu:
        assert_alike(on_gpu[name], on_cpu[name])


def assert_alike(on_gpu: torch.Tensor, on_cpu: torch.Tensor) -> None:
    # The interpreter truncates bf16 results that a GPU rounds, an error of at most one unit in the last place.
    tolerance = 2**-7 if on_cpu.dtype == torch.bfloat16 else 2**-22
    torch.testing.assert_close(on_gpu, on_cpu, rtol=tolerance, atol=2**-120)


# ---- a merge in memory

GB = 1e9
# Other parameters for cases without t.
OTHERWISE: dict[str, dict[str, Any]] = {
    "three inputs and a base": {"filter_wise": True},
    "nine inputs and rows gathered": {"max_iter": 1},
    "ten inputs and a base, stored in float32": {"filter_wise": True},
    "vectors, on the CPU": {"weight": 0.25, "nuslerp_flatten": True},
    "ties, with equal magnitudes at the cuts": {"density": 0.7},
    "breadcrumbs in float32, by two histograms": {"density": 0.7},
    "dare, with rows gathered": {"weight": 0.25, "density": [0.2, 0.9]},
    "della, on the CPU": {"epsilon": 0.1},
    "sce, of variances": {"select_topk": 0.6},
    "arcee_fusion, of rows with a scale": {},
    "nearswap, on the CPU": {"t": 0.01},
}


def merge_in_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        in_memory, "allocate", lambda plans, nbytes, progress, workspace: GpuMemory(plans, nbytes, DEVICE, progress)
    )


@pytest.mark.parametrize("streamed", [False, True], ids=["parents on the GPU", "parents pinned"])
@pytest.mark.parametrize("case", CASES)
def test_a_merge_in_gpu_memory_has_the_weights_of_one_on_the_cpu(
    models: Path, monkeypatch: pytest.MonkeyPatch, case: str, streamed: bool
) -> None:
    config = configuration(models, case)
    on_cpu = arcmerge.Gemma2.from_merge(config, "cpu")
    monkeypatch.setattr(memory, "must_stream", lambda *_: streamed)
    merge_in_gpu_memory(monkeypatch)
    on_gpu = arcmerge.Gemma2.from_merge(config, DEVICE, threads=1)
    assert str(on_gpu.device) == DEVICE
    before = [tensor.data_ptr() for tensor in on_gpu.network.weights.tensors]

    def compare() -> None:
        pairs = zip(on_gpu.network.weights.tensors, on_cpu.network.weights.tensors, strict=True)
        for ours, expected in pairs:
            assert_alike(ours.cpu(), expected)

    compare()
    for parameters in (OTHERWISE.get(case, {"t": [0, 1, 0.25]}), OTHERWISE.get(case, {"t": 1})):
        assert on_gpu.set_parameters(**parameters) == on_cpu.set_parameters(**parameters)
        compare()
    assert [tensor.data_ptr() for tensor in on_gpu.network.weights.tensors] == before


@pytest.mark.parametrize("streamed", [False, True], ids=["parents on the GPU", "parents pinned"])
def test_copies_on_the_gpu_that_are_not_finite_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    file = tiny.make("gemma-a", tmp_path) / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    config = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "gemma-a")}]}
    monkeypatch.setattr(memory, "must_stream", lambda *_: streamed)
    merge_in_gpu_memory(monkeypatch)
    with pytest.raises(arcmerge.ArcmergeError, match=r"model\.norm\.weight: weights must be finite"):
        arcmerge.Gemma2.from_merge(config, DEVICE, threads=1)


def test_missing_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, free = torch.device("cpu"), {"device": 20 * GB, "machine": 30 * GB}
    monkeypatch.setattr(memory, "free_memory", lambda device: free["device"])
    monkeypatch.setattr(memory, "available_memory", lambda: free["machine"])
    assert not memory.must_stream(int(6 * GB), int(10 * GB), cpu)
    assert memory.must_stream(int(6 * GB), int(15 * GB), cpu)
    with pytest.raises(arcmerge.ArcmergeError) as caught:
        memory.must_stream(int(21 * GB), int(1 * GB), cpu)
    assert str(caught.value) == (
        "the memory of cpu must have 21.0 GB free for the merged weights and a running model, got 20.0 GB, "
        "1.0 GB too little; end other programs, or use --device cpu"
    )
    free["machine"] = 10 * GB
    with pytest.raises(arcmerge.ArcmergeError) as caught:
        memory.must_stream(int(6 * GB), int(15 * GB), cpu)
    assert str(caught.value) == (
        "pinned memory must have 15.0 GB free for the models, which do not fit on cpu, got 10.0 GB, "
        "5.0 GB too little; end other programs, or use --device cpu, or a GPU of 21 GB"
    )


def test_a_missing_device_is_named(models: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    config = {"merge_method": "passthrough", "models": [{"model": str(models / "gemma-a")}]}
    with pytest.raises(arcmerge.ArcmergeError, match="'device' must be one of the 0 CUDA devices"):
        arcmerge.merge(config, tmp_path / "out", device="cuda:3")
