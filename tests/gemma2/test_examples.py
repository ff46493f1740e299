"""The examples in docstrings run on a tiny model."""

from __future__ import annotations

import doctest
import importlib
import json
import warnings
from pathlib import Path

import pytest
import yaml

import arcmerge
import gemma2_models

MODULES = (
    "gemma2.model",
    "gemma2.merged_model",
    "gemma2.generation.chat",
    "integrations.lm_eval",
    "integrations.mergekit",
    "integrations.transformers.acceleration",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `out/`, and `recipe.yml`, which merges it with itself."""
    folder = tmp_path_factory.mktemp("examples")
    out = folder / "out"
    gemma2_models.build(out, "2.6B", num_hidden_layers=2)
    gemma2_models.save_byte_tokenizer(out)
    (out / "tokenizer_config.json").write_text(json.dumps({"chat_template": gemma2_models.TURNS}))
    models = [{"model": str(out)}, {"model": str(out)}]
    recipe = {"merge_method": "slerp", "base_model": str(out), "models": models, "parameters": {"t": 0.5}}
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"integrations.lm_eval": "lm_eval", "integrations.mergekit": "mergekit"}.get(name, "arcmerge"))
    module = importlib.import_module(f"arcmerge.{name}")
    monkeypatch.chdir(folder)
    is_merged = name == "gemma2.merged_model"
    model = arcmerge.Gemma2.from_merge("recipe.yml") if is_merged else arcmerge.Gemma2.from_pretrained("out/")
    examples = doctest.DocTestFinder(exclude_empty=True).find(module, globs={"arcmerge": arcmerge, "model": model})
    examples = [example for example in examples if example.examples]
    assert examples
    runner = doctest.DocTestRunner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for example in examples:
            runner.run(example)
    assert runner.failures == 0
