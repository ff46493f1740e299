"""The seed of random methods, from recipe, option or flag to the bits and the texts of the result.

A method of the test stands for all random methods: it draws the weights of its inputs, so that the merged bits depend
on the seed. `slerp` stands for the others.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import arcmerge
import tiny
from arcmerge.cli import main
from arcmerge.merging.methods import registry
from arcmerge.merging.methods.masks import mask_key
from arcmerge.merging.methods.method import Arguments, Coefficients, Method
from arcmerge.merging.options import Options
from arcmerge.merging.recipe.changes import changed_recipe
from arcmerge.merging.recipe.recipe import load_recipe, with_seed
from arcmerge.merging.recipe.seed import DEFAULT_SEED
from arcmerge.sweeping.candidates import Candidate
from arcmerge.sweeping.scores import Function
from arcmerge.sweeping.sweep import score_candidates

LARGEST = 2**63 - 1
NO_SEEDS = [-1, 2**63, 1.0, True, "7", [7]]


class Chance(Method):
    name = "chance"
    title = "Chance"
    random = True

    def constant(self, arguments: Arguments) -> Coefficients:
        drawn = [mask_key(arguments.seed, "", model) / 2**64 for model in range(arguments.count)]
        return Coefficients(np.array(drawn), self.name)


@pytest.fixture(autouse=True)
def chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "METHODS", {**registry.METHODS, Chance.name: Chance()})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def recipe(models: Path) -> dict[str, Any]:
    pair = [{"model": str(models / name)} for name in ("gemma-a", "gemma-b")]
    return {"merge_method": "chance", "models": pair, "dtype": "bfloat16"}


def slerp(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = recipe["models"][0]["model"]
    return {**recipe, "merge_method": "slerp", "base_model": base, "parameters": {"t": 0.3}, **changes}


def merged(recipe: Any, out: Path, **options: Any) -> bytes:
    """The bits of a merge."""
    arcmerge.merge(recipe, out, device="cpu", **options)
    return (out / "model.safetensors").read_bytes()


# ---- the recipe


@pytest.mark.parametrize("seed", [0, 7, LARGEST])
def test_a_recipe_has_a_seed(recipe: dict[str, Any], seed: int) -> None:
    read = load_recipe({**recipe, "seed": seed})
    assert (read.seed, read.warnings) == (seed, ())
    assert load_recipe(read.text) == read
    assert load_recipe(f"seed: {seed}\n" + yaml.safe_dump(recipe)).seed == seed


def test_a_recipe_without_a_seed_has_the_fixed_one(recipe: dict[str, Any]) -> None:
    assert load_recipe(recipe).seed == load_recipe({**recipe, "seed": None}).seed == DEFAULT_SEED == 0


@pytest.mark.parametrize("seed", NO_SEEDS, ids=repr)
def test_other_values_are_refused_with_all_other_problems(recipe: dict[str, Any], seed: object) -> None:
    with pytest.raises(arcmerge.ArcmergeError) as caught:
        load_recipe({**recipe, "seed": seed, "dtype": "int8"})
    assert len(caught.value.problems) == 2
    assert "'seed' must be a whole number from 0 to 2^63 - 1, got " in str(caught.value)


def test_a_seed_is_written_into_document_and_text(recipe: dict[str, Any]) -> None:
    for before in (load_recipe(recipe), load_recipe({**recipe, "seed": 3})):
        after = with_seed(before, 8)
        assert after.seed == after.document["seed"] == yaml.safe_load(after.text)["seed"] == 8
        assert load_recipe(after.text) == after
        assert after.slices == before.slices


def test_other_parameters_keep_the_seed(recipe: dict[str, Any]) -> None:
    changed = changed_recipe(load_recipe(slerp(recipe, seed=5)), {"t": 0.9})
    assert (changed.seed, yaml.safe_load(changed.text)["seed"]) == (5, 5)


# ---- where it goes


def test_the_same_seed_gives_the_same_bits(recipe: dict[str, Any], tmp_path: Path) -> None:
    default = merged(recipe, tmp_path / "default")
    assert default == merged({**recipe, "seed": 0}, tmp_path / "zero") == merged(recipe, tmp_path / "z", random_seed=0)
    seven = merged({**recipe, "seed": 7}, tmp_path / "seven")
    assert seven != default
    assert seven == merged({**recipe, "seed": 3}, tmp_path / "over", random_seed=7)
    assert seven == merged(tmp_path / "over" / "mergekit_config.yml", tmp_path / "again")


def test_the_texts_of_a_result_tell_the_seed(recipe: dict[str, Any], tmp_path: Path) -> None:
    report = arcmerge.merge(recipe, tmp_path / "out", device="cpu", random_seed=7)
    assert report.seed == 7
    assert str(report).endswith(" copied, seed 7")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "using the Chance method. Its random numbers have the seed 7.\n" in card
    assert "\nseed: 7\n" in card
    assert yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text()) == {**recipe, "seed": 7}
    assert arcmerge.merge(recipe, tmp_path / "out", device="cpu").seed == 0
    assert "seed 0" in (tmp_path / "out" / "README.md").read_text()


def test_methods_without_random_numbers_are_silent_about_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    text, warnings = yaml.safe_dump(slerp(recipe)) + "# mine\n", list[str]()
    plain = merged(text, tmp_path / "plain")
    report = arcmerge.merge(text, tmp_path / "out", device="cpu", random_seed=7, warn=warnings.append)
    assert (report.seed, warnings) == (None, [])
    assert "seed" not in f"{report}{(tmp_path / 'out' / 'README.md').read_text()}"
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == text
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == plain


def test_a_plan_has_the_seed(recipe: dict[str, Any]) -> None:
    plan = arcmerge.plan({**recipe, "seed": 3}, random_seed=7)
    assert plan.seed == 7
    assert {job.values.seed for job in plan.jobs if len(job.inputs) > 1} == {7}
    assert arcmerge.plan(slerp(recipe, seed=3)).seed is None


@pytest.mark.parametrize("function", [arcmerge.merge, arcmerge.plan, arcmerge.merge_state_dicts, Options])
def test_the_option_is_the_recipes_seed_by_default(function: Any) -> None:
    assert inspect.signature(function).parameters["random_seed"].default is None


@pytest.mark.parametrize("seed", NO_SEEDS, ids=repr)
def test_options_are_checked(seed: Any) -> None:
    for call in (Options, lambda **given: arcmerge.merge_state_dicts([{}], "linear", **given)):
        with pytest.raises(arcmerge.ArcmergeError, match=r"^'random_seed' must be a whole number from 0 to 2\^63 - 1"):
            call(random_seed=seed)


def test_state_dicts_have_the_bits_of_files(recipe: dict[str, Any], tmp_path: Path) -> None:
    inputs = [load_file(Path(one["model"]) / "model.safetensors") for one in recipe["models"]]
    for seed in (None, 7):
        merged(recipe, tmp_path / "out", random_seed=seed)
        expected = load_file(tmp_path / "out" / "model.safetensors")
        actual = arcmerge.merge_state_dicts(inputs, "chance", random_seed=seed)
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_merge_in_memory_keeps_its_seed(recipe: dict[str, Any], tmp_path: Path) -> None:
    expected = merged({**recipe, "seed": 7}, tmp_path / "expected")
    model = arcmerge.Gemma2.from_merge(recipe, "cpu", random_seed=7)
    assert yaml.safe_load(model.recipe)["seed"] == 7
    norm = load_file(tmp_path / "expected" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.network.weights.norm, norm)
    assert model.set_parameters() == 0
    model.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == expected


@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_the_best_recipe_of_a_sweep_has_the_seed(recipe: dict[str, Any], tmp_path: Path) -> None:
    def score(model: arcmerge.Gemma2) -> float:
        return float(model.network.weights.norm.float().sum())

    norms = []
    for seed in (7, 8):
        folder = tmp_path / str(seed)
        result = score_candidates(
            recipe, [Candidate("only", {})], Function(score, minimize=False), folder, device="cpu", random_seed=seed
        )
        assert yaml.safe_load((folder / "best.yml").read_text())["seed"] == seed
        assert result.best is not None
        merged(folder / "best.yml", folder / "best")
        norms.append(load_file(folder / "best" / "model.safetensors")["model.norm.weight"].float().sum().item())
        assert result.best.score == norms[-1]
    assert norms[0] != norms[1]


# ---- the command


def test_the_flag_comes_before_the_recipe(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "recipe.yml", tmp_path / "out"
    file.write_text(yaml.safe_dump({**recipe, "seed": 3}))
    for flags, seed in (([], 3), (["--random-seed", "7"], 7)):
        assert main(["merge", str(file), str(out), *flags]) == 0
        assert f" copied, seed {seed}\n" in capsys.readouterr().out
        assert main(["plan", str(file), *flags]) == 0
        assert f"seed {seed}" in " ".join(capsys.readouterr().out.split())
        assert main(["plan", str(file), "--json", *flags]) == 0
        assert {row["seed"] for row in json.loads(capsys.readouterr().out)} == {seed}
    file.write_text(yaml.safe_dump(slerp(recipe)))
    assert main(["plan", str(file), "--random-seed", "7"]) == 0
    printed = capsys.readouterr()
    assert "seed" not in printed.out + printed.err


@pytest.mark.parametrize("text", ["-1", "1.5", "seven", "", str(2**63), "٣"])
def test_flags_that_are_no_seed(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe.yml", f"--random-seed={text}"]) == 2
    assert "'random_seed' must be a whole number from 0 to 2^63 - 1, got " in capsys.readouterr().err
