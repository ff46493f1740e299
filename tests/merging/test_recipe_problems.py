"""Recipes with errors or entries without effect, and the one message that each gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.parameters import Parameter
from arcmerge.merging.recipe.recipe import load_recipe

T = Parameter("t")
WEIGHT = Parameter("weight", scope="input")
DENSITY = Parameter("density", scope="non_base", low=0, high=1)
SWITCH = Parameter("nuslerp_flatten", kind=bool, default=True)
PAIR = {"merge_method": "slerp", "base_model": "A", "models": [{"model": "A"}, {"model": "B"}]}


def pair(**changes):
    return {**PAIR, **changes}


def layers(model, first, end, **more):
    return {"model": model, "layer_range": [first, end], **more}


def sliced(*sources, **changes):
    return {"merge_method": "slerp", "base_model": "A", "slices": [{"sources": list(sources)}], **changes}


def refusal(config, *parameters):
    with pytest.raises(ArcmergeError) as caught:
        load_recipe(config).check_parameters(parameters)
    return caught.value.problems


class TestWarnings:
    @pytest.mark.parametrize(
        ("config", "warning"),
        [
            (pair(paramters={"t": 1}), "paramters: unknown key, ignored; did you mean `parameters`?"),
            (pair(color="red"), "color: unknown key, ignored"),
            (pair(name="first"), "name: this key has no effect on a merge; remove it"),
            (
                pair(models=[{"model": "A", "layer_range": [0, 2]}]),
                "models[0].layer_range: unknown key, ignored",
            ),
            (
                {**sliced(), "slices": [{"sources": [layers("A", 0, 1)], "residual_weight": 0.1}]},
                "slices[0].residual_weight: this key has no effect on a merge; remove it",
            ),
            (
                pair(parameters={"t": [{"filters": "mlp", "value": 0.1}]}),
                "parameters.t[0].filters: unknown key, ignored; did you mean `filter`?",
            ),
            (
                pair(parameters={"t": [{"value": 0.1}, {"filter": "mlp", "value": 0.2}]}),
                "parameters.t: entries after one without a filter are never used; put that one last",
            ),
            (pair(parameters={"t": []}), "parameters.t: an empty list sets nothing; give a number or remove the key"),
            (pair(tokenizer={"sources": "base"}), "tokenizer.sources: unknown key, ignored; did you mean `source`?"),
            (
                pair(base_model={"model": "A", "override_architecture": "X"}),
                "base_model.override_architecture: this key has no effect on a merge; remove it",
            ),
        ],
        ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
    )
    def test_of_keys_without_effect(self, config, warning):
        assert load_recipe(config).warnings == (warning,)

    @pytest.mark.parametrize(
        ("config", "warning"),
        [
            (
                pair(parameters={"wieght": 1}),
                "parameters.wieght: `slerp` has no such parameter, ignored; did you mean `weight`?",
            ),
            (
                pair(models=[{"model": "A", "parameters": {"density": 1}}]),
                "models[0].parameters.density: `slerp` has no such parameter, ignored",
            ),
            (
                pair(models=[{"model": "A", "parameters": {"lambda_like": 1}}]),
                "models[0].parameters.lambda_like: ignored, `slerp` does not read `lambda_like` of the base model",
            ),
        ],
        ids=["typo", "other-method", "of-the-base"],
    )
    def test_of_parameters_without_effect(self, config, warning):
        non_base = Parameter("lambda_like", scope="non_base")
        assert load_recipe(config).check_parameters([T, WEIGHT, non_base]) == (warning,)


BROKEN = {
    "no-method": (
        {"models": PAIR["models"]},
        "'merge_method' must be the name of a merge method, such as `merge_method: slerp`, got nothing (null)",
    ),
    "no-input": (
        {"merge_method": "slerp"},
        "'recipe' must have exactly one of models, slices, modules, got none",
    ),
    "two-inputs": (
        pair(slices=[{"sources": [layers("A", 0, 1)]}]),
        "'recipe' must have exactly one of models, slices, modules, got models and slices",
    ),
    "empty-models": (
        pair(models=[]),
        "'models' must be a list of one or more models, such as `- model: ...`, got an empty list",
    ),
    "models-not-a-list": (
        pair(models="A"),
        "'models' must be a list of one or more models, such as `- model: ...`, got 'A'",
    ),
    "model-not-a-mapping": (pair(models=["A"]), "'models[0]' must be a mapping of names to values, got 'A'"),
    "model-missing": (
        pair(models=[{}]),
        "'models[0].model' must be the name of a model, `path` or `path@revision`, got nothing (null)",
    ),
    "model-a-number": (
        pair(base_model=7),
        "'base_model' must be the name of a model, `path` or `path@revision`, got 7",
    ),
    "empty-revision": (
        pair(base_model="org/model@"),
        "'base_model' must be `path` or `path@revision`, got 'org/model@'",
    ),
    "lora": (
        pair(base_model="org/model+org/adapter"),
        "'base_model' must not have a LoRA adapter, which is not supported, got 'org/model+org/adapter', which is not "
        "a folder on this machine; "
        "merge the adapter into its model first and name the result",
    ),
    "lora-mapping": (
        pair(base_model={"model": "A", "lora": "L"}),
        "'base_model.lora' must not be set, because LoRA adapters are not supported, got 'L'; "
        "merge the adapter into its model first and name the result",
    ),
    "revision-a-number": (
        pair(base_model={"model": {"path": "A", "revision": 12}}),
        "'base_model.model.revision' must be a branch, tag or commit, in quotes, got 12",
    ),
    "slices-empty": (sliced(), "'slices[0].sources' must be a list of one or more sources, such as "),
    "layer-range-missing": (sliced({"model": "A"}), "'slices[0].sources[0].layer_range' must be [first, last + 1], "),
    "layer-range-of-one": (sliced({"model": "A", "layer_range": [0]}), "'slices[0].sources[0].layer_range' must be "),
    "layer-range-backwards": (
        sliced(layers("A", 5, 2)),
        "'slices[0].sources[0].layer_range' must be [first, last + 1], "
        "two whole numbers of 0 or more in ascending order, got [5, 2]",
    ),
    "layer-range-negative": (
        sliced(layers("A", -1, 2)),
        "'slices[0].sources[0].layer_range' must be [first, last + 1]",
    ),
    "layer-range-fraction": (
        sliced(layers("A", 0, 2.5)),
        "'slices[0].sources[0].layer_range' must be [first, last + 1]",
    ),
    "layer-range-text": (sliced({"model": "A", "layer_range": "0-4"}), "'slices[0].sources[0].layer_range' must be "),
    "parameters-a-number": (pair(parameters=3), "'parameters' must be a mapping of names to values, got 3"),
    "t-null": (
        pair(parameters={"t": None}),
        "'parameters.t' must be a number, a list of numbers only, or a list of `{filter, value}` entries only, "
        "got nothing (null)",
    ),
    "t-a-word": (pair(parameters={"t": "abc"}), "'parameters.t' must be a finite number, got 'abc'"),
    "t-mixed": (
        pair(parameters={"t": [0.1, {"value": 0.2}]}),
        "'parameters.t' must be a number, a list of numbers only, or a list of `{filter, value}` entries only, "
        "got [0.1, {'value': 0.2}]",
    ),
    "t-nested": (pair(parameters={"t": [[0.1], 0.2]}), "'parameters.t' must be a number, a list of numbers only, or "),
    "t-without-value": (
        pair(parameters={"t": [{"filter": "mlp"}]}),
        "'parameters.t[0]' must have a `value`, got {'filter': 'mlp'}; add `value: ...`",
    ),
    "filter-a-number": (
        pair(parameters={"t": [{"filter": 12, "value": 1}]}),
        "'parameters.t[0].filter' must be text to find in tensor names, got 12; quote it",
    ),
    "dtype-nickname": (
        pair(dtype="bf16"),
        "'dtype' must be one of bfloat16, float16, float32, got 'bf16'; write `bfloat16`",
    ),
    "dtype-half": (
        pair(out_dtype="torch.fp16"),
        "'out_dtype' must be one of bfloat16, float16, float32, got 'torch.fp16'; write `float16`",
    ),
    "dtype-double": (
        pair(dtype="float64"),
        "'dtype' must be one of bfloat16, float16, float32, got 'float64'; write `float32`",
    ),
    "dtype-integer": (pair(dtype="int64"), "'dtype' must be one of bfloat16, float16, float32, got 'int64'"),
    "dtype-a-list": (pair(dtype=["float16"]), "'dtype' must be one of bfloat16, float16, float32, got ['float16']"),
    "other-module": (
        {"merge_method": "slerp", "modules": {"vision": {"models": PAIR["models"]}}},
        "'modules' must have the module `default` only, as decoder-only language models do, got ['vision']",
    ),
    "modules-a-number": ({"merge_method": "slerp", "modules": 3}, "'modules' must have the module `default` only, "),
    "module-a-number": (
        {"merge_method": "slerp", "modules": {"default": 3}},
        "'modules.default' must be a mapping of names to values, got 3",
    ),
    "module-without-input": (
        {"merge_method": "slerp", "modules": {"default": {}}},
        "'modules.default' must have exactly one of models, slices, got none",
    ),
    "no-modules": ({"merge_method": "slerp", "modules": {}}, "'modules' must have the module `default` only, "),
    "two-tokenizers": (
        pair(tokenizer_source="base", tokenizer={"source": "base"}),
        "'tokenizer_source' must not be set together with `tokenizer`, got 'base'; keep one of the two",
    ),
    "tokenizer-a-word": (
        pair(tokenizer="union"),
        "'tokenizer' must be a mapping, got 'union'; write `tokenizer_source: union` instead",
    ),
    "pad-zero": (
        pair(tokenizer={"pad_to_multiple_of": 0}),
        "'tokenizer.pad_to_multiple_of' must be a whole number from 1 to 16777215, got 0",
    ),
    "force-a-word": (
        pair(tokenizer={"tokens": {"<x>": {"force": "often"}}}),
        "'tokenizer.tokens[\"<x>\"].force' must be true or false, got 'often'",
    ),
    "token-kind": (
        pair(tokenizer={"tokens": {"<x>": {"source": {"kind": "one"}}}}),
        "'tokenizer.tokens[\"<x>\"].source.kind' must be `model_token` or `zero`, got 'one'",
    ),
    "token-named-twice": (
        pair(
            tokenizer={
                "tokens": {"<x>": {"source": {"kind": "model_token", "model": "A", "token": "a", "token_id": 1}}}
            }
        ),
        "'tokenizer.tokens[\"<x>\"].source' must have exactly one of `token` (the text) and `token_id` (the id), "
        "got both",
    ),
    "token-id-negative": (
        pair(tokenizer={"tokens": {"<x>": {"source": {"kind": "model_token", "model": "A", "token_id": -1}}}}),
        "'tokenizer.tokens[\"<x>\"].source.token_id' must be a whole number from 0 to 16777215, got -1",
    ),
    "token-id-a-list": (
        pair(tokenizer={"tokens": {"<x>": {"source": {"kind": "model_token", "model": "A", "token_id": [1]}}}}),
        "'tokenizer.tokens[\"<x>\"].source.token_id' must be a whole number from 0 to 16777215, got [1]",
    ),
    "token-a-number": (
        pair(tokenizer={"tokens": {7: {}}}),
        "'tokenizer.tokens' must have keys that are text, got 7; put it in quotes",
    ),
    "chat-template-a-list": (
        pair(chat_template=[]),
        "'chat_template' must be `auto`, the name of a chat template, or the text",
    ),
    "switch-a-word": (
        pair(parameters={"nuslerp_flatten": "perhaps"}),
        "'parameters.nuslerp_flatten' must be true or false, got 'perhaps'",
    ),
}


class TestProblems:
    @pytest.mark.parametrize(("config", "sentence"), BROKEN.values(), ids=BROKEN.keys())
    def test_one_message_each(self, config, sentence):
        (problem,) = refusal(config, T, SWITCH)
        assert problem.startswith(sentence)
        assert "\n" not in problem

    def test_values_out_of_range_at_every_level(self):
        source = layers("B", 0, 1, parameters={"density": 53})
        rules = [{"filter": "mlp", "value": [0, 1, 1.5]}, {"value": "-1"}]
        config = {
            **sliced(parameters={"density": rules}),
            "slices": [{"sources": [source], "parameters": {"density": [2, 3]}}],
        }
        assert refusal(config, DENSITY) == (
            "'slices[0].sources[0].parameters.density' must be between 0 and 1, got 53; write 0.53 for 53 %",
            "'slices[0].parameters.density' must be between 0 and 1, got 2",
            "'slices[0].parameters.density' must be between 0 and 1, got 3",
            "'parameters.density' must be between 0 and 1, got 1.5",
            "'parameters.density' must be between 0 and 1, got '-1'",
        )
        assert load_recipe(pair(parameters={"density": [0, "0.5", 1]})).check_parameters([DENSITY]) == ()

    def test_all_at_once(self):
        config = {"models": [{"model": "A+B"}], "dtype": "half", "parameters": {"t": None}, "tokenizer": 3}
        places = {problem.split("'")[1] for problem in refusal(config)}
        assert places == {"merge_method", "models[0].model", "parameters.t", "dtype", "tokenizer"}

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("merge_method: [slerp\nmodels:\n", "'recipe' must be one valid YAML document, got line 2, column 7: "),
            ("a: 1\n\tb: 2\n", "'recipe' must be one valid YAML document, got line 2, column 1: "),
            (
                "a: 1\nb: {c: 1,\n  c: 2}\n",
                "'recipe' must be one valid YAML document, got line 3, column 3: the key `c` twice",
            ),
            ("a: 1\n---\nb: 2\n", "'recipe' must be one valid YAML document, got line 2, column 1: "),
            ("a: !!python/name:os.system x\n", "'recipe' must be one valid YAML document, got line 1, column 4: "),
            ("a: \x00\n", "'recipe' must be one valid YAML document, got "),
            (
                "- slerp\n- t\n",
                "'recipe' must be a mapping that starts with lines like `merge_method: slerp`, got ['sl",
            ),
            (
                "\n",
                "'recipe' must be a mapping that starts with lines like `merge_method: slerp`, got nothing (null)",
            ),
        ],
        ids=["unclosed", "tab", "duplicate", "two-documents", "unsafe-tag", "control-character", "list", "empty"],
    )
    def test_text_that_is_not_a_recipe(self, text, sentence):
        (problem,) = refusal(text)
        assert problem.startswith(sentence)
        assert "\n" not in problem

    def test_a_key_that_overrides_a_merged_one_is_not_a_duplicate(self):
        text = "merge_method: slerp\nmodels:\n- &a {model: A, parameters: {weight: 1}}\n- {<<: *a, model: B}\n"
        assert load_recipe(text).slices[0].sources[1].model == ModelReference("B")

    def test_a_file_that_does_not_exist(self, tmp_path):
        (problem,) = refusal(tmp_path / "none.yml")
        assert problem == (
            f"'{tmp_path}/none.yml' must be a file that can be read as a recipe, got No such file or directory"
        )

    def test_file_that_is_not_text(self, tmp_path):
        path: Path = tmp_path / "recipe.yml"
        path.write_bytes(b"\xff\xfe\x00")
        (problem,) = refusal(path)
        assert problem.startswith(f"'{path}' must be UTF-8 text to be read as a recipe, got ")

    def test_mapping_that_yaml_cannot_hold(self):
        (problem,) = refusal(pair(parameters={"t": object}))
        assert problem == "'recipe' must have values of YAML's types only, got <class 'object'>"
