"""The examples in docstrings run on a tiny model."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import arcmerge
import gemma2_models

# The modules of the public functions and classes.
MODULES = (
    "merging.merge",
    "merging.preview",
    "tensors",
    "sweeping.sweep",
    "gemma2.model",
    "gemma2.merged_model",
    "gemma2.generation.chat",
    "integrations.lm_eval",
    "integrations.mergekit",
    "integrations.transformers.acceleration",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `base/`, `tuned/` and `out/`, a text, and `recipe.yml`, which merges the first two."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("base", "tuned", "out"):
        gemma2_models.build(folder / name, "2.6B", num_hidden_layers=2)
        gemma2_models.save_byte_tokenizer(folder / name)
        (folder / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": gemma2_models.TURNS}))
    file = folder / "tuned" / "model.safetensors"
    save_file({name: 1.25 * weight + 0.01 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    models = [{"model": str(folder / name)} for name in ("base", "tuned")]
    recipe = {
        "merge_method": "slerp",
        "base_model": str(folder / "base"),
        "models": models,
        "parameters": {"t": 0.5},
    }
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    (folder / "validation.txt").write_text("A text to score.")
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"integrations.lm_eval": "lm_eval", "integrations.mergekit": "mergekit"}.get(name, "arcmerge"))
    module = importlib.import_module(f"arcmerge.{name}")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {key: nn.Linear(4, 4) for key in ("a", "b", "math", "code", "pretrained")}
    names |= {"arcmerge": arcmerge, "model": nn.Linear(4, 4)}
    if name == "gemma2.merged_model":
        names["model"] = arcmerge.Gemma2.from_merge("recipe.yml")
    elif name.startswith(("gemma2", "integrations")):
        names["model"] = arcmerge.Gemma2.from_pretrained("out/")
    examples = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=names) if test.examples]
    assert examples
    runner = doctest.DocTestRunner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for example in examples:
            runner.run(example)
    assert runner.failures == 0


def test_every_public_function_is_documented() -> None:
    functions = [getattr(arcmerge, name) for name in arcmerge.__all__ if not name.startswith("_")]
    functions = [one for one in functions if inspect.isfunction(one)]
    methods = [one for name, one in vars(arcmerge.Gemma2).items() if name[0] != "_" and inspect.isfunction(one)]
    assert len(functions) >= 8
    for function in (*functions, *methods):
        text = inspect.getdoc(function) or ""
        assert text.splitlines()[0].endswith("."), function
        if [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]:
            assert "Args:" in text, function
