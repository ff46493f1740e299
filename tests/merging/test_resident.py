"""Merges whose parents and result lie in GPU memory, on CPU tensors: one launch, one wait, the bits of pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import arcmerge
import tiny
from arcmerge.kernels import segments
from arcmerge.kernels.combine import _combine_kernel
from arcmerge.merging.execution import in_memory, memory
from arcmerge.merging.execution.gpu.resident import ResidentSums, WeightedSum
from arcmerge.merging.execution.memory import GpuMemory
from emulation.traffic import Traffic
from operands import BF16, F32, normal, same_bits

MODELS = ("gemma-a", "gemma-b", "gemma-c", "gemma-b-f32")
# Changes to a slerp of two models, and what is set afterwards.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "slerp": ({}, {"t": 0.7}),
    "slerp, with ends": ({"parameters": {"t": [0, 0.4, 1]}}, {"t": [1, 0.5, 0]}),
    "an end": ({"parameters": {"t": 0}}, {"t": 1}),
    "float32 and bfloat16": ({"models": ["gemma-a", "gemma-b-f32"], "dtype": "float32"}, {"t": [0, 0.3, 1]}),
    "three and a base": (
        {"models": ["gemma-a", "gemma-b", "gemma-c"], "merge_method": "model_stock", "parameters": {}},
        {},
    ),
    "nine, by pieces": (
        {"models": ["gemma-a", "gemma-b", "gemma-c"] * 3, "merge_method": "karcher", "parameters": {}},
        {"max_iter": 1},
    ),
    "ties, by pieces": ({"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.4}}, {"density": 0.7}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        tiny.make(name, folder)
    return folder


@pytest.fixture(autouse=True)
def _in_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "must_stream", lambda *_: False)
    monkeypatch.setattr(
        in_memory, "allocate", lambda plans, nbytes, progress, workspace: GpuMemory(plans, nbytes, "cpu", progress)
    )


def configuration(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    names = changes.get("models", ["gemma-a", "gemma-b"])
    return {
        "merge_method": "slerp",
        "dtype": "bfloat16",
        "parameters": {"t": 0.3},
        **changes,
        "base_model": str(folder / names[0]),
        "models": [{"model": str(folder / name)} for name in names],
    }


def merged(config: dict[str, Any], **options: Any) -> arcmerge.Gemma2:
    return arcmerge.Gemma2.from_merge(config, "cpu", threads=1, **options)


def bits(model: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in model.network.weights.tensors]


@pytest.mark.parametrize("case", CASES)
def test_whole_jobs_have_the_bits_of_pieces(models: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, parameters = CASES[case]

    def results() -> list[list[Tensor]]:
        model = merged(configuration(models, changes))
        first = bits(model)
        model.set_parameters(**parameters)
        return [first, bits(model)]

    whole = results()
    monkeypatch.setattr(GpuMemory, "fill_whole", lambda *_: {})
    for ours, pieces in zip(whole, results(), strict=True):
        assert all(map(same_bits, ours, pieces))


class Counts:
    """What a call launches, and how often the host reads values or waits for the device."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.waits = 0


@contextmanager
def counting() -> Iterator[Counts]:
    counts, tolist = Counts(), Tensor.tolist

    def launch(kernel: Any, grid: Any) -> Any:
        return lambda *arguments, **named: counts.launched.append(kernel.fn.__name__)

    def waiting(tensor: Tensor) -> Any:
        counts.waits += 1
        return tolist(tensor)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the host waits")

    readers = dict.fromkeys(("item", "cpu", "__bool__", "__int__", "__float__", "__index__"), refused)
    with (
        patch.multiple(Tensor, tolist=waiting, **readers),
        patch.object(type(_combine_kernel), "__getitem__", launch),
        patch.object(GpuMemory, "wait", refused),
    ):
        yield counts


@pytest.mark.parametrize(
    ("t", "launches"),
    [(0.7, 1), (1, 1), ([0, 0.3, 1], 2)],
    ids=["inside", "an end", "both"],
)
def test_set_t_takes_one_launch_for_a_number_of_inputs_and_one_wait(models: Path, t: Any, launches: int) -> None:
    model = merged(configuration(models, {}))
    model.set_t(t)
    model.set_t(0.5)
    with counting() as counts:
        assert model.set_t(t) == len(model.network.weights.tensors)
    assert counts.launched == ["_combine_kernel"] * launches
    assert counts.waits == 1


def test_the_first_call_makes_the_table(models: Path) -> None:
    model = merged(configuration(models, {"parameters": {"t": 0}}))
    with counting() as counts:
        model.set_t(0.3)
    assert counts.launched == ["_table_kernel", "_combine_kernel"]


