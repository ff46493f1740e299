"""Sweeps by the command and by the function arcmerge.sweep."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import arcmerge
from arcmerge.cli import main
from arcmerge.gemma2.model import Gemma2
from arcmerge.sweeping import arguments
from sweeps import KnownLosses, recipe, rows

TEXT = "tok5 tok6 tok7 tok8 tok9 tok10 tok11 tok12"


# ---- the command


@pytest.fixture
def files(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe(models, [0, 0.5])))
    (tmp_path / "text.txt").write_text(TEXT)
    question = {"context": "tok1 tok2", "choices": [" tok5", " tok6"], "answer": 0}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "score_by_norm.py").write_text(
        "def norm(model):\n    return model.network.weights.norm.float().norm()\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["--text", "text.txt"], 11),
        (["--text", "text.txt", "text.txt", "--window", "5", "--t", "0,1"], 2),
        (["--text", "text.txt", "--text", "text.txt", "--t", "0.5"], 3),
        (["--tasks", "tasks.jsonl", "--curve", "up=0,1", "--curve", "down=1,0"], 4),
        (["--function", "score_by_norm:norm", "--grid", "mlp=0,1", "--grid", "self_attn=0:1:0.5"], 8),
        (["--function", "score_by_norm:norm", "--minimize", "--optimize", "3", "--bounds", "0.2:0.4"], 5),
        (["--text", "text.txt", "--t", "0.5", "--curve", "v=0,1,0", "--optimize", "1"], 5),
        (["--text", "text.txt", "--optimize", "2", "--vary", "t:mlp=0.2:0.4", "--vary", "t"], 4),
    ],
)
def test_the_command(files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], count: int) -> None:
    assert main(["sweep", "recipe.yml", "--device", "cpu", *arguments]) == 0
    said = capsys.readouterr()
    assert len(rows(files / "sweep-recipe")) == count
    assert said.out.startswith("best by ")
    assert (files / "sweep-recipe" / "scores.png").exists()
    assert f"{count} of {count}  " in said.err
    assert main(["merge", "sweep-recipe/best.yml", "merged", "--device", "cpu", "-q"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "one of the arguments --text --tasks --function is required"),
        (["--text", "none.txt"], 1, "'text' must be files in UTF-8 that can be read"),
        (["--text", "text.txt", "--t", "x"], 1, "'t' must be first:last:step"),
        (["--text", "text.txt", "--optimize", "0"], 1, "'optimize' must be a number of candidates from 1 up, got 0"),
        (["--text", "text.txt", "--sampler", "tpe"], 1, "'sampler' must be given with optimize alone"),
        (["--text", "text.txt", "--optimize", "2", "--bounds", "1"], 1, "'--bounds' must be low:high as 0:1, got '1'"),
        (["--text", "text.txt", "--optimize", "2", "--vary", "t=1"], 1, "'--vary' must be low:high as 0:1, got '1'"),
        (["--text", "text.txt", "--vary", "t"], 1, "'vary' must be given with optimize alone, got it without"),
        (
            ["--text", "text.txt", "--grid", "t[1]=0,1"],
            1,
            "'t[1]' must be a parameter of each model, got one",
        ),
        (["--tasks", "tasks.jsonl", "--window", "4"], 1, "'window' must be given with text alone, got it with tasks"),
        (["--text", "text.txt", "--window", "1"], 1, "'window' must be from 2 to 128"),
    ],
)
def test_wrong_calls(
    files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, sentence: str
) -> None:
    assert main(["sweep", "recipe.yml", "--device", "cpu", *arguments]) == code
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


# ---- the function


def test_the_function_does_what_the_command_does(files: Path) -> None:
    def norm(model: Gemma2) -> float:
        return float(model.network.weights.norm.float().norm())

    told: list[tuple[str, int, int]] = []
    result = arcmerge.sweep(
        "recipe.yml",
        "swept",
        function=norm,
        minimize=True,
        t=[0.25],
        curves={"up": [0, 1]},
        grid={"mlp": "0,1"},
        device="cpu",
        progress=lambda one, best, done, total: told.append((one.name, done, total)),
    )
    names = ["t=0.25", "up", "t:mlp=0", "t:mlp=1", "t=0", "t=1"]
    assert told == [(name, done, 6) for done, name in enumerate(names, 1)]
    assert [one.name for one in result.scored] == names
    assert result.best == min(result.scored, key=lambda one: one.score)
    assert str(result).startswith(f"best by norm: {result.best.name}, ")
    assert arcmerge.sweep("recipe.yml", "swept", function=norm, minimize=True, t=0.25, device="cpu").best == result.best
    assert len(arcmerge.sweep("recipe.yml", "texts", text=["text.txt"], t="0,1", device="cpu").scored) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "'score' must be one of text, tasks and function, got none"),
        ({"text": "text.txt", "tasks": "tasks.jsonl"}, "got text and tasks"),
        (
            {"text": "text.txt", "t": "much"},
            "'t' must be first:last:step as 0:1:0.1, or numbers as .*, got 'much'",
        ),
        ({"text": "text.txt", "t": [0, math.inf]}, r"'t' must be .*, got \[0, inf\]"),
        ({"text": "text.txt", "optimize": 2.5}, "'optimize' must be a number of candidates from 1 up, got 2.5"),
        ({"tasks": "tasks.jsonl", "minimize": True}, "'minimize' must be given with function alone, got it with tasks"),
        ({"text": "text.txt", "bounds": (0, 1)}, "'bounds' must be given with optimize alone"),
        ({"function": 5}, "'function' must be a function of a model, got 5"),
    ],
)
def test_wrong_arguments_of_the_function(files: Path, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=sentence):
        arcmerge.sweep("recipe.yml", "swept", device="cpu", **arguments)
    assert not (files / "swept").exists()


def test_the_parameters_of_single_models_are_swept(files: Path, models: Path) -> None:
    """Of a method without t; best.yml is a plain recipe, with the values at the models."""
    sources = recipe(models)["models"]
    config = {"merge_method": "linear", "dtype": "bfloat16", "models": sources, "parameters": {"weight": 1}}
    (files / "linear.yml").write_text(yaml.safe_dump(config))
    grid = ["--grid", "weight[1]=0.25,0.5", "--grid", "weight[gemma-a]:mlp=0,2", "--grid", "normalize=true,false"]
    assert main(["sweep", "linear.yml", "--function", "score_by_norm:norm", "--device", "cpu", "-q", *grid]) == 0
    found = rows(files / "sweep-linear")
    assert len(found) == 8
    assert list(found[0])[:4] == ["candidate", "weight[1]", "weight[gemma-a]:mlp", "normalize"]
    best = yaml.safe_load((files / "sweep-linear" / "best.yml").read_text())
    assert best["models"][1]["parameters"] == {"weight": 0.5}
    assert best["models"][0]["parameters"]["weight"][0]["filter"] == "mlp"
    assert best["parameters"] == {"weight": 1, "normalize": False}
    arcmerge.merge("sweep-linear/best.yml", "merged", device="cpu")
    merged = Gemma2.from_pretrained("merged", "cpu")
    assert float(merged.network.weights.norm.float().norm()) == max(float(row["score"]) for row in found)


def test_a_method_without_t_needs_candidates(files: Path, models: Path) -> None:
    config = {"merge_method": "linear", "models": recipe(models)["models"], "parameters": {"weight": 1}}
    sentence = r"'grid' must be given for 'linear', which has no t, got .*; vary one of its parameters \(weight, normal"
    with pytest.raises(arcmerge.ArcmergeError, match=sentence):
        arcmerge.sweep(config, "swept", text="text.txt", device="cpu")


def test_a_sweep_is_not_resumed_with_other_code(files: Path) -> None:
    """All lambdas have one name; their scores must not be mixed."""
    for _ in range(2):
        arcmerge.sweep("recipe.yml", "swept", function=lambda model: 1.0, t=0.5, device="cpu")
    with pytest.raises(arcmerge.ArcmergeError, match="must be the journal of this sweep, got one with another score"):
        arcmerge.sweep("recipe.yml", "swept", function=lambda model: 2.0, t=0.5, device="cpu")


def test_the_command_tells_what_a_race_stopped(
    files: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arguments, "Perplexity", lambda texts, window: KnownLosses())
    call = ["sweep", "recipe.yml", "--text", "text.txt", "--t", "0:1:0.2", "--race", "--race-seed", "1"]
    assert main([*call, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert re.search(r"t=0: about \d\.\d+, stopped after \d+ tokens, \d\.\d s  \(best t=0\.\d: ", said.err)
    assert re.search(r"stopped early: \d of 6 candidates; \d\d% of the work", said.out)
