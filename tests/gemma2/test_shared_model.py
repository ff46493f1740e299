"""Threads and forked processes that share a model."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import arcmerge
import gemma2_models
from arcmerge.gemma2.model import Gemma2

PROMPTS = [[2, 17, 45, 300, 9], [2, 5, 6], [2] * 40]
TIMES = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("a", "b"):
        model = gemma2_models.build(folder / name, "2.6B", num_hidden_layers=2)
        if name == "b":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(-0.7)
            model.save_pretrained(folder / name)
        gemma2_models.save_byte_tokenizer(folder / name)
    return folder


def recipe(models: Path) -> dict[str, Any]:
    listed = [str(models / name) for name in ("a", "b")]
    named = [{"model": name} for name in listed]
    return {"merge_method": "slerp", "base_model": listed[0], "models": named, "parameters": {"t": 0}}


def calls(model: Gemma2) -> list[Callable[[], Any]]:
    """Calls of a model with deterministic results."""
    return [
        *[lambda p=p: model.generate(p, max_new_tokens=8, do_sample=True, seed=len(p)) for p in PROMPTS],
        lambda: model.generate("Some words", max_new_tokens=8),
        lambda: model.score([(PROMPTS[0], [3, 4, 5]), (PROMPTS[0], [7])]),
        lambda: model.logits(PROMPTS).tolist(),
    ]


def at_once(*works: Callable[[], None]) -> None:
    """Run each function in its own thread; raises the first exception."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def test_threads_get_the_results_of_single_calls(models: Path) -> None:
    model = Gemma2.from_pretrained(models / "a", "cpu")
    alone = [call() for call in calls(model)]

    def works(number: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(TIMES):
                assert calls(model)[number]() == alone[number]

        return work

    at_once(*[works(number) for number in range(len(alone))])


def test_every_call_sees_one_t(models: Path) -> None:
    model = Gemma2.from_merge(recipe(models), "cpu")
    by_t = []
    for t in (0, 1):
        model.set_t(t)
        by_t.append([call() for call in calls(model)])
    assert all(one != other for one, other in zip(*by_t, strict=True))
    left = threading.Event()

    def works(number: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(TIMES):
                assert calls(model)[number]() in [answers[number] for answers in by_t]

        return work

    def change() -> None:
        while not left.is_set():
            for t in (0, 1):
                model.set_t(t)

    changing = threading.Thread(target=change, daemon=True)
    changing.start()
    try:
        at_once(*[works(number) for number in range(len(by_t[0]))])
    finally:
        left.set()
        changing.join(60)


def test_a_stream_may_call_the_model(models: Path) -> None:
    model = Gemma2.from_merge(recipe(models), "cpu")
    heard: list[Any] = []
    model.generate([2, 5], max_new_tokens=2, stream=lambda _: heard.append((model.set_t(1), model.score([([2], [5])]))))
    assert len(heard) == 2
    assert heard[0][1] == heard[1][1]


FORK = """
import multiprocessing, os, sys, threading, torch
from arcmerge import Gemma2

def ask(model):
    return (
        model.generate([2, 17] * 60, max_new_tokens=8),
        model.generate("Words", max_new_tokens=8, do_sample=True, seed=3, repetition_penalty=1.3),
        [one.is_greedy for one in model.score([([2] * 90, [3, 4, 5]), ([2] * 90, [7])])],
        list(model.logits([[2, 3] * 60]).shape),
    )

def answer():
    for model in models:
        assert ask(model) == expected
        model.set_t(1)
        assert ask(model) != expected
    torch.exp(torch.zeros(1 << 20))

models = [Gemma2.from_merge(sys.argv[1], "cpu", numerics=numerics) for numerics in ("default", "hf")]
torch.exp(torch.zeros(1 << 20))  # starts the threads of OpenMP
(expected, other) = map(ask, models)
assert expected == other
started, ended = threading.Event(), threading.Event()

def work():
    while not ended.is_set():
        models[0].generate([2, 5], max_new_tokens=50, eos_token_id=[], stream=lambda _: started.set())

busy = threading.Thread(target=work)
for beside in (False, True):  # another thread holds the model's lock during the fork
    if beside:
        busy.start()
        started.wait()
    child = os.fork()
    if not child:
        answer()
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
ended.set()
busy.join()
child = multiprocessing.get_context("fork").Process(target=answer)
child.start()
child.join()
assert child.exitcode == 0
assert ask(models[0]) == expected
assert models[0]._folder.exists()  # no child has removed it
"""


def test_a_forked_process_uses_the_model(models: Path, tmp_path: Path) -> None:
    config = tmp_path / "recipe.yml"
    config.write_text(yaml.safe_dump(recipe(models)))
    command = [sys.executable, "-c", FORK, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_merges_in_a_process_and_its_fork(models: Path, tmp_path: Path) -> None:
    code = (
        "import sys, os, json, arcmerge\n"
        "recipe, out = json.loads(sys.argv[1]), sys.argv[2]\n"
        "arcmerge.merge(recipe, out + '/first', threads=3)\n"
        "if not (child := os.fork()):\n"
        "    arcmerge.merge(recipe, out + '/second', threads=3)\n"
        "    sys.exit()\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    command = [sys.executable, "-c", code, json.dumps(recipe(models)), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    assert arcmerge.Gemma2.from_pretrained(tmp_path / "second", "cpu").generate([2, 5], max_new_tokens=2)
