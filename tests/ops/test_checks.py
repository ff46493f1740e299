"""shapes: letters stand for sizes, and a message names those that are known."""

from __future__ import annotations

from typing import Any

import pytest
from torch import zeros

from arcmerge.dispatch.checks import require_contiguous_rows, shapes
from arcmerge.errors import ArcmergeError


def test_letters_get_their_sizes() -> None:
    query, key = zeros(7, 4, 16), zeros(7, 2, 16)
    assert shapes("T H Dh, T Hkv Dh", query=query, key=key) == [7, 4, 16, 2]
    assert shapes("T Hkv Dh", key=key, T=7, Dh=16) == [7, 2, 16]
    assert shapes("... D, ... D, D", x=zeros(2, 3, 8), y=zeros(2, 3, 8), weight=zeros(8)) == [8]
    assert shapes("... D, D", x=zeros(8), weight=zeros(8)) == [8]


@pytest.mark.parametrize(
    ("letters", "named", "sentence"),
    [
        ("T K", {"x": zeros(3)}, "'x' must have the shape [T, K], got [3]"),
        (
            "T Hkv Dh",
            {"key": zeros(6, 4, 256), "T": 7, "Dh": 256},
            "'key' must have the shape [T, Hkv, Dh] = [7, *, 256], got [6, 4, 256]",
        ),
        ("T K, M K", {"x": zeros(2, 8), "w": zeros(3, 9)}, "'w' must have the shape [M, K] = [*, 8], got [3, 9]"),
        ("... D, D", {"x": zeros(2, 8), "w": zeros(9)}, "'w' must have the shape [D] = [8], got [9]"),
        ("... D, D", {"x": zeros(()), "w": zeros(9)}, "'x' must have the shape [..., D], got []"),
        ("... D", {"x": zeros(2, 8), "D": 9}, "'x' must have the shape [..., D] = [..., 9], got [2, 8]"),
        (
            "... D, ... D",
            {"x": zeros(2, 8), "y": zeros(8)},
            "'y' must have the shape [..., D] = [2, 8], got [8]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(letters: str, named: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArcmergeError) as caught:
        shapes(letters, **named)
    assert str(caught.value) == sentence


def test_rows_may_be_at_any_distance() -> None:
    require_contiguous_rows(x=zeros(3, 8)[:, :4], y=zeros(3, 2, 4), z=zeros(3, 8)[:, ::2][:0], one=zeros(3, 2)[:, ::2])
    for tensor in (zeros(3, 8)[:, ::2], zeros(3, 2, 4).mT):
        with pytest.raises(ArcmergeError, match="'x' must have contiguous rows, got the strides"):
            require_contiguous_rows(x=tensor)
