"""merge_state_dicts on a GPU, on CPU tensors in the interpreter: the bits of the CPU, in few launches and one wait."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import arcmerge
from arcmerge.kernels.combine import _combine_kernel
from operands import BF16, F16, F32, normal

# Method, number of models, index of the base, parameters; and the launches for tensors of one dtype.
GRAM, SUM = ["_segments_kernel", "_vectors_kernel"], ["_table_kernel", "_combine_kernel"]
CASES: dict[str, tuple[str, int, int | None, dict[str, Any], list[str]]] = {
    "slerp": ("slerp", 2, 0, {"t": 0.3}, GRAM + SUM),
    "slerp from b": ("slerp", 2, 1, {"t": 0.3, "slerp_normalize": True}, GRAM + SUM),
    "nuslerp": ("nuslerp", 2, None, {"weight": [0.7, 0.6]}, GRAM + SUM),
    "nuslerp of differences": ("nuslerp", 3, 2, {"weight": [0.7, 0.6, None]}, GRAM + SUM),
    "multislerp": ("multislerp", 3, None, {"weight": [0.2, 0.3, 0.4]}, GRAM + SUM),
    "karcher": ("karcher", 3, None, {}, GRAM + SUM),
    "model_stock": ("model_stock", 3, 0, {}, GRAM + SUM),
    "delerp": ("delerp", 2, 1, {"t": 0.3}, GRAM + SUM),
    "geometric_median": ("geometric_median", 3, None, {"weight": [1.0, 0.9, 1.2]}, GRAM + SUM),
    "linear": ("linear", 3, None, {"weight": [0.2, 0.3, 0.0]}, SUM),
    "task_arithmetic": ("task_arithmetic", 3, 0, {"weight": [None, 0.9, 0.4], "lambda": 0.8}, SUM),
    "passthrough": ("passthrough", 1, None, {"scale": 0.5}, SUM),
}


def model(seed: int, dtypes: tuple[torch.dtype, ...] = (BF16,), count: int = 6) -> dict[str, Tensor]:
    found = {
        f"layer {index}": normal(*shape, dtype=dtypes[index % len(dtypes)], seed=100 * seed + index)
        for index, shape in enumerate([(3, 5), (40,), (), (0, 4), (7, 300), (16384 + 9,)][:count])
    }
    return {**found, "positions": torch.arange(4)}


def merged(case: str, *dtypes: tuple[torch.dtype, ...], count: int = 6) -> dict[str, Tensor]:
    method, models, base, parameters, _ = CASES[case]
    inputs = [model(seed, dtypes[seed % len(dtypes)], count) for seed in range(models)]
    chosen = None if base is None else inputs[base]
    return arcmerge.merge_state_dicts(inputs, method, base=chosen, parameters=parameters)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcmerge.tensors_on_gpu.on_gpu", lambda tensor: True)


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_the_cpu(case: str, request: pytest.FixtureRequest) -> None:
    dtypes = (BF16, F32), (BF16, F16)
    expected = merged(case, *dtypes)
    request.getfixturevalue("on_gpu")
    found = merged(case, *dtypes)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_launches_and_waits_do_not_grow_with_the_tensors(case: str, on_gpu: None) -> None:
    launched, waits = list[str](), list[None]()

    def launch(kernel: Any, grid: Any) -> Any:
        return lambda *arguments, **named: launched.append(kernel.fn.__name__)

    def wait(tensor: Tensor) -> Tensor:
        waits.append(None)
        return torch.ones(tensor.shape, dtype=tensor.dtype)  # the Gram matrices of parallel tensors: no kernel has run

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the host waits")

    readers = dict.fromkeys(("item", "tolist", "__bool__", "__float__"), refused)
    with (
        patch.multiple(Tensor, cpu=wait, **readers),
        patch.object(type(_combine_kernel), "__getitem__", launch),
    ):
        merged(case, (BF16,), count=6)
    assert launched == CASES[case][-1]
    assert len(waits) == len(CASES[case][-1]) // 4


def test_more_inputs_than_a_launch_takes_are_merged_one_by_one(on_gpu: None) -> None:
    inputs = [model(seed, count=2) for seed in range(9)]
    found = arcmerge.merge_state_dicts(inputs, "linear", parameters={"weight": 1.0})
    for name in ("layer 0", "layer 1"):
        average = sum(each[name].double() for each in inputs) / 9
        torch.testing.assert_close(found[name].double(), average, rtol=2**-8, atol=1e-6)
