"""Sweeps: what is tried, what it is scored by, what is kept of a run that ended early, and what is left in the end."""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import arcmerge
from arcmerge.gemma2.model import Gemma2
from arcmerge.merging.recipe.changes import changed_recipe
from arcmerge.merging.recipe.recipe import load_recipe
from arcmerge.sweeping.candidates import Candidate, of_curves, of_grid, of_numbers, parents, read_values
from arcmerge.sweeping.journal import Journal, Scored
from arcmerge.sweeping.results import best_of
from arcmerge.sweeping.scores import Function, MultipleChoice, Perplexity, Question, read_questions
from arcmerge.sweeping.sweep import BEST, JOURNAL, score_candidates
from sweeps import LeastT, recipe, rows

TEXT = "tok5 tok6 tok7 tok8 tok9 tok10 tok11 tok12"


# ---- candidates


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:1:0.25", [0, 0.25, 0.5, 0.75, 1]),
        ("0:0.3:0.1", [0, 0.1, 0.2, 0.3]),
        ("1:0:-0.5", [1, 0.5, 0]),
        ("0:1:0.4", [0, 0.4, 0.8]),
        ("0.5", [0.5]),
        ("0, -1,2e-1", [0, -1, 0.2]),
    ],
)
def test_values(text: str, values: list[float]) -> None:
    assert read_values(text, "t") == values


@pytest.mark.parametrize(
    "text", ["", "a", "0:1", "0:1:0", "0:1:-1", "1:0:0.1", "0:1:0.1:2", "nan", "inf", "0:inf:1", "0:1:1e-9", "nan:1:1"]
)
def test_values_that_are_none(text: str) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=r"'t' must be first:last:step as 0:1:0\.1, or numbers"):
        read_values(text, "t")


def test_a_grid_has_every_combination_and_leaves_the_rest_to_the_recipe(models: Path) -> None:
    config = load_recipe(recipe(models, [0, 0.4, 1]))
    grid = of_grid({"self_attn": "0,1", "t:mlp": [0.5], "slerp_normalize": "true,false"}, config)
    assert [one.parameters for one in grid] == [
        {"t:self_attn": t, "t:mlp": 0.5, "slerp_normalize": switch} for t in (0, 1) for switch in (True, False)
    ]
    assert grid[3].varied == {"t:self_attn": 1, "t:mlp": 0.5, "slerp_normalize": 0}
    assert changed_recipe(config, grid[3].parameters).document["parameters"] == {
        "t": [
            {"filter": "self_attn", "value": 1},
            {"filter": "mlp", "value": 0.5},
            {"value": [0, 0.4, 1]},
        ],
        "slerp_normalize": False,
    }
    assert grid[3].name == "t:self_attn=1, t:mlp=0.5, slerp_normalize=false"


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ({"mlp": "much"}, "'grid mlp' must be first:last:step"),
        ({"a": "0:1:0.001", "b": "0:1:0.001"}, "'grid' must have at most 100000 combinations, got 1002001"),
        ({"mlp": 1, "t:mlp": 0}, "'grid t:mlp' must be given once, got t:mlp twice"),
        ({"t[1]": 1}, r"'t\[1\]' must be a parameter of each model, got one that they share"),
        ({"slerp_normalize": "0:1:0.5"}, "'grid slerp_normalize' must be true, false or true,false, got '0:1:0.5'"),
    ],
)
def test_wrong_grids(models: Path, axes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=sentence):
        of_grid(axes, load_recipe(recipe(models)))


def test_a_method_without_t_has_no_filters_of_it(models: Path) -> None:
    linear = load_recipe({**recipe(models), "merge_method": "linear", "parameters": {"weight": 1}})
    weights = of_grid({"weight[1]": "0:1:0.5"}, linear)
    assert [one.name for one in weights] == ["weight[1]=0", "weight[1]=0.5", "weight[1]=1"]
    karcher = load_recipe({**recipe(models), "merge_method": "karcher", "parameters": {}})
    assert [one.parameters for one in of_grid({"max_iter": "1:3:1"}, karcher)] == [{"max_iter": n} for n in (1, 2, 3)]
    for text in ("mlp", "t", "weight:", "weight[5]"):
        with pytest.raises(arcmerge.ArcmergeError, match=r"must (be|have)"):
            of_grid({text: 1}, linear)


