"""Results that are not finite, by cause: a parent, a dtype that is too narrow, or the arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arcmerge
import tiny
from arcmerge.merging.execution import choose
from arcmerge.merging.execution.gpu.processor import GpuProcessor
from arcmerge.merging.methods.registry import METHODS
from arcmerge.merging.options import Options
from arcmerge.merging.prepare import prepare

NAME = "model.layers.1.mlp.up_proj.weight"
SMALL = tiny.Geometry(8, 16, 2, 2, 1, 4, 288)
PAIR = {"models": [{"model": "A"}, {"model": "B"}], "base_model": "A"}
SLERP = {**PAIR, "merge_method": "slerp", "parameters": {"t": 0.4}}
CAST_TO_FLOAT16 = (
    "weights must fit into float16 (up to 65504), to which 'dtype' casts the inputs, got -99840 in A; "
    "set dtype: bfloat16"
)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes the parents A, with `value` as one of its weights, B and C."""
    monkeypatch.chdir(tmp_path)

    def written(value: float, dtype: str = "BF16", name: str = NAME) -> None:
        for seed, folder in enumerate("ABC"):
            weights = tiny.weights(seed, "llama", SMALL)
            if folder == "A":
                weights[name][3, 2] = value
            model = tiny.Model(lambda weights=weights: weights, "llama", SMALL, dtype)
            tiny.write_checkpoint(tmp_path / folder, model)

    return written


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(arcmerge.ArcmergeError) as caught:
        arcmerge.merge(config, "out", device="cpu", threads=1)
    assert not Path("out").exists()
    (sentence,) = caught.value.problems
    assert sentence.startswith(f"{NAME}: ")
    return sentence.removeprefix(f"{NAME}: ")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parameters": {"t": 0}},
        {"parameters": {"slerp_normalize": True, "t": 0.4}},
        {"merge_method": "linear", "parameters": {"weight": 0.5}},
        {"merge_method": "nuslerp", "base_model": None, "parameters": {"weight": 0.5, "nuslerp_flatten": False}},
        {"merge_method": "nearswap", "parameters": {"t": 0.1}},
        {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}, "out_dtype": "float32"},
    ],
    ids=["gram", "copy", "normalized", "linear", "rows", "elementwise", "rounded-twice"],
)
def test_a_value_that_dtype_cannot_hold(make: Callable[..., None], changes: dict[str, Any]) -> None:
    make(-1e5)
    sentence = refusal({**SLERP, "dtype": "float16", **changes})
    assert sentence == CAST_TO_FLOAT16


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parameters": {"t": 0}},
        {"merge_method": "linear", "parameters": {"weight": 1, "normalize": False}, "dtype": "bfloat16"},
        {"merge_method": "nearswap", "parameters": {"t": 1e-6}, "dtype": "float32"},
    ],
    ids=["merged", "copy", "linear", "elementwise"],
)
def test_a_value_that_out_dtype_cannot_hold(make: Callable[..., None], changes: dict[str, Any]) -> None:
    make(-2e5)
    sentence = refusal({**SLERP, "out_dtype": "float16", **changes})
    assert sentence == (
        "weights must fit into float16 (up to 65504), in which the result is stored, got -199680 in A; "
        "set out_dtype: bfloat16"
    )


def test_rows_that_are_matched_by_token(make: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    make(-1e5, name=tiny.EMBEDDING)
    monkeypatch.setattr("test_overflow.NAME", tiny.EMBEDDING)
    sentence = refusal({**SLERP, "dtype": "float16", "tokenizer_source": "union"})
    assert sentence == CAST_TO_FLOAT16


def test_through_the_slots_of_a_gpu(make: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    make(-1e5)
    monkeypatch.setattr(choose, "CpuProcessor", lambda jobs, rows, _: GpuProcessor(jobs, rows, "cpu", 1))
    sentence = refusal({**SLERP, "dtype": "float16"})
    assert sentence == CAST_TO_FLOAT16


@pytest.mark.parametrize(("dtype", "key"), [("F16", "dtype"), ("BF16", "out_dtype")])
def test_arithmetic_that_overflows(make: Callable[..., None], dtype: str, key: str) -> None:
    make(6e4, dtype)
    config = {**PAIR, "merge_method": "linear", "parameters": {"weight": 3, "normalize": False}}
    sentence = refusal({**config, **({"out_dtype": "float16"} if key == "out_dtype" else {})})
    largest = {"F16": "60000", "BF16": "59904"}[dtype]
    assert sentence == (
        "results of linear must fit into float16 (up to 65504), got an overflow although every input fits "
        f"(the largest is {largest} in A); lower 'weight', or set {key}: bfloat16"
    )


@pytest.mark.filterwarnings("ignore:'density' is 1:UserWarning")
@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "breadcrumbs", "della", "della_linear"])
def test_differences_that_overflow(make: Callable[..., None], method: str) -> None:
    make(3e38)
    # Random masks may drop the element.
    density = 0.9 if method in ("ties", "breadcrumbs") else 1
    values = {"weight": -3, "density": density, "normalize": False, "gamma": 0}
    known = {parameter.name for parameter in METHODS[method].parameters}
    sentence = refusal({**PAIR, "merge_method": method, "parameters": {k: v for k, v in values.items() if k in known}})
    assert sentence == (
        f"results of {method} must fit into bfloat16 (up to 3.38953e+38), got an overflow although every input fits "
        "(the largest is 3.00406e+38 in A); lower 'weight' and 'lambda', or set dtype: float32"
    )


@pytest.mark.parametrize("changes", [{}, {"parameters": {"t": 0}}, {"out_dtype": "float16"}])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_parent_with_values_that_are_not_finite(
    make: Callable[..., None], value: float, changes: dict[str, Any]
) -> None:
    make(value)
    sentence = refusal({**SLERP, "dtype": "float16", **changes})
    assert sentence.startswith(
        "weights must be finite, got NaN or infinity (1 in A); repair the checkpoint, or pass --allow-nonfinite"
    )


def test_a_value_that_rounds_down_to_the_largest_fits(make: Callable[..., None]) -> None:
    make(65519.0, "F32")
    arcmerge.merge({**SLERP, "dtype": "float16", "parameters": {"t": 0}}, "out", device="cpu")


def test_a_value_that_rounds_up_to_infinity_does_not_fit(make: Callable[..., None]) -> None:
    make(65520.0, "F32")
    assert "got 65520 in A" in refusal({**SLERP, "dtype": "float16"})


def test_a_merge_in_memory_raises_the_same_error(make: Callable[..., None]) -> None:
    from arcmerge.merging.execution.in_memory import InMemoryMerge

    make(-1e5)
    made = prepare({**SLERP, "dtype": "float16"}, Options(device="cpu"), lambda sentence: None)
    with pytest.raises(arcmerge.ArcmergeError, match=re.escape(CAST_TO_FLOAT16)):
        InMemoryMerge(made)
