"""Recipes: their forms, and the values of parameters for each tensor."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from arcmerge.dtypes import BF16, F16, F32
from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.parameters import Parameter
from arcmerge.merging.recipe.recipe import load_recipe
from arcmerge.merging.recipe.tokenizer_block import ModelToken, TokenizerRecipe, TokenRule

A, B = ModelReference("A"), ModelReference("B")
T = Parameter("t")
WEIGHT = Parameter("weight", scope="input")
SWITCH = Parameter("nuslerp_flatten", kind=bool, default=True)
PAIR = {"merge_method": "slerp", "base_model": "A", "models": [{"model": "A"}, {"model": "B"}]}


def pair(**changes):
    return {**PAIR, **changes}


def layers(model, first, end, **more):
    return {"model": model, "layer_range": [first, end], **more}


def sliced(*sources, **changes):
    return {"merge_method": "slerp", "base_model": "A", "slices": [{"sources": list(sources)}], **changes}


class TestForms:
    TEXT = "merge_method: slerp\nbase_model: A\nmodels: [{model: A}, {model: B}]  # mine\nparameters: {t: 0.3}\n"

    def test_text_path_and_mapping_are_one_recipe(self, tmp_path):
        path = tmp_path / "recipe.yml"
        path.write_text(self.TEXT)
        from_text = load_recipe(self.TEXT)
        assert load_recipe(path) == from_text
        assert load_recipe(str(path)) == from_text
        from_mapping = load_recipe(yaml.safe_load(self.TEXT))
        assert replace(from_mapping, text=from_text.text) == from_text

    def test_text_is_kept_verbatim(self):
        assert load_recipe(self.TEXT).text == self.TEXT

    def test_text_of_a_mapping_reads_back_as_the_same_recipe(self):
        config = sliced(
            {"model": "A", "layer_range": (0, 13)}, layers("B", 13, 26), parameters={"t": [0, "1e-3"]}, dtype="float16"
        )
        recipe = load_recipe(config)
        assert load_recipe(recipe.text) == recipe

    def test_a_mapping_may_have_paths_and_numbers_of_numpy_and_torch(self):
        for t in (np.linspace(0, 1, 3), [np.float64(0), np.float32(0.5), np.int64(1)], torch.tensor([0, 0.5, 1])):
            recipe = load_recipe(pair(base_model=Path("A"), parameters={"t": t}))
            assert recipe.base_model == A
            assert [recipe.value(T, recipe.slices[0], None, "x", u) for u in (0, 0.25, 1)] == [0, 0.25, 1]
        assert load_recipe(pair(parameters={"normalize": np.bool_(True)})).parameters.rules["normalize"][0].values == (
            True,
        )

    def test_models_become_one_slice_of_whole_models(self):
        (piece,) = load_recipe(PAIR).slices
        assert [(source.model, source.layer_range) for source in piece.sources] == [(A, None), (B, None)]

    def test_base_model_is_added_to_models_that_do_not_list_it(self):
        recipe = load_recipe(pair(models=[{"model": "B"}]))
        assert [source.model for source in recipe.slices[0].sources] == [B, A]

    def test_base_model_is_not_added_to_slices(self):
        recipe = load_recipe(sliced(layers("B", 0, 4)))
        assert [source.model for source in recipe.slices[0].sources] == [B]
        assert recipe.models == (B, A)

    def test_same_model_twice_is_kept_twice(self):
        recipe = load_recipe(pair(models=[{"model": "A"}, {"model": "A"}]))
        assert [source.model for source in recipe.slices[0].sources] == [A, A]

    def test_slices_of_one_source_and_of_no_layers_are_accepted(self):
        recipe = load_recipe(
            {**sliced(), "slices": [{"sources": [layers("A", 0, 4)]}, {"sources": [layers("B", 4, 4)]}]}
        )
        assert [piece.sources[0].layer_range for piece in recipe.slices] == [(0, 4), (4, 4)]

    def test_default_module_is_the_model(self):
        inner = {"models": PAIR["models"], "parameters": {"t": 0.4}}
        recipe = load_recipe({"merge_method": "slerp", "base_model": "A", "modules": {"default": inner}})
        assert recipe.slices == load_recipe(PAIR).slices
        assert recipe.value(T, recipe.slices[0], None, "x", 0.0) == 0.4

    @pytest.mark.parametrize(
        ("name", "dtype"), [("bfloat16", BF16), ("torch.float16", F16), ("float32", F32), (None, None)], ids=repr
    )
    def test_dtypes(self, name, dtype):
        recipe = load_recipe(pair(dtype=name, out_dtype=name))
        assert (recipe.dtype, recipe.out_dtype) == (dtype, dtype)

    def test_clean_recipe_has_no_warnings(self):
        config = sliced(
            layers("A", 0, 4, parameters={"weight": 1}),
            layers("B", 0, 4),
            parameters={"t": [{"filter": "mlp", "value": 0.1}, {"value": 0.2}], "nuslerp_flatten": False},
            chat_template="auto",
        )
        recipe = load_recipe(config)
        assert recipe.warnings == ()
        assert recipe.check_parameters([T, WEIGHT, SWITCH]) == ()


class TestReferences:
    def test_revision_is_after_the_last_at_sign(self):
        assert ModelReference.parse("org/model@v1.0") == ModelReference("org/model", "v1.0")
        assert ModelReference.parse("org/a@b@main") == ModelReference("org/a@b", "main")
        assert str(ModelReference("org/model", "main")) == "org/model@main"
        assert str(A) == "A"

    @pytest.mark.parametrize("name", ["c++ model", "a@b", "a@b@c", "x+y@z"])
    def test_an_existing_folder_is_not_split(self, tmp_path, name):
        folder = tmp_path / name
        folder.mkdir()
        assert ModelReference.parse(str(folder)) == ModelReference(str(folder))
        assert ModelReference.parse(f"{folder}@main") == ModelReference(str(folder), "main")

    def test_the_longest_existing_folder_is_taken(self, tmp_path):
        (tmp_path / "m").mkdir()
        (tmp_path / "m@v1").mkdir()
        assert ModelReference.parse(f"{tmp_path}/m@v1@x") == ModelReference(f"{tmp_path}/m@v1", "x")
        assert ModelReference.parse(f"{tmp_path}/m@v2@x") == ModelReference(f"{tmp_path}/m", "v2@x")

    def test_the_revision_of_a_folder_gives_a_warning(self, tmp_path):
        (warning,) = load_recipe(pair(base_model=None, models=[{"model": f"{tmp_path}@main"}])).warnings
        assert warning == "models[0].model: a folder has no revisions, `@main` is ignored"

    def test_mapping_form(self):
        long = {"model": {"path": "org/model", "revision": "main"}, "lora": None}
        recipe = load_recipe(pair(base_model=long, models=[{"model": {"model": "B@v2"}}]))
        assert recipe.base_model == ModelReference("org/model", "main")
        assert recipe.slices[0].sources[0].model == ModelReference("B", "v2")


class TestValues:
    """`recipe.value` against the values read back from mergekit's results."""

    def test_precedence_of_source_slice_and_recipe(self):
        recipe = load_recipe(
            {
                "merge_method": "slerp",
                "base_model": "A",
                "slices": [
                    {
                        "sources": [layers("A", 0, 13), layers("B", 0, 13, parameters={"t": 0.9})],
                        "parameters": {"t": 0.1},
                    },
                    {
                        "sources": [layers("A", 13, 26), layers("B", 13, 26)],
                        "parameters": {"t": [{"filter": "mlp", "value": 0.2}]},
                    },
                ],
                "parameters": {"t": [{"filter": "self_attn", "value": 0.6}, {"value": 0.7}]},
            }
        )
        first, second = recipe.slices
        for part in ("mlp.up_proj", "self_attn.q_proj", "input_layernorm"):
            assert recipe.value(T, first, None, f"model.layers.3.{part}.weight", 0.25) == 0.1
        assert recipe.value(T, second, None, "model.layers.20.mlp.up_proj.weight", 0.5) == 0.2
        assert recipe.value(T, second, None, "model.layers.20.self_attn.q_proj.weight", 0.5) == 0.6
        assert recipe.value(T, second, None, "model.norm.weight", 0.0) == 0.7
        assert recipe.check_parameters([T]) == (
            "slices[0].sources[1].parameters.t: ignored, all inputs share one `t`; move it to the slice or recipe",
        )

    def test_the_module_is_between_slice_and_recipe(self):
        module = {"slices": [{"sources": [layers("A", 0, 2)], "parameters": {"t": [{"filter": "mlp", "value": 0.1}]}}]}
        module["parameters"] = {"t": [{"filter": "self_attn", "value": 0.2}]}
        recipe = load_recipe({"merge_method": "slerp", "modules": {"default": module}, "parameters": {"t": 0.3}})
        found = [recipe.value(T, recipe.slices[0], None, name, 0.0) for name in ("mlp", "self_attn", "norm")]
        assert found == [0.1, 0.2, 0.3]

    def test_source_comes_first_for_parameters_of_an_input(self):
        models = [{"model": "A", "parameters": {"weight": 0.7}}, {"model": "B"}]
        recipe = load_recipe(pair(models=models, parameters={"weight": 0.3}))
        (piece,) = recipe.slices
        assert [recipe.value(WEIGHT, piece, source, "x", 0.0) for source in piece.sources] == [0.7, 0.3]

    def test_one_model_twice_has_two_weights(self):
        models = [{"model": "A", "parameters": {"weight": weight}} for weight in (0.7, 0.3)]
        recipe = load_recipe(pair(models=models))
        (piece,) = recipe.slices
        assert [recipe.value(WEIGHT, piece, source, "x", 0.0) for source in piece.sources] == [0.7, 0.3]

    def test_single_layer_gets_the_last_entry(self):
        recipe = load_recipe(pair(parameters={"t": [0.1, 0.5, 0.9]}))
        assert recipe.value(T, recipe.slices[0], None, "model.layers.0.mlp.up_proj.weight", 1.0) == 0.9

    @pytest.mark.parametrize("setting", ["0.3", {"value": 0.3}, [{"value": "0.3"}], [0.3], ["3e-1"]], ids=repr)
    def test_spellings_of_one_value(self, setting):
        recipe = load_recipe(pair(parameters={"t": setting}))
        assert recipe.check_parameters([T]) == ()
        assert recipe.value(T, recipe.slices[0], None, "x", 0.5) == 0.3

    def test_scientific_notation_that_yaml_reads_as_text(self):
        recipe = load_recipe("merge_method: slerp\nmodels: [{model: A}]\nparameters: {t: [1e-3, 1e-1]}\n")
        assert recipe.value(T, recipe.slices[0], None, "x", 1.0) == 0.1

    def test_missing_value_of_the_added_base_model(self):
        recipe = load_recipe(pair(models=[{"model": "B", "parameters": {"weight": 1}}]))
        (piece,) = recipe.slices
        with pytest.raises(
            ArcmergeError, match=r"set `weight: \.\.\.` in the parameters of the base model listed under models"
        ):
            recipe.value(WEIGHT, piece, piece.sources[1], "model.norm.weight", 0.0)

    def test_t_under_models_only(self):
        recipe = load_recipe(pair(models=[{"model": "A"}, {"model": "B", "parameters": {"t": 0.3}}]))
        with pytest.raises(
            ArcmergeError, match=re.escape("models[1].parameters.t is not read for a value that all inputs share")
        ):
            recipe.value(T, recipe.slices[0], None, "model.embed_tokens.weight", 0.0)