def test_parents_are_the_ends_of_a_slerp(models: Path) -> None:
    assert [one.parameters for one in parents(load_recipe(recipe(models)))] == [{"t": 0}, {"t": 1}]
    assert parents(load_recipe({**recipe(models), "merge_method": "nearswap"})) == []


def test_a_curve_has_a_name() -> None:
    assert of_curves({"v": "0,1,0"}) == of_curves({"v": (0, 1, 0)}) == [Candidate("v", {"t": [0, 1, 0]})]
    with pytest.raises(arcmerge.ArcmergeError, match="'curve v' must be first:last:step"):
        of_curves({"v": "0,much"})


# ---- scores


def test_perplexity_is_that_of_the_merged_model_and_counts_tokens_alike(models: Path, tmp_path: Path) -> None:
    # In float32, because in bfloat16 scores depend on the rows of a product where torch multiplies them.
    texts, config = [TEXT, "tok3 tok4 tok5"], {**recipe(models, 0.6), "dtype": "float32"}
    arcmerge.merge(config, tmp_path / "merged", device="cpu")
    model = Gemma2.from_pretrained(tmp_path / "merged", "cpu", torch.float32)
    best = score_candidates(config, of_numbers([0.6]), Perplexity(texts), tmp_path / "out", device="cpu").best
    counts = [len(model.tokenizer.encode(text)) - 1 for text in texts]
    logs = [math.log(model.perplexity(text)) for text in texts]
    total = sum(count * each for count, each in zip(counts, logs, strict=True))
    assert best is not None
    assert best.score == pytest.approx(math.exp(total / sum(counts)), rel=1e-6)
    assert best.score != pytest.approx(math.exp(sum(logs) / 2), rel=1e-3)
    assert Perplexity(texts, 4)(model) != pytest.approx(best.score, rel=1e-6)
    with pytest.raises(arcmerge.ArcmergeError, match="'text' must not be empty, got a text without words"):
        Perplexity([TEXT, " \n"])


def test_accuracy_is_the_share_of_questions_whose_answer_is_most_probable(models: Path) -> None:
    model = Gemma2.from_pretrained(models / "gemma-a", "cpu")
    choices = (" tok5", " tok6 tok7", " tok9")
    context = model.tokenizer.encode("tok1 tok2")
    scores = [model.score([(context, model.tokenizer.encode_plain(choice))])[0].logprob for choice in choices]
    right = scores.index(max(scores))
    questions = [Question("tok1 tok2", choices, number) for number in (right, right, (right + 1) % 3)]
    assert MultipleChoice(questions)(model) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{",
        "1",
        '{"context": "a", "choices": ["b"], "answer": 0}',
        '{"context": "a", "choices": ["b", "c"], "answer": 2}',
        '{"context": "a", "choices": ["b", "c"], "answer": true}',
        '{"context": "a", "choices": ["b", ""], "answer": 0}',
        '{"context": 1, "choices": ["b", "c"], "answer": 0}',
        '{"context": "\\ud800", "choices": ["b", "c"], "answer": 0}',
        "[" * 10000,
    ],
)
def test_questions_that_are_none(tmp_path: Path, line: str) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n\n' + line + "\n")
    with pytest.raises(arcmerge.ArcmergeError, match=r"tasks\.jsonl, line 3: 'question' must be \{.context.: text"):
        read_questions(tmp_path / "tasks.jsonl")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(arcmerge.ArcmergeError, match="must contain questions, got none"):
        read_questions(tmp_path / "none.jsonl")


def test_a_function_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_score_of_models.py").write_text("def length(model):\n    return len(model)\n")
    monkeypatch.chdir(tmp_path)
    assert Function("my_score_of_models:length", False)([1, 2]) == 2
    for name in ("length", "my_score_of_models:width", "no_such_module_at_all:f", ":f"):
        with pytest.raises(
            arcmerge.ArcmergeError,
            match=r"\'function\' must (be named|name a module|be in its module)",
        ):
            Function(name, False)


