"""Spellings of the same folder are the same model, and a recipe may be one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import arcmerge
import tiny
from arcmerge.cli import main
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.recipe import load_recipe
from arcmerge.sweeping.journal import Scored
from arcmerge.sweeping.sweep import SweepResult

SLERP: dict[str, Any] = {
    "merge_method": "slerp",
    "base_model": "A",
    "models": [{"model": "A"}, {"model": "B"}],
    "parameters": {"t": 0.4},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models A, B and C, and a link to A."""
    folder = tmp_path_factory.mktemp("home")
    for seed, name in enumerate("ABC"):
        weights = tiny.weights(seed, "llama", tiny.DEEP)
        tiny.write_checkpoint(folder / name, tiny.Model(lambda weights=weights: weights, "llama", tiny.DEEP))
    (folder / "link").symlink_to("A")
    return folder


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    return home


SPELLINGS = ["A/", "./A", "A/.", "A//", "../{home}/A", "{here}/A", "~/A", "link", "./link/", "A@main", "{here}/A/@v2"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_a_folder_are_the_same_model(here: Path, spelling: str) -> None:
    spelt = ModelReference.parse(spelling.format(here=here, home=here.name))
    assert spelt == ModelReference("A")
    assert hash(spelt) == hash(ModelReference("A"))
    assert str(spelt) == spelling.format(here=here, home=here.name)
    assert spelt != ModelReference("B")


def test_names_of_repositories_are_the_same_model_only_if_they_are_equal(here: Path) -> None:
    names = ["org/name", "org/name@main", "org/name@v2", "org/Name", "name"]
    assert len({ModelReference.parse(name) for name in names}) == len(names)
    assert ModelReference.parse("org/name@v2") == ModelReference("org/name", "v2")


def merged(config: dict[str, Any], out: Path) -> bytes:
    arcmerge.merge(config, out, device="cpu", threads=1, warn=lambda sentence: None)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("spelling", ["A/", "{here}/A", "~/A", "link", {"model": {"path": "./A", "revision": "main"}}])
def test_the_base_is_found_among_the_models(here: Path, tmp_path: Path, spelling: Any) -> None:
    base = spelling.format(here=here) if isinstance(spelling, str) else spelling
    before = merged(SLERP, tmp_path / "before")
    assert merged({**SLERP, "base_model": base}, tmp_path / "base") == before
    assert merged({**SLERP, "models": [{"model": "B"}, {"model": base}]}, tmp_path / "model") == before
    sources = [{"model": base, "layer_range": [0, 26]}, {"model": "B", "layer_range": [0, 26]}]
    sliced = {**{key: value for key, value in SLERP.items() if key != "models"}, "slices": [{"sources": sources}]}
    assert merged(sliced, tmp_path / "slices") == before
    sliced["slices"] = [{"sources": sources, "base_model": "./A"}]
    assert merged({**sliced, "base_model": None}, tmp_path / "of-the-slice") == before


def test_a_model_of_the_tokenizer_block_is_found_among_the_models(here: Path, tmp_path: Path) -> None:
    rules = {
        "<bos>": {"source": "B", "force": True},
        "<eos>": {"source": {"kind": "model_token", "model": "B", "token": "a"}},
    }
    before = merged({**SLERP, "tokenizer": {"source": "A", "tokens": rules}}, tmp_path / "before")
    spelt = json.loads(json.dumps(rules).replace('"B"', '"./B/"'))
    assert merged({**SLERP, "tokenizer": {"source": "./A", "tokens": spelt}}, tmp_path / "spelt") == before


def test_cards_and_messages_have_the_spelling_of_the_recipe(here: Path, tmp_path: Path) -> None:
    config = {**SLERP, "base_model": "./A/", "models": [{"model": "~/A"}, {"model": "B"}]}
    merged(config, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with `./A/` as the base" in card
    assert "* `~/A`\n* `B`" in card


def test_inspection_of_one_folder_by_two_names(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "A", "A/"]) == 1
    assert capsys.readouterr().err == (
        "arcmerge: 'A' and 'B' must be two models, got 'A' and 'A/', which are one folder; "
        "name another model to compare\n"
    )


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"base_model": "C"}, "'slerp' must have exactly 1 model besides its base C, got 2 (A, B); remove 1"),
        (
            {"base_model": None},
            "'slerp' must have one of its 2 models (A, B) as the base, got none; set base_model to it",
        ),
        (
            {"merge_method": "passthrough", "models": [{"model": "B"}]},
            "'passthrough' must have exactly 1 model, got 2 (B, A, the base_model); remove 1",
        ),
        (
            {"merge_method": "model_stock"},
            "'model_stock' must have at least 2 models besides its base A, got 1 (B); add 1",
        ),
    ],
)
def test_messages_about_counts_name_the_models(here: Path, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(arcmerge.ArcmergeError) as caught:
        arcmerge.merge({**SLERP, **config}, "out", device="cpu", warn=lambda sentence: None)
    (problem,) = caught.value.problems
    assert sentence in problem


# ---- recipes in one line


ONE_LINE = yaml.safe_dump(SLERP, default_flow_style=True, width=10_000).strip()
JSON = json.dumps(SLERP, separators=(",", ":"))


@pytest.mark.parametrize("text", [ONE_LINE, JSON, f"--- {ONE_LINE}", f"  {ONE_LINE}"])
def test_a_line_is_a_recipe(text: str) -> None:
    assert "\n" not in text
    recipe = load_recipe(text)
    assert recipe.text == text
    assert recipe.method == "slerp"
    assert load_recipe(recipe.text) == recipe


@pytest.mark.parametrize(
    "path", ["nowhere.yml", "{name}.yml", "models/absent.yml", "my models: second.yml", "a" * 5000, "x\0y", "slerp"]
)
def test_a_file_that_does_not_exist_is_an_error(path: str) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=r"^'.*' must be a file that can be read as a recipe, got "):
        load_recipe(path)


def test_a_file_whose_name_looks_like_a_recipe_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "{models: here}"
    Path(name).write_text(ONE_LINE)
    assert load_recipe(name).text == ONE_LINE


def test_a_typing_error_in_a_line_is_an_error_of_yaml() -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=r"^'recipe' must be one valid YAML document, got line 1, column "):
        load_recipe(ONE_LINE.removesuffix("}"))


def test_every_function_accepts_a_recipe_in_one_line(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = merged(SLERP, tmp_path / "before")
    arcmerge.merge(ONE_LINE, tmp_path / "python", device="cpu")
    assert (tmp_path / "python" / "model.safetensors").read_bytes() == before
    assert main(["merge", ONE_LINE, str(tmp_path / "command"), "--device", "cpu", "-q"]) == 0
    assert (tmp_path / "command" / "model.safetensors").read_bytes() == before
    assert main(["plan", ONE_LINE, "--device", "cpu", "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == tiny.EMBEDDING


def test_a_sweep_of_a_recipe_in_one_line_has_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, Any] = {}

    def sweep(config: str, out: Path, **options: object) -> SweepResult:
        called.update(config=config, out=out)
        return SweepResult(Scored("best", {"t": 0.5}), (), "score", out)

    monkeypatch.setattr("arcmerge.sweeping.sweep.sweep", sweep)
    for config, folder in ((ONE_LINE, "sweep-recipe"), ("mine.yml", "sweep-mine")):
        monkeypatch.setattr("arcmerge.merging.recipe.recipe.load_recipe", lambda text: load_recipe(ONE_LINE))
        assert main(["sweep", config, "--function", "math:fsum", "--t", "0.5"]) == 0
        assert called == {"config": config, "out": Path(folder)}
