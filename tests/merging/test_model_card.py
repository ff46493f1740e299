"""The model card and the files that are copied from the donor."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from arcmerge.merging.output.donor_files import donor_files
from arcmerge.merging.output.model_card import is_hub_name, model_card
from arcmerge.merging.recipe.model_reference import ModelReference

HUB = ModelReference("google/gemma-2-2b", "main")
LOCAL = ModelReference("/models/mine")
RECIPE = "merge_method: slerp\nbase_model: google/gemma-2-2b@main\n"


def test_front_matter_names_hub_models_only() -> None:
    card = model_card("out", "slerp", [HUB, LOCAL, HUB], HUB, RECIPE)
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "base_model": ["google/gemma-2-2b"],
        "library_name": "transformers",
        "tags": ["mergekit", "merge", "arcmerge"],
    }


def test_text() -> None:
    card = model_card("out", "slerp", [HUB, LOCAL], HUB, RECIPE)
    link = "[google/gemma-2-2b@main](https://huggingface.co/google/gemma-2-2b)"
    assert card.split("---\n")[2].startswith("# out\n")
    assert f"using the slerp method with {link} as the base." in card
    assert f"* {link}\n* `/models/mine`\n" in card
    assert f"```yaml\n{RECIPE}```\n" in card


def test_no_base() -> None:
    assert "using the linear method.\n" in model_card("out", "linear", [LOCAL], None, RECIPE)


def test_a_fence_in_the_recipe_does_not_end_its_block() -> None:
    recipe = "chat_template: |\n  ```\n  {{ messages }}\n"
    assert f"\n````yaml\n{recipe}````\n" in model_card("out", "slerp", [LOCAL], None, recipe)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("google/gemma-2-2b", True),
        ("gpt2", True),
        ("here/model", False),
        ("./here/other", False),
        ("../model", False),
        ("~/model", False),
        ("/models/a", False),
        ("a/b/c", False),
    ],
)
def test_hub_names(path: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(ModelReference(path)) is expected


def test_donor_files(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", "config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    kept = {"generation_config.json": b"generation_config.json"}
    tokenizer = {"tokenizer.json": b"tokenizer.json", "tokenizer.model": b"tokenizer.model"}
    assert donor_files(tmp_path, tokenizer=True) == kept | tokenizer
    assert donor_files(tmp_path, tokenizer=False) == kept