def test_what_is_wrong_with_a_function_is_said_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_slips.py").write_text(
        "def raises(model):\n    raise ValueError('my own slip')\n\n\ndef forgets(model):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        arcmerge.ArcmergeError,
        match=r"'my_slips:raises' must return a number, got ValueError at .*s\.py:2: my own slip",
    ):
        Function("my_slips:raises", False)([])
    with pytest.raises(arcmerge.ArcmergeError, match="'my_slips:forgets' must return a number, got None"):
        Function("my_slips:forgets", False)([])


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (
            "nothing_of_this_name",
            r"must be in a module that can be imported, got NameError at .*{0}\.py:1: name 'nothing",
        ),
        ("import os\nos.nothere", r"got AttributeError at .*{0}\.py:2: module 'os' has no"),
        ("def f(:", r"got SyntaxError at .*{0}\.py:1: invalid syntax"),
        ("import sys; sys.exit(3)", r"got SystemExit at .*{0}\.py:1: 3"),
        ("f = 5", r"'function' must be a function of a model, got 5"),
        ("g = 5", r"'function' must be in its module, got '{0}:f' and no 'f' in {0}"),
        ("def f(model): raise MemoryError", r"'{0}:f' must return a number, got MemoryError at .*{0}\.py:1$"),
        ("def f(model): raise SystemExit(0)", r"'{0}:f' must return a number, got SystemExit at .*{0}\.py:1: 0$"),
    ],
)
def test_a_module_that_fails_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, sentence: str
) -> None:
    name = f"module_{zlib.crc32(code.encode())}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(arcmerge.ArcmergeError, match=sentence.format(name)):
        Function(f"{name}:f", False)([])


# ---- the run


