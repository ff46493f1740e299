"""Values that are not finite, by what made them so: a parent, a type that is too narrow, or the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arcmerge
import tiny
from arcmerge.merging.execution import processor
from arcmerge.merging.execution.gpu import GpuProcessor
from arcmerge.merging.options import Options
from arcmerge.merging.prepare import prepare

NAME = "model.layers.1.mlp.up_proj.weight"
SMALL = tiny.Geometry(8, 16, 2, 2, 1, 4, 288)
PAIR = {"models": [{"model": "A"}, {"model": "B"}], "base_model": "A"}
SLERP = {**PAIR, "merge_method": "slerp", "parameters": {"t": 0.4}}
TO_FLOAT16 = "float16 holds up to 65504, but -99840 in A overflows it"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes the parents, A with `value` at one place, and C, which is another B."""
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
    assert sentence == f"{TO_FLOAT16} where `dtype` casts the inputs; set dtype: bfloat16"


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
        "float16 holds up to 65504, but -199680 in A overflows it where the result is stored; set out_dtype: bfloat16"
    )


def test_rows_that_are_matched_by_token(make: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    make(-1e5, name=tiny.EMBEDDING)
    monkeypatch.setattr("test_overflow.NAME", tiny.EMBEDDING)
    sentence = refusal({**SLERP, "dtype": "float16", "tokenizer_source": "union"})
    assert sentence == f"{TO_FLOAT16} where `dtype` casts the inputs; set dtype: bfloat16"


def test_through_the_buffers_of_a_device(make: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    make(-1e5)
    monkeypatch.setattr(processor, "CpuProcessor", lambda jobs, rows: GpuProcessor(jobs, rows, "cpu", 1))
    sentence = refusal({**SLERP, "dtype": "float16"})
    assert sentence == f"{TO_FLOAT16} where `dtype` casts the inputs; set dtype: bfloat16"


@pytest.mark.parametrize(("dtype", "key"), [("F16", "dtype"), ("BF16", "out_dtype")])
def test_arithmetic_that_overflows(make: Callable[..., None], dtype: str, key: str) -> None:
    make(6e4, dtype)
    config = {**PAIR, "merge_method": "linear", "parameters": {"weight": 3, "normalize": False}}
    sentence = refusal({**config, **({"out_dtype": "float16"} if key == "out_dtype" else {})})
    largest = {"F16": "60000", "BF16": "59904"}[dtype]
    assert sentence == (
        "float16 holds up to 65504, which the arithmetic of linear overflows although no input does "
        f"(the largest is {largest} in A); lower `weight`, or set {key}: bfloat16"
    )


@pytest.mark.parametrize("changes", [{}, {"parameters": {"t": 0}}, {"out_dtype": "float16"}])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_parent_that_holds_what_is_not_finite(
    make: Callable[..., None], value: float, changes: dict[str, Any]
) -> None:
    make(value)
    sentence = refusal({**SLERP, "dtype": "float16", **changes})
    assert sentence.startswith(
        "weights must be finite, found NaN or infinity (1 in A); repair the checkpoint, or pass --allow-nonfinite"
    )


def test_what_rounds_down_to_the_largest_fits(make: Callable[..., None]) -> None:
    make(65519.0, "F32")
    arcmerge.merge({**SLERP, "dtype": "float16", "parameters": {"t": 0}}, "out", device="cpu")


def test_what_rounds_up_from_it_does_not(make: Callable[..., None]) -> None:
    make(65520.0, "F32")
    assert "65520 in A overflows it" in refusal({**SLERP, "dtype": "float16"})


def test_a_merge_in_memory_says_the_same(make: Callable[..., None]) -> None:
    from arcmerge.merging.execution.in_memory import InMemoryMerge

    make(-1e5)
    made = prepare({**SLERP, "dtype": "float16"}, Options(device="cpu"), lambda sentence: None)
    with pytest.raises(arcmerge.ArcmergeError, match=TO_FLOAT16):
        InMemoryMerge(made)
