"""arcmerge.slerp on tensors and state dicts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import arcmerge


def pair(shape: tuple[int, ...] = (17, 33), dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(shape, generator=generator)
    return a.to(dtype), (a + 0.5 * torch.randn(shape, generator=generator)).to(dtype)


def sine_weights(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The formula in float64, with the angle from the half-angle of the unit vectors rather than from a dot product."""
    x, y = a.double(), b.double()
    u, v = x / x.norm(), y / y.norm()
    angle = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


@pytest.mark.parametrize("t", [0.25, 0.5, 1.5, -0.5])
def test_is_the_formula(t: float) -> None:
    a, b = pair()
    error = (arcmerge.slerp(a, b, t).double() - sine_weights(a, b, t)).norm() / a.double().norm()
    assert error < 2e-7  # three roundings to float32 of values of this size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ends_are_exact(dtype: torch.dtype) -> None:
    a, b = pair(dtype=dtype)
    a[0, 0], b[0, 0] = -0.0, torch.inf
    for t, end in ((0, a), (1, b)):
        assert arcmerge.slerp(a, b, t).view(torch.uint8).tolist() == end.view(torch.uint8).tolist()


def test_swapped_inputs_with_1_minus_t_are_the_same_merge() -> None:
    a, b = pair(dtype=torch.bfloat16)
    assert torch.equal(arcmerge.slerp(a, b, 0.25), arcmerge.slerp(b, a, 0.75))


def test_normalize_keeps_a_common_length() -> None:
    a, b = pair()
    b = b * (a.norm() / b.norm())
    assert float(arcmerge.slerp(a, b, 0.5, slerp_normalize=True).norm() / a.norm()) == pytest.approx(1, abs=1e-6)


def test_types_are_promoted() -> None:
    a, b = pair()
    assert arcmerge.slerp(a.bfloat16(), b, 0.5).dtype == torch.float32
    assert arcmerge.slerp(a.bfloat16(), b.half(), 0.5).dtype == torch.float32


def test_strided_tensors_are_taken() -> None:
    a, b = pair((32, 8))
    assert torch.equal(arcmerge.slerp(a.T, b.T, 0.3), arcmerge.slerp(a, b, 0.3).T)


def test_state_dicts_are_matched_by_name() -> None:
    first, second = pair(seed=1), pair(seed=2)
    a, b = ({"x": first[i], "y": second[i]} for i in (0, 1))
    merged = arcmerge.slerp(a, b, lambda name: 0.0 if name == "x" else 0.3)
    assert torch.equal(merged["x"], a["x"])
    assert torch.equal(merged["y"], arcmerge.slerp(a["y"], b["y"], 0.3))


def test_buffers_of_whole_numbers_are_kept() -> None:
    positions = torch.arange(5)
    merged = arcmerge.slerp({"x": positions}, {"x": positions + 1}, 0.7)
    assert torch.equal(merged["x"], positions)


def test_the_message_names_a_tensor_that_cannot_be_merged() -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=r"'x\.weight'.*float64"):
        arcmerge.slerp({"x.weight": torch.ones(3).double()}, {"x.weight": torch.ones(3).double()}, 0.5)


def test_inputs_do_not_change() -> None:
    a, b = pair()
    before = a.clone(), b.clone()
    arcmerge.slerp(a, b, 0.3).fill_(0)
    arcmerge.slerp(a, b, 0).fill_(0)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        (torch.ones(3), torch.ones(4), "'b' must have the shape of 'a' (3,), got (4,)"),
        (
            {"x": torch.ones(3)},
            {"y": torch.ones(3)},
            "'b' must have the names of 'a', got 'x' and 1 more",
        ),
        ({"x": torch.ones(3)}, torch.ones(3), "must both be tensors"),
        (torch.ones(3), torch.ones(3, device="meta"), "'b' must be on the device of 'a' cpu, got meta"),
    ],
    ids=["shapes", "names", "kinds", "devices"],
)
def test_inputs_that_do_not_match_are_an_error(a: object, b: object, sentence: str) -> None:
    with pytest.raises(arcmerge.ArcmergeError) as caught:
        arcmerge.slerp(a, b, 0.5)  # type: ignore[call-overload]
    assert sentence in str(caught.value)


@pytest.mark.parametrize("t", [10**400, float("nan"), "half", None, [0.5]])
def test_a_t_that_is_not_a_number_is_refused(t: object) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match="'t' must be a finite number, got "):
        arcmerge.slerp(torch.ones(3), torch.ones(3), t)  # type: ignore[call-overload]


@pytest.mark.parametrize("b", [None, [1.0], 5])
def test_values_that_are_not_tensors_are_refused(b: object) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match="must both be tensors"):
        arcmerge.slerp(torch.ones(3), b, 0.5)  # type: ignore[call-overload]
