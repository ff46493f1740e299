"""Parameters: gradients against numpy.interp, filters and levels against the behaviour of mergekit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcmerge.errors import ArcmergeError
from arcmerge.merging.methods.registry import METHODS
from arcmerge.merging.recipe.parameters import REQUIRED, Parameter, Rule, Settings, convert, evaluate, resolve

T = Parameter("t")
numbers = st.floats(-1e6, 1e6, allow_nan=False)
gradients = st.lists(numbers, min_size=1, max_size=9)
depths = st.floats(0, 1)


def gradient(values, u, kind=float):
    return evaluate(values, u, kind, "t")


def level(*rules, place="parameters", name="t"):
    return Settings(place, {name: tuple(Rule(pattern, (value,)) for pattern, value in rules)})


class TestGradient:
    @given(gradients, depths)
    def test_is_piecewise_linear_through_equidistant_entries(self, values, u):
        expected = np.interp(u, np.linspace(0, 1, len(values)), values) if len(values) > 1 else values[0]
        # The knots of linspace and u * (L - 1) round differently: an ulp of u, times the slope.
        tolerance = 8 * np.finfo(float).eps * len(values) * max(1.0, max(map(abs, values)))
        assert gradient(values, u) == pytest.approx(expected, rel=0, abs=tolerance)

    @given(gradients)
    def test_ends_are_the_first_and_last_entry(self, values):
        assert gradient(values, 0.0) == values[0]
        assert gradient(values, 1.0) == values[-1]

    @given(numbers, depths)
    def test_of_one_entry_is_that_entry_exactly(self, value, u):
        assert gradient([value], u) == value

    @given(gradients, depths)
    def test_stays_between_its_extremes(self, values, u):
        slack = 4 * np.finfo(float).eps * max(map(abs, values))
        assert min(values) - slack <= gradient(values, u) <= max(values) + slack

    def test_v_curve_never_reaches_its_peak_over_26_layers(self):
        up = [0.08 * layer for layer in range(13)]
        observed = up + up[::-1]
        curve = [gradient([0, 0.5, 1, 0.5, 0], layer / 25) for layer in range(26)]
        assert curve == pytest.approx(observed, rel=0, abs=1e-12)

    def test_line_over_26_layers(self):
        line = [gradient([0.2, 0.9], layer / 25) for layer in range(26)]
        assert line == pytest.approx([0.2 + 0.028 * layer for layer in range(26)], rel=0, abs=1e-12)

    @pytest.mark.parametrize(("u", "expected"), [(0, True), (0.49, True), (0.5, False), (0.99, False), (1, True)])
    def test_picks_switches_and_does_not_mix_them(self, u, expected):
        assert gradient([True, False, True], u, bool) is expected

    def test_of_whole_numbers_must_stay_whole(self):
        assert gradient([2, 4], 0.5, int) == 3
        with pytest.raises(ArcmergeError, match=r"'t' must be a whole number, got 2\.5"):
            gradient([2, 4], 0.25, int)


class TestConvert:
    @pytest.mark.parametrize(
        ("value", "kind", "expected"),
        [
            ("0.3", float, 0.3),
            ("1e-3", float, 0.001),
            (1, float, 1.0),
            (10.0, int, 10),
            ("10", int, 10),
            (True, bool, True),
            ("no", bool, False),
            (0, bool, False),
        ],
        ids=repr,
    )
    def test_accepts_text_that_spells_a_value(self, value, kind, expected):
        result = convert(value, kind, "t")
        assert result == expected
        assert type(result) is kind

    @pytest.mark.parametrize(
        ("value", "kind", "sentence"),
        [
            ("abc", float, "'t' must be a finite number, got 'abc'"),
            ("", float, "'t' must be a finite number, got ''"),
            (math.nan, float, "'t' must be a finite number, got nan"),
            ("-inf", float, "'t' must be a finite number, got '-inf'"),
            (10**400, float, "'t' must be a finite number, got 1000"),
            (1.5, int, "'t' must be a whole number, got 1.5"),
            ("maybe", bool, "'t' must be true or false, got 'maybe'"),
            (2, bool, "'t' must be true or false, got 2"),
        ],
        ids=["word", "empty", "nan", "infinity", "overflow", "fraction", "not-a-switch", "two"],
    )
    def test_refuses_other_values_with_a_message(self, value, kind, sentence):
        with pytest.raises(ArcmergeError) as caught:
            convert(value, kind, "t")
        assert str(caught.value).startswith(sentence)


class TestRange:
    SHARE = Parameter("density", low=0, high=1)

    @pytest.mark.parametrize("value", [0, 1, 0.5, "1", -0.0, 1e-300])
    def test_bounds_are_within(self, value):
        assert self.SHARE.read(value, "density") == float(value)

    @pytest.mark.parametrize(
        ("parameter", "value", "sentence"),
        [
            (SHARE, 2, "'p' must be between 0 and 1, got 2"),
            (SHARE, "-1e-3", "'p' must be between 0 and 1, got '-1e-3'"),
            (SHARE, np.nextafter(1, 2).item(), "'p' must be between 0 and 1, got 1.0000000000000002"),
            (SHARE, 53, "'p' must be between 0 and 1, got 53; write 0.53 for 53 %"),
            (SHARE, "12.5", "'p' must be between 0 and 1, got '12.5'; write 0.125 for 12.5 %"),
            (SHARE, 101, "'p' must be between 0 and 1, got 101"),
            (SHARE, math.nan, "'p' must be a finite number, got nan"),
            (Parameter("p", low=0), -53, "'p' must be 0 or more, got -53"),
            (Parameter("p", high=0.5), 53, "'p' must be 0.5 or less, got 53"),
            (Parameter("p", int, low=1, high=9), 53, "'p' must be between 1 and 9, got 53"),
            (Parameter("p", int, low=1), 1.5, "'p' must be a whole number, got 1.5"),
        ],
    )
    def test_other_values_are_refused(self, parameter, value, sentence):
        with pytest.raises(ArcmergeError) as caught:
            parameter.read(value, "p")
        assert str(caught.value) == sentence

    @given(numbers)
    def test_without_bounds_every_number_is_within(self, value):
        assert T.read(value, "t") == value

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=9), depths)
    def test_a_gradient_within_0_and_1_stays_there(self, values, u):
        """Exactly, although 1 - f is rounded: the sum is at most 1 + 2^-54, which is rounded to 1."""
        assert 0 <= gradient(values, u) <= 1

    @pytest.mark.parametrize("method", METHODS)
    def test_defaults_are_within(self, method):
        for parameter in METHODS[method].parameters:
            if parameter.default is not REQUIRED:
                assert parameter.read(parameter.default, parameter.name) == parameter.default


class TestFilters:
    RULES = level(("layers.1.", 0.1), ("layers.2", 0.2), (".*norm", 0.9), ("*", 0.5))

    @pytest.mark.parametrize(
        ("tensor_name", "expected"),
        [
            ("model.layers.1.mlp.up_proj.weight", 0.1),
            ("model.layers.11.mlp.up_proj.weight", 0.5),
            ("model.layers.2.mlp.up_proj.weight", 0.2),
            ("model.layers.25.mlp.up_proj.weight", 0.2),
            ("model.layers.3.input_layernorm.weight", 0.5),
            ("model.norm.weight", 0.5),
        ],
    )
    def test_match_a_part_of_the_name(self, tensor_name, expected):
        assert resolve(T, [self.RULES], tensor_name, 0.0) == expected

    def test_are_case_sensitive(self):
        assert resolve(T, [level(("MLP", 1.0), (None, 0.5))], "model.layers.0.mlp.up_proj.weight", 0.0) == 0.5

    def test_first_match_wins(self):
        assert resolve(T, [level(("mlp", 0.1), ("mlp.up", 0.2))], "layers.0.mlp.up_proj", 0.0) == 0.1

    def test_the_common_slerp_configuration(self):
        rules = Settings(
            "parameters",
            {
                "t": (
                    Rule("self_attn", (0, 0.5, 0.3, 0.7, 1)),
                    Rule("mlp", (1, 0.5, 0.7, 0.3, 0)),
                    Rule(None, (0.5,)),
                )
            },
        )

        def value(part, layer):
            return resolve(T, [rules], f"model.layers.{layer}.{part}.weight", layer / 25)

        attention = {0: 0.0, 6: 0.48, 12: 0.316, 18: 0.652, 25: 1.0}
        for layer, expected in attention.items():
            assert value("self_attn.q_proj", layer) == pytest.approx(expected, abs=1e-12)
            assert value("mlp.up_proj", layer) == pytest.approx(1 - expected, abs=1e-12)
            assert value("input_layernorm", layer) == 0.5


class TestLevels:
    def test_first_level_with_a_match_wins(self):
        assert resolve(T, [level((None, 0.1)), level((None, 0.2))], "x", 0.0) == 0.1

    def test_a_level_without_a_matching_filter_is_skipped(self):
        levels = [level(("mlp", 0.2)), level(("self_attn", 0.6), (None, 0.7))]
        assert resolve(T, levels, "layers.0.mlp.up_proj", 0.0) == 0.2
        assert resolve(T, levels, "layers.0.self_attn.q_proj", 0.0) == 0.6
        assert resolve(T, levels, "model.norm", 0.0) == 0.7

    def test_default_comes_last(self):
        scale = Parameter("scale", default=1.0)
        assert resolve(scale, [level(("mlp", 0.2), name="scale")], "layers.0.mlp.up_proj", 0.0) == 0.2
        assert resolve(scale, [level(("mlp", 0.2), name="scale")], "model.norm", 0.0) == 1.0

    def test_a_missing_entry_without_filter_is_named_as_the_cause(self):
        levels = [level(("mlp", 0.2), place="slices[0].parameters"), level(("self_attn", 0.6))]
        with pytest.raises(ArcmergeError) as caught:
            resolve(T, levels, "model.embed_tokens.weight", 0.0)
        assert str(caught.value) == (
            "'t' must have a value for model.embed_tokens.weight, got none "
            "because no filter of slices[0].parameters.t or parameters.t matches its name; "
            "add a last entry without a filter, `- value: ...`, for all other tensors"
        )

    def test_a_parameter_that_is_not_set(self):
        with pytest.raises(ArcmergeError) as caught:
            resolve(T, [Settings(""), Settings("parameters")], "model.norm.weight", 0.0)
        assert str(caught.value) == (
            "'t' must have a value for model.norm.weight, got none; set `t: ...` in parameters"
        )

    def test_value_in_an_ignored_block_is_named_as_the_cause(self):
        ignored = [level((None, 0.2), place="models[1].parameters")]
        with pytest.raises(ArcmergeError) as caught:
            resolve(T, [Settings("parameters")], "model.norm.weight", 0.0, ignored)
        assert str(caught.value) == (
            "'t' must have a value for model.norm.weight, got none because models[1].parameters.t is not read for a "
            "value that all inputs share; move it to parameters"
        )
