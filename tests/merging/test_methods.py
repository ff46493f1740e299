"""Merge methods against formulas on explicit vectors, and by their properties."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcmerge.errors import ArcmergeError
from arcmerge.merging.methods.method import Arguments
from arcmerge.merging.methods.registry import METHODS, get
from vectors import (
    BASE,
    COUNT,
    GRAM_METHODS,
    RELATIVE,
    Array,
    arc,
    arguments_of,
    assert_close,
    at_angle,
    exponential_map_mean,
    karcher_mean,
    merge,
    random_tensors,
    rotated,
    unit,
)

angles = st.floats(0.04, np.pi - 0.04)  # |cos| < 0.9995
lengths = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)
steps = st.floats(-1, 2)


def coefficients(name: str, gram: Any, base: int | None = None, count: int | None = None, **parameters: Any) -> Array:
    gram = np.asarray(gram, np.float64)
    return get(name).coefficients(gram, arguments_of(name, count or gram.shape[-1], base, parameters)).values


class TestSlerp:
    @given(angles, lengths, lengths, steps)
    def test_is_the_rotation(self, angle: float, length_a: float, length_b: float, t: float) -> None:
        a, b = at_angle(angle, length_a, length_b)
        # Condition 1 / sin(angle)^2 of the sine quotients, extrapolation included.
        assert_close(merge("slerp", [a, b], 0, t=t), arc(a, b, t), [a, b], RELATIVE / np.sin(angle) ** 2)

    @pytest.mark.parametrize("t", [1.5, -0.5])
    def test_extrapolates(self, t: float) -> None:
        a, b = at_angle(0.5)
        result = merge("slerp", [a, b], 0, t=t)
        assert np.arctan2(result @ unit(b - (a @ b) * a), result @ a) == pytest.approx(0.5 * t, rel=1e-14)

    @given(angles, steps)
    def test_swapped_inputs_with_1_minus_t_give_the_same(self, angle: float, t: float) -> None:
        a, b = at_angle(angle, 0.7, 1.9)
        back = merge("slerp", [b, a], 0, t=1 - t)
        assert_close(merge("slerp", [a, b], 0, t=t), back, [a, b], RELATIVE / np.sin(angle) ** 2)

    @pytest.mark.parametrize("normalize", [False, True])
    def test_starts_at_the_base_wherever_it_is_listed(self, normalize: bool) -> None:
        a, b = at_angle(0.5, 1, 3)
        first = merge("slerp", [a, b], 0, t=0.2, slerp_normalize=normalize)
        np.testing.assert_array_equal(merge("slerp", [b, a], 1, t=0.2, slerp_normalize=normalize), first)
        assert np.linalg.norm(first - a) < np.linalg.norm(first - b)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_threshold(self, sign: int) -> None:
        below, above = sign * 0.9995, sign * np.nextafter(0.9995, 1)
        method, arguments = get("slerp"), arguments_of("slerp", 2, 0, {"t": 0.3})
        assert method.coefficients(np.array([[1, below], [below, 1]]), arguments).branch == "slerp"
        straight = method.coefficients(np.array([[1, above], [above, 1]]), arguments)
        assert straight.branch == "linear"
        np.testing.assert_array_equal(straight.values, np.float32([0.7, 0.3]))

    def test_a_zero_tensor_is_at_a_right_angle(self) -> None:
        expected = [np.sin(0.7 * np.pi / 2), np.sin(0.3 * np.pi / 2)]
        for gram in ([[0, 0], [0, 9]], [[9, 0], [0, 0]], [[0, 0], [0, 0]]):
            np.testing.assert_allclose(coefficients("slerp", gram, 0, t=0.3), expected, rtol=1e-15)

    def test_a_length_up_to_1e_8_counts_as_one(self) -> None:
        for length, branch in ((1e-8, "slerp"), (1.01e-8, "linear")):
            gram = np.array([[length**2, length], [length, 1.0]])
            assert get("slerp").coefficients(gram, arguments_of("slerp", 2, 0, {"t": 0.3})).branch == branch

    @pytest.mark.parametrize("normalize", [False, True])
    def test_opposite_tensors_shrink_through_zero(self, normalize: bool) -> None:
        a, _ = at_angle(1.0, 2.0)
        # The weights are float32.
        np.testing.assert_allclose(merge("slerp", [a, -a], 0, t=0.3, slerp_normalize=normalize), 0.4 * a, rtol=2**-23)
        np.testing.assert_array_equal(merge("slerp", [a, -a], 0, t=0.5, slerp_normalize=normalize), 0 * a)

    @given(angles, lengths, lengths, st.floats(0, 1))
    def test_normalized_changes_direction_and_length_uniformly(
        self, angle: float, length_a: float, length_b: float, t: float
    ) -> None:
        a, b = at_angle(angle, length_a, length_b)
        expected = ((1 - t) * length_a + t * length_b) * rotated(a, b, t)
        result = merge("slerp", [a, b], 0, t=t, slerp_normalize=True)
        assert_close(result, expected, [a, b], RELATIVE / np.sin(angle) ** 2)

    def test_normalized_keeps_the_length_near_a_straight_line(self) -> None:
        a, b = at_angle(0.03, 2.0, 5.0)
        result = merge("slerp", [a, b], 0, t=0.25, slerp_normalize=True)
        assert np.linalg.norm(result) == pytest.approx(0.75 * 2 + 0.25 * 5, rel=1e-14)
        # The chord of an angle differs from its arc by the cube of the angle.
        assert_close(unit(result), rotated(a, b, 0.25), [unit(a)], relative=0.03**3)

    def test_normalized_of_a_zero_tensor_is_linear(self) -> None:
        weights = coefficients("slerp", [[0, 0], [0, 9]], 0, t=0.3, slerp_normalize=True)
        np.testing.assert_array_equal(weights, np.float32([0.7, 0.3]))


class TestNuSlerp:
    @pytest.mark.parametrize("base", [None, 0, 1, 2])
    @pytest.mark.parametrize("vectors", ["tensor", "rows", "columns"])
    def test_is_the_rotation(self, base: int | None, vectors: str) -> None:
        tensors = random_tensors(1, 2 if base is None else 3)
        weight: list[float | None] = [0.4, 0.9]
        origin = np.zeros((5, 7)) if base is None else tensors[base]
        x, y = (tensor - origin for position, tensor in enumerate(tensors) if position != base)
        if base is not None:
            weight.insert(base, None)
        t = 0.9 / (0.4 + 0.9)
        expected = {
            "tensor": lambda: arc(x, y, t),
            "rows": lambda: np.stack([arc(a, b, t) for a, b in zip(x, y, strict=True)]),
            "columns": lambda: np.stack([arc(a, b, t) for a, b in zip(x.T, y.T, strict=True)]).T,
        }[vectors]()
        switches = {"nuslerp_flatten": vectors == "tensor", "nuslerp_row_wise": vectors == "columns"}
        result = merge("nuslerp", tensors, base, weight=weight, **switches)
        assert_close(result, origin + expected, tensors)

    def test_row_wise_has_no_effect_on_a_flat_tensor(self) -> None:
        tensors = random_tensors(2, 2)
        rows = merge("nuslerp", tensors, weight=(1, 2), nuslerp_row_wise=True)
        np.testing.assert_array_equal(rows, merge("nuslerp", tensors, weight=(1, 2)))

    @pytest.mark.parametrize(("weight", "t"), [((1, 3), 0.75), ((-2, 1), -1.0), ((1, -1), 0.5), ((4e-7, 5e-7), 0.5)])
    def test_weights_give_t(self, weight: tuple[float, float], t: float) -> None:
        a, b = at_angle(0.8)
        assert_close(merge("nuslerp", [a, b], weight=weight), rotated(a, b, t), [a, b])

    def test_stays_on_the_arc_where_slerp_is_linear(self) -> None:
        a, b = at_angle(0.01)
        result = get("nuslerp").coefficients(
            np.array([[1, a @ b], [a @ b, 1]]), arguments_of("nuslerp", 2, None, {"weight": 1})
        )
        assert result.branch == "nuslerp"
        # Rounding errors grow by 1 / 0.01 from cosine to angle. The coefficients depend on its square only.
        np.testing.assert_allclose(result.values, np.sin(0.005) / np.sin(0.01), rtol=1e-12)

    def test_a_length_below_1e_7_counts_as_that(self) -> None:
        for length, cosine in ((2e-7, 0.6), (5e-8, 0.3)):
            values = coefficients("nuslerp", [[length**2, 0.6 * length], [0.6 * length, 1]], weight=(1, 1))
            np.testing.assert_allclose(values, 0.5 / np.cos(np.arccos(cosine) / 2), rtol=1e-14)

    @pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, -2.0])
    def test_parallel_tensors_are_mixed_linearly(self, factor: float) -> None:
        (a,) = random_tensors(3, 1)
        expected = (0.7 + 0.3 * factor) * a
        assert_close(merge("nuslerp", [a, factor * a], weight=(0.7, 0.3)), expected, [a, a])

    def test_a_zero_tensor_is_at_a_right_angle(self) -> None:
        a = np.array([3.0, 4.0])
        np.testing.assert_allclose(merge("nuslerp", [a, 0 * a], weight=(0.7, 0.3)), np.sin(0.35 * np.pi) * a)


class TestMultiSlerp:
    @pytest.mark.parametrize("weight", [(0.2, 0.5, 0.7), (1.0, -0.3, 2.0), (3.0, 0.0, 0.0)], ids=str)
    @pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "as given"])
    @pytest.mark.parametrize("eps", [1e-8, 0.1])
    def test_is_the_exponential_map(self, weight: tuple[float, ...], normalize: bool, eps: float) -> None:
        tensors = random_tensors(4, 3)
        weights = np.array(weight) / (sum(weight) if normalize else 1)
        result = merge("multislerp", tensors, weight=weight, normalize_weights=normalize, eps=eps)
        assert_close(result, exponential_map_mean(tensors, weights, eps), tensors)

    def test_relative_to_a_base(self) -> None:
        base, *others = random_tensors(5, 4)
        expected = base + exponential_map_mean([x - base for x in others], np.full(3, 1 / 3))
        result = merge("multislerp", [*others[:1], base, *others[1:]], 1, weight=(1, None, 1, 1))
        assert_close(result, expected, [base, *others])

    def test_an_opposite_pair_is_mixed_linearly(self) -> None:
        (a,) = random_tensors(6, 1)
        np.testing.assert_array_equal(merge("multislerp", [a, -a], weight=(1, 1)), 0 * a)
        np.testing.assert_allclose(merge("multislerp", [a, -3 * a], weight=(1, 1)), -a, rtol=1e-15)

    def test_balanced_directions_have_no_result(self) -> None:
        with pytest.raises(ArcmergeError, match="directions zero in multislerp, got a sum shorter than eps"):
            coefficients("multislerp", [[1, -1, 2], [-1, 1, -2], [2, -2, 4]], weight=(1, 2, 1))

    def test_one_model_besides_the_base_is_copied(self) -> None:
        constant = get("multislerp").constant(arguments_of("multislerp", 2, 0, {"weight": (None, 0.3)}))
        assert constant is not None
        assert (constant.values.tolist(), constant.branch) == ([0, 1], "copy")


class TestKarcher:
    @pytest.mark.parametrize("count", [2, 3, 5, 8])
    def test_is_the_mean_on_the_sphere(self, count: int) -> None:
        tensors = random_tensors(7, count)
        # The iteration ends with a step of at most 1e-7.
        assert_close(merge("karcher", tensors, max_iter=100, tol=0.0), karcher_mean(tensors), tensors, relative=1e-7)

    def test_of_two_is_the_middle_of_the_arc(self) -> None:
        a, b = at_angle(2.0, 3.0, 5.0)
        assert_close(merge("karcher", [a, b]), 4 * rotated(a, b, 0.5), [a, b])

    def test_stops_after_max_iter(self) -> None:
        tensors = random_tensors(8, 3, common=0)
        start = merge("karcher", tensors, max_iter=0)
        assert_close(unit(start), unit(np.sum([unit(x) for x in tensors], axis=0)), [[1]])
        errors = [np.linalg.norm(merge("karcher", tensors, max_iter=n) - karcher_mean(tensors)) for n in (0, 1, 2)]
        assert errors[0] > 3 * errors[1] > 9 * errors[2]

    @pytest.mark.parametrize("tol", [1e-5, 0.0])
    def test_opposite_tensors_give_the_first(self, tol: float) -> None:
        (a,) = random_tensors(9, 1)
        assert_close(merge("karcher", [a, -3 * a], tol=tol), 2 * a, [a])

    def test_a_zero_tensor_counts_in_the_length_only(self) -> None:
        a, b = at_angle(1.0)
        assert_close(merge("karcher", [a, 0 * a, b]), 2 / 3 * rotated(a, b, 0.5), [a, b])

    def test_zero_tensors_give_zero(self) -> None:
        np.testing.assert_array_equal(coefficients("karcher", np.zeros((3, 3))), np.zeros(3))


class TestModelStock:
    @pytest.mark.parametrize("base", [0, 2])
    @pytest.mark.parametrize("filter_wise", [False, True])
    def test_is_the_published_ratio(self, base: int, filter_wise: bool) -> None:
        tensors = random_tensors(11, 4)
        origin, others = tensors[base], [x for position, x in enumerate(tensors) if position != base]
        rows = range(5) if filter_wise else [slice(None)]
        expected = np.empty((5, 7))
        for row in rows:
            differences = [unit((x[row] - origin[row]).ravel()) for x in others]
            cosine = np.mean([differences[i] @ differences[j] for i, j in ((0, 1), (0, 2), (1, 2))])
            ratio = 3 * cosine / (1 + 2 * cosine)
            expected[row] = ratio * np.mean([x[row] for x in others], axis=0) + (1 - ratio) * origin[row]
        assert_close(merge("model_stock", tensors, base, filter_wise=filter_wise), expected, tensors)

    def test_keeps_the_base_if_the_ratio_is_undefined(self) -> None:
        assert coefficients("model_stock", [[1, -1], [-1, 1]], 1, count=3).tolist() == [0, 1, 0]

    def test_tiny_differences_count_as_orthogonal(self) -> None:
        # The product of the lengths, 1e-12, counts as 1e-6.
        values = coefficients("model_stock", np.full((2, 2), 1e-12), 0, count=3)
        np.testing.assert_allclose(values, [1, 1e-6, 1e-6], rtol=3e-6)


CONSTANT: list[tuple[str, int | None, dict[str, Any], list[float], str]] = [
    ("slerp", 0, {"t": 0}, [1, 0], "copy"),
    ("slerp", 0, {"t": 1}, [0, 1], "copy"),
    ("slerp", 1, {"t": 0, "slerp_normalize": True}, [0, 1], "copy"),
    ("nuslerp", None, {"weight": (2, 0)}, [1, 0], "copy"),
    ("nuslerp", 0, {"weight": (None, 0, 3)}, [0, 0, 1], "copy"),
    ("linear", None, {"weight": (1, 3)}, [0.25, 0.75], "linear"),
    ("linear", 0, {"weight": (1, 3), "normalize": False}, [1, 3], "linear"),
    ("linear", None, {"weight": (0, 3)}, [0, 1], "copy"),
    ("linear", None, {"weight": (3,), "normalize": False}, [3], "linear"),
    ("task_arithmetic", 1, {"weight": (0.5, None, 0.25)}, [0.5, 0.25, 0.25], "linear"),
    ("task_arithmetic", 0, {"weight": (None, 1, 3), "normalize": True, "lambda": 2.0}, [-1, 0.5, 1.5], "linear"),
    ("task_arithmetic", 0, {"weight": (None, 1, -1), "normalize": True}, [1, 1, -1], "linear"),
    ("task_arithmetic", 0, {"weight": (None, 1)}, [0, 1], "copy"),
    ("passthrough", None, {}, [1], "copy"),
    ("passthrough", None, {"scale": (0.5,)}, [0.5], "linear"),
    ("passthrough", None, {"scale": (0,)}, [0], "linear"),
    ("nearswap", 1, {"t": 0}, [0, 1], "copy"),
    ("nearswap", 1, {"t": -1}, [0, 1], "copy"),
]


@pytest.mark.parametrize(("name", "base", "parameters", "values", "branch"), CONSTANT)
def test_coefficients_that_do_not_depend_on_the_weights(
    name: str, base: int | None, parameters: dict[str, Any], values: list[float], branch: str
) -> None:
    constant = get(name).constant(arguments_of(name, len(values), base, parameters))
    assert constant is not None
    assert (constant.values.tolist(), constant.branch) == (values, branch)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("linear", "passthrough")])
@pytest.mark.parametrize("base", [None, 0])
def test_a_single_input_is_copied_whatever_the_parameters(name: str, base: int | None) -> None:
    arguments = Arguments(1, base)
    constant = get(name).constant(arguments)
    assert get(name).check(arguments) == []
    assert get(name).dim(arguments) is None
    assert constant is not None
    assert (constant.values.tolist(), constant.branch) == ([1], "copy")


@pytest.mark.parametrize("name", GRAM_METHODS)
class TestEveryGramMethod:
    def grams(self, name: str, seed: int = 12) -> Array:
        size = COUNT[name] - (name == "model_stock")
        vectors = np.random.default_rng(seed).standard_normal((6, size, 9)) + 0.5
        return vectors @ vectors.transpose(0, 2, 1)

    def apply(self, name: str, gram: Array) -> Array:
        return coefficients(name, gram, BASE.get(name), COUNT[name], **GRAM_METHODS[name])

    def test_vectors_are_independent(self, name: str) -> None:
        grams = self.grams(name)
        alone = np.stack([self.apply(name, gram) for gram in grams])
        np.testing.assert_allclose(self.apply(name, grams), alone, rtol=1e-13)
        np.testing.assert_array_equal(
            self.apply(name, grams.reshape(2, 3, *grams.shape[1:])).reshape(6, -1), self.apply(name, grams)
        )

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_gram_matrix_that_is_not_finite_gives_nan_there_and_no_warning(self, name: str, bad: float) -> None:
        grams = self.grams(name)
        expected = self.apply(name, grams)
        grams[2, 0, 1] = grams[2, 1, 0] = grams[2, 1, 1] = bad
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values = self.apply(name, grams)
        assert np.isnan(values[2]).all()
        np.testing.assert_array_equal(np.delete(values, 2, axis=0), np.delete(expected, 2, axis=0))

    @pytest.mark.parametrize("scale", [1e-2, 1e17, 1e38], ids="{:.0e}".format)
    def test_the_scale_of_the_tensors_has_no_effect(self, name: str, scale: float) -> None:
        grams = self.grams(name)
        # The absolute thresholds are 1e-5 and less.
        np.testing.assert_allclose(self.apply(name, scale**2 * grams), self.apply(name, grams), rtol=1e-6)

    def test_float32_at_its_smallest_gives_finite_coefficients(self, name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for scale in (0.0, 1e-90, 1e-38):
                assert np.isfinite(self.apply(name, scale * self.grams(name))).all()

    def test_equal_inputs_give_that_input(self, name: str) -> None:
        (a,) = random_tensors(13, 1)
        assert_close(merge(name, [a] * COUNT[name], BASE.get(name), **GRAM_METHODS[name]), a, [a], relative=1e-8)


@pytest.mark.parametrize(
    ("name", "weight"), [("nuslerp", (None, 0.4, 0.9)), ("multislerp", (None, 0.4, 0.9)), ("model_stock", None)]
)
def test_a_tensor_equal_to_the_base_in_all_models_is_copied(name: str, weight: Any) -> None:
    parameters = {} if weight is None else {"weight": weight}
    assert coefficients(name, np.zeros((2, 2)), 0, 3, **parameters).tolist() == [1, 0, 0]


@given(st.permutations(range(4)), st.sampled_from(["karcher", "multislerp"]))
def test_the_order_of_the_inputs_has_no_effect(order: list[int], name: str) -> None:
    tensors, weights = random_tensors(14, 4), (0.1, 0.2, 0.3, 0.4)
    some: dict[str, Any] = {"weight": weights} if name == "multislerp" else {}
    same: dict[str, Any] = {"weight": [weights[i] for i in order]} if name == "multislerp" else {}
    assert_close(merge(name, [tensors[i] for i in order], **same), merge(name, tensors, **some), tensors)


@pytest.mark.parametrize(
    ("name", "count", "base", "parameters", "sentence"),
    [
        ("slerp", 2, None, {"t": 0.5}, "'slerp' must have one of its 2 models as the base, got none; "
         "set base_model to it"),
        ("slerp", 3, 0, {"t": 0.5}, "'slerp' must have exactly 1 model besides its base, got 2; remove 1"),
        ("nearswap", 4, 0, {"t": 0.5}, "'nearswap' must have exactly 1 model besides its base, got 3; remove 2"),
        ("nuslerp", 2, 0, {"weight": 1}, "'nuslerp' must have exactly 2 models besides its base, got 1; add 1"),
        ("nuslerp", 3, None, {"weight": 1}, "'nuslerp' must have exactly 2 models, got 3; remove 1"),
        ("model_stock", 2, 0, {}, "'model_stock' must have at least 2 models besides its base, got 1; add 1"),
        ("passthrough", 2, 0, {}, "'passthrough' must have exactly 1 model, got 2; remove 1"),
        ("linear", 2, None, {"weight": (1, -1)}, "'weight' must not sum to 0 where 'normalize' divides by the sum, "
         "got a sum of 0; change a weight or set normalize: false"),
        ("multislerp", 3, 0, {"weight": (None, 0, 0)}, "'weight' must not sum to 0 where 'normalize_weights' divides "
         "by the sum, got a sum of 0; change a weight or set normalize_weights: false"),
    ],
)  # fmt: skip
def test_wrong_inputs_give_a_message(name: str, count: int, base: int | None, parameters: Any, sentence: str) -> None:
    assert get(name).check(arguments_of(name, count, base, parameters)) == [sentence]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("SLERP", r"'merge_method' must be one of slerp, .*, got 'SLERP'; did you mean `slerp`\?"),
        ("quantize", "'merge_method' must be one of slerp, .*, got 'quantize'$"),
    ],
)
def test_an_unknown_method_is_an_error(name: str, sentence: str) -> None:
    with pytest.raises(ArcmergeError, match=sentence):
        get(name)