def test_set_t_starts_no_thread(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a thread was started")

    model = merged(configuration(models, {}))
    monkeypatch.setattr("threading.Thread", refused)
    model.set_t(0.7)
    with pytest.raises(AssertionError, match="a thread was started"):
        merged(configuration(models, {}))


def test_progress_counts_whole_jobs(models: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = merged(configuration(models, {}))
    model.set_t(0.7, progress=lambda done, total: seen.append((done, total)))
    nbytes = sum(tensor.nbytes for tensor in model.network.weights.tensors)
    assert seen[-1] == (nbytes, nbytes)


def test_a_sum_that_overflows_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("gemma-a", "gemma-b"):
        file = tiny.make(name, tmp_path) / "model.safetensors"
        weights = load_file(file)
        weights["model.norm.weight"][3] = 3e38
        save_file(weights, file, metadata={"format": "pt"})
    changes = {"merge_method": "linear", "parameters": {"weight": 0.5, "normalize": False}}
    model = merged(configuration(tmp_path, changes))
    with pytest.raises(arcmerge.ArcmergeError, match=r"model\.norm\.weight"):
        model.set_parameters(weight=1)
    model.set_parameters(weight=0.25)
    assert all(bool(tensor.isfinite().all()) for tensor in model.network.weights.tensors)


def test_a_copy_that_may_be_nan_keeps_every_bit(tmp_path: Path) -> None:
    file = tiny.make("gemma-a", tmp_path) / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"].view(torch.int16)[:2] = torch.tensor([0x7F81, -0x3F], dtype=torch.int16)  # signalling
    save_file(weights, file, metadata={"format": "pt"})
    config = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "gemma-a")}]}
    model = merged(config, allow_nonfinite=True)
    norm = next(each for each in model.network.weights.tensors if each.isnan().any())
    assert torch.equal(norm.view(torch.int16), weights["model.norm.weight"].view(torch.int16))


# ---- the sums themselves


def sums(result: Tensor, *counts: int, seed: int = 0) -> list[WeightedSum]:
    """Sums of 2, 1, 2, ... inputs into parts of a result of bfloat16."""
    found, first = [], 0
    for index, count in enumerate(counts):
        inputs = [normal(count, seed=seed + 2 * index + number) for number in range(2 - index % 2)]
        out = result[2 * first : 2 * (first + count)].view(BF16)
        found.append(WeightedSum(inputs, np.array([0.3, -0.6][: len(inputs)]), out))
        first += count
    return found


def expected(each: WeightedSum) -> Tensor:
    terms = [torch.tensor(c, dtype=F32) * x.float() for c, x in zip(each.coefficients, each.inputs, strict=True)]
    return sum(terms[1:], terms[0]).bfloat16()


def test_sums_of_several_numbers_of_inputs_keep_their_order() -> None:
    result = torch.zeros(2 * 60_000, dtype=torch.uint8)
    resident, parts = ResidentSums(result), sums(result, 20_000, 300, 7, 16_400)
    parts[1].inputs[0][:5] = float("nan")
    parts[2].inputs[1][3] = float("inf")
    assert resident.compute(parts) == [0, 5, 1, 0]
    assert all(same_bits(each.out, expected(each)) for each in parts)


def test_tables_are_kept_for_the_same_tensors_and_made_for_others() -> None:
    result = torch.zeros(2000, dtype=torch.uint8)
    resident = ResidentSums(result)
    for seed in range(6):
        parts = sums(result, 50, 20, seed=10 * seed)
        with Traffic(result, *(tensor for each in parts for tensor in each.inputs)) as traffic:
            resident.compute(parts)
            resident.compute(parts)
        assert [launch.kernel for launch in traffic.kernels] == ["_table_kernel"] * 2 + ["_combine_kernel"] * 4
        assert all(same_bits(each.out, expected(each)) for each in parts)
    assert len(resident._tables) == 4


def test_a_table_belongs_to_the_addresses_lengths_and_dtypes_of_every_operand() -> None:
    result, memory = torch.zeros(2000, dtype=torch.uint8), normal(400, seed=1)
    resident = ResidentSums(result)
    first = WeightedSum([memory[:100], memory[100:200]], np.array([0.3, -0.6]), result[:200].view(BF16))
    others = [
        first._replace(inputs=[first.inputs[0], memory[200:300]]),
        first._replace(out=result[400:600].view(BF16)),
        first._replace(inputs=[tensor[:50] for tensor in first.inputs], out=first.out[:50]),
        first._replace(inputs=[tensor.view(torch.float16) for tensor in first.inputs]),
    ]
    for each in (first, *others):
        result.zero_()
        resident.compute([each])
        assert same_bits(each.out, expected(each))
        each.out.zero_()
        assert not result.any()


def test_traffic_is_six_bytes_an_element() -> None:
    counts = [3 * segments.SEGMENT, segments.SEGMENT]
    result = torch.zeros(2 * sum(counts), dtype=torch.uint8)
    parts = [
        WeightedSum(
            [normal(count, seed=1), normal(count, seed=2)],
            np.array([0.3, 0.7]),
            result[2 * first :][: 2 * count].view(BF16),
        )
        for first, count in ((0, counts[0]), (counts[0], counts[1]))
    ]
    resident = ResidentSums(result)
    resident.compute(parts)
    with Traffic(result, *(tensor for each in parts for tensor in each.inputs)) as traffic:
        resident.compute(parts)
    floor = 6 * sum(counts)
    assert floor <= traffic.loaded + traffic.stored <= 1.001 * floor
    assert traffic.launches == 1