def test_the_best_recipe_merges_to_what_was_scored(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    best = score_candidates(recipe(models), of_numbers(read_values("0:1:0.25", "t")), LeastT(), out, device="cpu").best
    assert best is not None
    assert (best.name, best.parameters) == ("t=0.5", {"t": 0.5})
    arcmerge.merge(out / BEST, tmp_path / "best", device="cpu")
    arcmerge.merge(recipe(models, 0.5), tmp_path / "expected", device="cpu")
    files = [tmp_path / name / "model.safetensors" for name in ("best", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [(row["candidate"], float(row["t"])) for row in rows(out)] == [
        (f"t={t:g}", t) for t in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert json.loads((out / "results.json").read_text())[1]["parameters"] == {"t": 0.25}
    assert (out / "scores.png").stat().st_size > 5000


def test_without_matplotlib_all_but_the_plot_is_there(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    best = score_candidates(
        recipe(models), of_numbers([0.5]), LeastT(), tmp_path / "out", device="cpu", warn=said.append
    ).best
    assert best is not None
    assert "'matplotlib' must be installed for a plot" in said[-1]
    assert (tmp_path / "out" / BEST).exists()
    assert not (tmp_path / "out" / "scores.png").exists()


def test_a_run_that_was_ended_goes_on(models: Path, tmp_path: Path) -> None:
    out, wanted = tmp_path / "out", of_numbers(read_values("0:1:0.25", "t"))
    with pytest.raises(KeyboardInterrupt):
        score_candidates(recipe(models), wanted, LeastT(fails_at=2), out, device="cpu")
    assert len(rows(out)) == 2
    with (out / JOURNAL).open("a") as file:
        file.write('{"name": "t=0.5", "param')  # cut short as it was written
    told: list[tuple[str, int, int]] = []
    score = LeastT()
    score_candidates(
        recipe(models),
        wanted,
        score,
        out,
        device="cpu",
        progress=lambda one, best, done, total: told.append((one.name, done, total)),
    )
    assert score.calls == 3
    assert told == [("t=0.5", 3, 5), ("t=0.75", 4, 5), ("t=1", 5, 5)]
    score_candidates(recipe(models), wanted, score, out, device="cpu")
    assert score.calls == 3
    assert [row["candidate"] for row in rows(out)] == ["t=0", "t=0.25", "t=0.5", "t=0.75", "t=1"]


@pytest.mark.parametrize("different", ["recipe", "score", "parents", "numerics"])
def test_a_journal_of_another_sweep_is_refused(models: Path, tmp_path: Path, different: str) -> None:
    out = tmp_path / "out"
    score_candidates(recipe(models), of_numbers([0.5]), LeastT(), out, device="cpu")
    score, options = LeastT(), {"numerics": "hf" if different == "numerics" else "default"}
    if different == "score":
        score.identity = "another"
    if different == "parents":
        (models / "gemma-b" / "model.safetensors").touch()
    with pytest.raises(
        arcmerge.ArcmergeError, match=rf"must be the journal of this sweep, got one with another {different}"
    ):
        score_candidates(
            recipe(models, 0.9 if different == "recipe" else 0.3), of_numbers([0.5]), score, out, **options
        )


def test_a_run_that_was_killed_before_it_wrote_its_best_writes_it(models: Path, tmp_path: Path) -> None:
    out, score = tmp_path / "out", LeastT()
    score_candidates(recipe(models), of_numbers([0.5, 0.6]), score, out, device="cpu")
    left = {name: (out / name).read_bytes() for name in (BEST, "results.csv", "results.json", "scores.png")}
    for name in left:
        (out / name).unlink()
    score_candidates(recipe(models), of_numbers([0.5, 0.6]), score, out, device="cpu")
    assert score.calls == 2
    assert {name: (out / name).read_bytes() for name in left} == left


def test_a_candidate_does_not_depend_on_the_one_before(models: Path, tmp_path: Path) -> None:
    """What one sets and the next does not is as in the recipe, so that the best recipe is what was scored."""
    candidates = [Candidate("normalized", {"t": 0.5, "slerp_normalize": True}), Candidate("plain", {"t": 0.5})]
    scores = []
    for number, listed in enumerate((candidates, candidates[::-1])):
        score_candidates(recipe(models), listed, Perplexity([TEXT]), tmp_path / str(number), device="cpu")
        scores.append({row["candidate"]: row["score"] for row in rows(tmp_path / str(number))})
    assert scores[0] == scores[1]
    assert scores[0]["normalized"] != scores[0]["plain"]


def test_two_sweeps_do_not_write_to_one_journal(tmp_path: Path) -> None:
    file = tmp_path / JOURNAL
    with (
        Journal(file, {"recipe": 1}) as journal,
        pytest.raises(arcmerge.ArcmergeError, match="must be written by one sweep at a time, got a second one"),
    ):
        Journal(file, {"recipe": 1})
    with Journal(file, {"recipe": 2}) as journal:  # nothing was scored by the first recipe
        journal.add(Scored("a", {"t": 1}))
    with Journal(file, {"recipe": 2}) as journal:
        assert [one.name for one in journal.scored] == ["a"]


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    half = '{"recipe": 1}\n{"name": "\\ud800", "settings": {}}\n'
    long = '{"recipe": 1}\n{"name": "a", "parameters": {}, "seconds": 1' + "0" * 400 + "}\n"
    for number, content in enumerate(
        (long, "{\n", "[]\n{}\n", '{"recipe": 1}\n{"colour": 1}\n', half, "[" * 10000 + "\n")
    ):
        file = tmp_path / str(number)
        file.write_text(content)
        with pytest.raises(arcmerge.ArcmergeError, match=r"must be the journal of (a|this) sweep, got"):
            Journal(file, {"recipe": 1})


def test_wrong_candidates_are_refused_before_the_first_is_scored(models: Path, tmp_path: Path) -> None:
    score = LeastT()
    linear = {**recipe(models), "merge_method": "linear", "parameters": {"weight": 1}}
    wrong: list[tuple[dict[str, Any], Mapping[str, Any], str]] = [
        (recipe(models), {"t": []}, "'t' must have a value, got an empty list"),
        (recipe(models), {"t": "much"}, "must be a finite number, got 'much'"),
        (recipe(models), {"weight": 1}, "'parameters' must be those of 'slerp'"),
        (recipe(models), {"t:self_atn": 1}, "'t:self_atn' must name a part of a tensor's name after the colon, got"),
        (linear, {"weight[0]": 1, "weight[1]": -1}, "'weight' must not sum to 0"),
    ]
    for config, parameters, sentence in wrong:
        with pytest.raises(arcmerge.ArcmergeError, match=sentence):
            score_candidates(config, [Candidate("wrong", parameters)], score, tmp_path / "out", device="cpu")
    assert score.calls == 0


def test_no_number_is_never_the_best(models: Path, tmp_path: Path) -> None:
    scored = [
        Scored("a", {}, score=math.nan),
        Scored("b", {}, score=2.0),
        Scored("c", {}, score=2.0),
        Scored("d", {}, score=3.0),
    ]
    assert best_of(scored, True) is scored[1]
    assert best_of(scored, False) is scored[3]
    assert best_of(scored[:1], True) is None
