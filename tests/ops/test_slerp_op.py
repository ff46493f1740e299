"""slerp: the native code against the reference and the formula, and the contract of the op."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import arcmerge
from arcmerge import ops
from arcmerge.dispatch.registry import OPS
from arcmerge.errors import ArcmergeError
from arcmerge.ops import slerp
from operands import BF16, F16, F32, any_bits, normal, same_bits

REFERENCE = OPS["slerp"].implementations["reference"]
dtypes = st.sampled_from([BF16, F16, F32])


def counts(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def position(*t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def half_angle(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The formula in float64, with the angle from the half-angle of the unit vectors rather than from a dot product."""
    x, y = a.double(), b.double()
    u, v = x / x.norm(), y / y.norm()
    angle = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


@pytest.mark.parametrize("t", [0.25, 0.5, 1.5, -0.5])
def test_is_the_formula(t: float) -> None:
    a, b = normal(17, 33, dtype=F32, seed=1), normal(17, 33, dtype=F32, seed=2)
    (out,) = slerp([a], [b], t)
    assert (out - half_angle(a, b, t)).norm() / a.norm() < 2e-7  # three roundings to float32 of values of this size


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(dtypes, dtypes, st.lists(st.integers(0, 40), max_size=3)), min_size=1, max_size=5),
    t=st.sampled_from([0.0, 1.0, 0.3, 0.5, -2.0, 7.5]),
    normalize=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_the_native_code_has_the_bits_of_the_reference(shapes, t, normalize, seed):  # type: ignore[no-untyped-def]
    a, b = (
        [normal(*shape, dtype=pair[side], seed=seed + 2 * index + side) for index, (*pair, shape) in enumerate(shapes)]
        for side in (0, 1)
    )
    found = slerp(a, b, t, normalize=normalize)
    *expected, counted = REFERENCE(a, b, position(t), normalize=normalize)
    assert not counted.any()
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape, one.is_contiguous()) == (other.dtype, other.shape, True)
        assert same_bits(one, other)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_ends_copy_and_count_any_bits(dtype: torch.dtype) -> None:
    a, b = [any_bits(3000, dtype, seed=1)] * 2, [any_bits(3000, dtype, seed=2)] * 2
    nonfinite = counts(2) + 100
    out = slerp(a, b, [0, 1], nonfinite=nonfinite)
    for ours, end, count in zip(out, (a[0], b[0]), nonfinite.tolist(), strict=True):
        assert same_bits(ours, end)
        assert count == 100 + int((~end.isfinite()).sum())


def test_one_value_that_is_not_finite_leaves_no_angle() -> None:
    a, b = [normal(50, seed=1), normal(50, seed=2)], [normal(50, seed=3), normal(50, seed=4)]
    b[1][7] = float("inf")
    nonfinite = counts(2)
    out = slerp(a, b, 0.5, nonfinite=nonfinite)
    assert nonfinite.tolist() == [0, 50]
    assert bool(out[1].isnan().all())


def test_the_bits_of_one_tensor_are_those_of_arcmerge_slerp() -> None:
    a, b = normal(300, 70, seed=1), normal(300, 70, seed=2)
    for normalize in (False, True):
        (out,) = slerp([a], [b], 0.3, normalize=normalize)
        assert same_bits(out, arcmerge.slerp(a, b, 0.3, slerp_normalize=normalize))


def test_strided_tensors_are_taken() -> None:
    a, b = normal(32, 8, seed=1), normal(32, 8, seed=2)
    assert same_bits(slerp([a.T], [b.T], 0.3)[0], slerp([a], [b], 0.3)[0].T.contiguous())


def test_torch_compile_takes_it_whole() -> None:
    a, b = [normal(30, seed=1), normal(2, 3, seed=2)], [normal(30, seed=3), normal(2, 3, dtype=F32, seed=4)]

    def merged(t: Tensor) -> list[Tensor]:
        nonfinite = counts(2)
        outs = ops.slerp(a, b, t * 1, nonfinite=nonfinite)
        return [out + 1 for out in outs] + [nonfinite]

    compiled = torch.compile(merged, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(position(0.3)), merged(position(0.3)), strict=True):
        assert same_bits(found, expected)


X, Y = normal(3), normal(4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([], [], 0.5), "'a' must be 1 or more tensors, got 0"),
        (([X], [X, X], 0.5), "'b' must have as many tensors as 'a', 1, got 2"),
        (([X, X], [X, Y], 0.5), "'b[1]' must have the shape of 'a[1]', [3], got [4]"),
        (([X], [X.double()], 0.5), "'b[0]' must be bfloat16, float16 or float32, got float64"),
        (([X], [X.to("meta")], 0.5), "'b[0]' must be on the device of 'a[0]', cpu, got meta"),
        (([X, X], [X, X], [1, 2, 3]), "'t' must have 1 or 2 elements, got [3]"),
        (([X], [X], torch.ones(1)), "'t' must be float64, got float32"),
    ],
)
def test_arguments_that_break_the_contract_are_refused(arguments: tuple[object, ...], sentence: str) -> None:
    with pytest.raises(ArcmergeError) as caught:
        slerp(*arguments)  # type: ignore[arg-type]
    assert sentence in str(caught.value)


def test_counts_of_another_number_are_refused() -> None:
    with pytest.raises(ArcmergeError, match=r"'nonfinite' must have the shape \[1\], got \[2\]"):
        slerp([X], [X], 0.5, nonfinite=counts(2))


@pytest.mark.parametrize(("version", "capturing", "refused"), [("2.10.1", True, True), ("2.10.1", False, False)])
def test_an_older_torch_cannot_capture(
    version: str, capturing: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    rule = "'torch' must be 2.11 or newer for slerp in a CUDA graph, got 2.10.1"
    with pytest.raises(ArcmergeError, match=rule) if refused else nullcontext():
        slerp([X], [X], 0.5)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    slerp([X], [X], 0.5)
