"""lm-eval on local tasks: arcmerge's model equals lm-eval's own for transformers."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, processors

import arcmerge
from gemma2_models import build, save_byte_tokenizer

lm_eval = pytest.importorskip("lm_eval")
tasks = pytest.importorskip("lm_eval.tasks")

WORDS = ("red", "green", "blue", "a colour", "seven", "no idea at all", "x", "two words")
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[model]"
TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_letter": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} Answer:",
        "doc_to_choice": ["A", "B", "C"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "local_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["q"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer that adds BOS, as Gemma's, and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    build(folder, "2.6B", torch.float32, vocab_size=259, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    save_byte_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks over a file of questions."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = []
    for number in range(12):
        choices = [WORDS[(number + step) % len(WORDS)] for step in (0, 3, 5)]
        question = f"Question {number}: which of these? " * (1 + number % 3)
        text = f"Text {number}. " + "Some words that go on and on. " * (number * 2)
        lines.append({"question": question, "choices": choices, "answer": number % 3, "text": text})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    return folder


def evaluate(local: Path, model: Any, **options: Any) -> dict[str, Any]:
    manager = tasks.TaskManager(include_path=str(local), include_defaults=False)
    names = options.pop("names", list(TASKS))
    return lm_eval.simple_evaluate(
        model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )


def hugging_face(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=4, attn_implementation="eager")


def our_model(**options: Any) -> Any:
    from arcmerge.integrations.lm_eval import ArcmergeLM

    return ArcmergeLM(device="cpu", **options)


@pytest.mark.parametrize("brings_bos", [True, False])
def test_every_kind_of_task_equals_transformers(folder: Path, local: Path, tmp_path: Path, brings_bos: bool) -> None:
    """Also with a tokenizer that adds no BOS; `hf` adds none either."""
    if not brings_bos:
        folder = shutil.copytree(folder, tmp_path / "model")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = processors.Sequence([])
        tokenizer.save(str(folder / "tokenizer.json"))
    ours = evaluate(local, our_model(pretrained=str(folder), dtype="float32"))
    theirs = evaluate(local, hugging_face(folder))
    for name in TASKS:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                found = ours["results"][name][metric]
                if "perplexity" in metric:  # of untrained weights, e to the 27
                    found, value = math.log(found), math.log(value)
                assert found == pytest.approx(value, rel=1e-4), (name, metric)
        for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert one["doc_id"] == other["doc_id"]
            for found, wanted in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                if isinstance(wanted, str):
                    assert found == wanted
                else:
                    values = [list(each) if isinstance(each, tuple | list) else [each] for each in (found, wanted)]
                    assert float(values[0][0]) == pytest.approx(float(values[1][0]), rel=1e-4, abs=2e-3)
                    assert str(values[0][1:]) == str(values[1][1:])


def test_max_length(folder: Path, local: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    ours = evaluate(local, our_model(pretrained=str(folder), dtype="float32", max_length=60), names=["local_text"])
    model = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4, max_length=60, attn_implementation="eager")
    theirs = evaluate(local, model, names=["local_text"])
    key = "byte_perplexity,none"
    assert ours["results"]["local_text"][key] == pytest.approx(theirs["results"]["local_text"][key], rel=1e-4)


def test_the_chat_template_is_that_of_transformers(folder: Path) -> None:
    ours, theirs = our_model(pretrained=str(folder)), hugging_face(folder)
    history = [{"role": "user", "content": "Hello?"}]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    assert ours.chat_template(True) == theirs.chat_template(True) == TEMPLATE
    assert ours.chat_template(False) is None
    assert ours.tok_encode("<bos>ab") == theirs.tok_encode("<bos>ab") == ours.tok_encode("ab")
    assert ours.tokenizer_name == theirs.tokenizer_name


def test_the_command_fails_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own command, which reads all its tasks for ten seconds."""
    from arcmerge.integrations.lm_eval import main

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: our_model(pretrained="/no/such/folder"))
    with pytest.raises(SystemExit, match=r"^arcmerge: .*/no/such/folder"):
        main()


def test_the_default_gpu_of_lm_eval_may_be_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from arcmerge.integrations.lm_eval import ArcmergeLM

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ArcmergeLM(str(folder), device="cuda:0").device == torch.device("cpu")


def test_the_command_takes_a_merge(folder: Path, local: Path, tmp_path: Path) -> None:
    models = [{"model": str(folder)}, {"model": str(folder)}]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}, "dtype": "float32"}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "arcmerge.integrations.lm_eval", "--model", "arcmerge", "--device", "cpu"]
    command += ["--model_args", f"merge={tmp_path}/recipe.yml", "--tasks", "local_choice"]
    command += ["--include_path", str(local), "--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["local_choice"]
    own = evaluate(local, our_model(pretrained=str(folder), dtype="float32"), names=["local_choice"])
    assert found["acc,none"] == own["results"]["local_choice"]["acc,none"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "one of pretrained=DIR and merge=CONFIG"),
        ({"pretrained": "a", "merge": "b"}, "one of pretrained=DIR and merge=CONFIG"),
        ({"pretrained": "a", "dtype": "int8"}, "'dtype' must be bfloat16, float32 or 'auto', got 'int8'"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=sentence):
        our_model(**options)