class TestTokenizer:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"tokenizer_source": "base"}, TokenizerRecipe("base")),
            ({"tokenizer_source": "org/m@v1"}, TokenizerRecipe(ModelReference("org/m", "v1"))),
            ({"tokenizer": {}}, TokenizerRecipe("union")),
            ({"tokenizer": {"source": {"model": {"path": "B"}}}}, TokenizerRecipe(B)),
            ({}, None),
        ],
        ids=["base", "model", "empty-block", "mapping", "none"],
    )
    def test_source(self, config, expected):
        assert load_recipe(pair(**config)).tokenizer == expected

    def test_tokens(self):
        tokens = {
            "<donor>": {"source": "B", "force": "yes"},
            "<zero>": {"source": {"kind": "zero"}},
            "<text>": {"source": {"kind": "model_token", "model": "B", "token": " "}},
            "<id>": {"source": {"kind": "model_token", "model": "C", "token_id": "0"}},
            "<new>": {},
        }
        tokenizer = load_recipe(pair(tokenizer={"tokens": tokens, "pad_to_multiple_of": "64"})).tokenizer
        assert tokenizer == TokenizerRecipe(
            "union",
            {
                "<donor>": TokenRule(B, True),
                "<zero>": TokenRule("zero"),
                "<text>": TokenRule(ModelToken(B, token=" ")),
                "<id>": TokenRule(ModelToken(ModelReference("C"), token_id=0)),
                "<new>": TokenRule(),
            },
            64,
        )
        assert tokenizer.models == (B, ModelReference("C"))
