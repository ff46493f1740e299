"""The methods that mergekit does not have, against formulas on explicit vectors: delerp, geometric_median."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcmerge.merging.methods.registry import get
from vectors import (
    RELATIVE,
    arguments_of,
    assert_close,
    at_angle,
    geometric_median,
    merge,
    random_tensors,
    unit,
)

angles = st.floats(0.04, np.pi - 0.04)
lengths = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)
steps = st.floats(-1, 2)


class TestDeLerp:
    @given(angles, lengths, lengths, steps)
    def test_has_the_direction_of_linear_and_the_larger_length(
        self, angle: float, length_a: float, length_b: float, t: float
    ) -> None:
        a, b = at_angle(angle, length_a, length_b)
        mixed = (1 - t) * a + t * b
        # The length of a sum that cancels is known only to the rounding of its parts.
        relative = RELATIVE * ((1 + abs(t)) * (length_a + length_b) / np.linalg.norm(mixed)) ** 2
        result = merge("delerp", [a, b], 0, t=t)
        assert_close(result, max(length_a, length_b) * unit(mixed), [a, b], relative)

    @pytest.mark.parametrize("base", [0, 1])
    def test_the_ends_have_the_larger_length(self, base: int) -> None:
        a, b = at_angle(1.0, 2.0, 5.0)
        tensors = [a, b] if base == 0 else [b, a]
        assert_close(merge("delerp", tensors, base, t=0), 2.5 * a, [a])
        assert_close(merge("delerp", tensors, base, t=1), b, [b])

    @given(angles, steps)
    def test_swapped_inputs_with_1_minus_t_give_the_same(self, angle: float, t: float) -> None:
        a, b = at_angle(angle, 0.7, 1.9)
        relative = RELATIVE / np.linalg.norm((1 - t) * a + t * b) ** 2
        assert_close(merge("delerp", [a, b], 0, t=t), merge("delerp", [b, a], 0, t=1 - t), [a, b], relative)

    def test_opposite_tensors_are_mixed_linearly_where_they_cancel(self) -> None:
        (a,) = random_tensors(31, 1)
        assert_close(merge("delerp", [a, -a], 0, t=0.5), 0 * a, [a], relative=1e-15)
        assert_close(merge("delerp", [a, -a], 0, t=0.6), -a, [a])
        assert_close(merge("delerp", [a, 0 * a], 0, t=0.6), a, [a])
        assert_close(merge("delerp", [0 * a, 0 * a], 0, t=0.6), 0 * a, [a])


class TestGeometricMedian:
    @pytest.mark.parametrize("count", [3, 5, 17])
    @pytest.mark.parametrize("common", [0.5, 30.0])
    def test_is_the_least_sum_of_distances(self, count: int, common: float) -> None:
        tensors = [x + common for x in random_tensors(32, count)]
        weight = np.random.default_rng(count).uniform(0.5, 1.0, count).tolist()
        expected = geometric_median(tensors, weight)
        assert min(np.linalg.norm(expected - x) for x in tensors) > 0.1
        assert_close(merge("geometric_median", tensors, weight=weight), expected, random_tensors(32, count), 1e-8)

    def test_of_a_triangle_is_its_fermat_point(self) -> None:
        # The corners of an equilateral triangle are seen at 120 degrees, so moving one along its ray has no effect.
        corners = [np.array([np.cos(angle), np.sin(angle)]) for angle in 2 * np.pi * np.arange(3) / 3]
        result = merge("geometric_median", [5 + corners[0], 5 + 9 * corners[1], 5 + 0.3 * corners[2]], weight=1)
        np.testing.assert_allclose(result, 5, rtol=1e-8)

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_an_obtuse_corner_is_copied(self, place: int) -> None:
        # An angle of 120 degrees or more; its unit vectors sum to 0.1, nearly 1 at 120 degrees.
        others = [np.array([1.0, 0.0]), 3 * np.array([np.cos(3.04), np.sin(3.04)])]
        others.insert(place, np.zeros(2))
        arguments = arguments_of("geometric_median", 3, None, {})
        shifted = np.stack(others) + 2
        found = get("geometric_median").coefficients(shifted @ shifted.T, arguments)
        assert (found.values.tolist(), found.branch) == (np.eye(3)[place].tolist(), "copy")

    def test_leaves_a_mean_that_is_an_input(self) -> None:
        # The mean is the first input, and the pull to the others there is 1.2 of its weight.
        others = [np.array([1.0, 0.0]), np.array([0.5, 0.9]), np.array([0.6, -0.9]), np.array([-2.1, 0.0])]
        tensors = [np.zeros(2), *others]
        np.testing.assert_allclose(np.mean(tensors, axis=0), 0, atol=1e-15)
        weight = (0.5, 1, 1, 1, 1)
        expected = geometric_median(tensors, weight)
        assert np.linalg.norm(expected) > 0.05
        assert_close(merge("geometric_median", tensors, weight=weight), expected, tensors, 1e-8)

    @pytest.mark.parametrize("angle", np.linspace(0, 2 * np.pi, 8, endpoint=False))
    @pytest.mark.parametrize("distance", [10.0, 1e3, 1e5])
    def test_one_outlier_moves_it_no_further_than_the_others_reach(self, angle: float, distance: float) -> None:
        cluster = np.random.default_rng(33).standard_normal((4, 2))
        outlier = distance * np.array([np.cos(angle), np.sin(angle)])
        result = merge("geometric_median", [*cluster, outlier])
        assert np.abs(result).max() <= 2 * np.abs(cluster).max()
        assert np.linalg.norm(np.mean([*cluster, outlier], axis=0)) > 0.1 * distance

    def test_two_inputs_give_the_heavier_or_their_mean(self) -> None:
        a, b = random_tensors(34, 2)
        np.testing.assert_array_equal(merge("geometric_median", [a, b], weight=(1, 1.5)), b)
        assert_close(merge("geometric_median", [a, b], weight=(2, 2)), (a + b) / 2, [a, b])

    def test_equal_inputs_count_as_one_of_their_total_weight(self) -> None:
        a, b, c = random_tensors(35, 3)
        result = merge("geometric_median", [a, b, a, c], weight=(0.4, 0.9, 0.6, 1.1))
        assert_close(result, merge("geometric_median", [a, b, c], weight=(1, 0.9, 1.1)), [a, b, c], 1e-8)
        np.testing.assert_array_equal(merge("geometric_median", [a, b, a, c]), a)  # half of the weight is there

    def test_a_weight_of_zero_leaves_an_input_out(self) -> None:
        a, b, c, d = random_tensors(36, 4)
        expected = merge("geometric_median", [a, b, c], weight=(1, 0.9, 1.1))
        result = merge("geometric_median", [a, 1e6 * d, b, c], weight=(1, 0, 0.9, 1.1))
        np.testing.assert_array_equal(result, expected)

    def test_stops_after_max_iter_or_at_tol(self) -> None:
        tensors = random_tensors(37, 4)
        assert_close(merge("geometric_median", tensors, max_iter=0), np.mean(tensors, axis=0), tensors)
        assert_close(merge("geometric_median", tensors, tol=1e3), merge("geometric_median", tensors, max_iter=1), [])
        expected = geometric_median(tensors, [1, 1, 1, 1])
        errors = [np.linalg.norm(merge("geometric_median", tensors, max_iter=n) - expected) for n in (0, 2, 4)]
        assert errors[0] > 3 * errors[1] > 9 * errors[2]

    @given(st.permutations(range(4)))
    def test_the_order_of_the_inputs_has_no_effect(self, order: list[int]) -> None:
        tensors, weights = random_tensors(14, 4), (0.5, 0.6, 0.7, 0.8)
        expected = merge("geometric_median", tensors, weight=weights)
        same = merge("geometric_median", [tensors[i] for i in order], weight=[weights[i] for i in order])
        assert_close(same, expected, tensors)

    def test_a_single_weight_copies(self) -> None:
        constant = get("geometric_median").constant(arguments_of("geometric_median", 3, 0, {"weight": (0, 2, 0)}))
        assert constant is not None
        assert (constant.values.tolist(), constant.branch) == ([0, 1, 0], "copy")


@pytest.mark.parametrize(
    ("name", "parameters", "sentence"),
    [
        (
            "delerp",
            {"t": 0.5},
            "'delerp' must have one of its 2 models as the base, got none; set base_model to it",
        ),
        (
            "geometric_median",
            {"weight": (1, -0.5)},
            "'weight' must be 0 or more in geometric_median, got -0.5; leave the model out",
        ),
        (
            "geometric_median",
            {"weight": (0, 0)},
            "'weight' must be more than 0 for a model in geometric_median, got 0 for all; change a weight",
        ),
    ],
)
def test_wrong_inputs_give_a_message(name: str, parameters: dict[str, Any], sentence: str) -> None:
    assert get(name).check(arguments_of(name, 2, None, parameters)) == [sentence]
