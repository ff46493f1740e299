"""Record the results of mergekit 0.1.5 for every config: writes expected.json next to this file.

    pip install mergekit==0.1.5
    PYTHONPATH=tests:tests/helpers python -m golden.record

The models are made in a temporary folder. Each merge runs in this process, on one thread; mergekit's own tasks are
watched for the parameters they resolved and for the tensors they read, so that the tests need not resolve them again.
Random masks are those of arcmerge for its default seed.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import tiny
from arcmerge.merging.methods.masks import mask_key
from arcmerge.merging.recipe.seed import DEFAULT_SEED
from golden import cases, task_vectors

CONFIG_KEYS = ("architectures", "model_type", "num_hidden_layers", "vocab_size", "tie_word_embeddings")

Resolved = dict[str, tuple[dict[str, Any], list[cases.Source]]]


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models = tiny.make_all(Path(folder) / "models")
        recorded = {name: record(name, models, Path(folder) / "out" / name) for name in cases.names()}
    versions = {name: version(name) for name in ("mergekit", "torch", "transformers")}
    cases.EXPECTED.write_text(_one_line_a_tensor({"versions": versions, "cases": recorded}))
    print(f"{len(recorded)} cases, {cases.EXPECTED.stat().st_size / 1e6:.2f} MB")


def record(case: str, models: Path, out: Path) -> dict[str, Any]:
    """Run one case. Its output counts even if mergekit fails after writing it."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text = cases.config_text(case, models)
    resolved: Resolved = {}
    out.mkdir(parents=True)
    result: dict[str, Any] = {}
    try:
        with _watched(resolved, models):
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), MergeOptions(quiet=True), text)
    except Exception as error:
        first_line = str(error).replace(f"{models}/", "models/").splitlines()[0]
        result["error"] = f"{type(error).__name__}: {first_line}"
    print(f"{case:36s} {result.get('error', 'merged')}")
    if (out / "model.safetensors").exists():
        aligned = any(key in cases.config(case) for key in ("tokenizer", "tokenizer_source"))
        result |= _tensors(out, resolved, aligned=aligned)
    if "error" not in result:
        result |= _description(out)
    return result


class _watched:
    """Notes the parameters and the sources of each tensor that mergekit merges while the block runs."""

    def __init__(self, resolved: Resolved, models: Path) -> None:
        from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

        self.task: Any = ExecuteMergeMethodTask
        self.execute = ExecuteMergeMethodTask.execute
        self.resolved = resolved
        self.models = models

    def __enter__(self) -> None:
        def execute(task: Any, tensors: Any, **rest: Any) -> Any:
            self.resolved[task.output_weight.name] = self._note(task, tensors)
            with choices(task.output_weight.name):
                return self.execute(task, tensors, **rest)

        self.task.execute = execute

    def __exit__(self, *_: object) -> None:
        self.task.execute = self.execute

    def _note(self, task: Any, tensors: Any) -> tuple[dict[str, Any], list[cases.Source]]:
        gathered = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        inputs = [model for model in task.model_order if tensors.get(model) is not None]
        own = [dict(task.input_parameters[model].items()) for model in inputs]
        names = dict.fromkeys(key for values in own for key in values)
        parameters = {**task.parameters, **{key: [values.get(key) for values in own] for key in names}}
        parameters["base"] = inputs.index(task.base_model) if task.base_model in inputs else None
        sources = [
            cases.Source(str(Path(model.model.path).relative_to(self.models)), gathered.weight_info[model].name)
            for model in inputs
        ]
        return dict(sorted(parameters.items())), sources


@contextmanager
def choices(name: str) -> Iterator[None]:
    """What mergekit leaves to chance is as in arcmerge: random masks, and the order of equal magnitudes.

    mergekit draws a mask by torch.bernoulli for each model in turn, and sorts magnitudes by an unstable sort; it takes
    the largest variances by torch.topk.
    """
    from mergekit.merge_methods import generalized_task_arithmetic as methods

    sparsify, unpatched, numbers = methods.sparsify, torch.argsort, itertools.count()
    kinds: dict[str, task_vectors.Kind] = {"random": "random", "della_magprune": "magprune"}

    def choose(difference: Tensor, density: float, method: Any, **rest: Any) -> Tensor:
        magnitudes, key = difference.float().abs(), mask_key(DEFAULT_SEED, name, next(numbers))

        def bernoulli(probabilities: Tensor) -> Tensor:
            settings = {"density": density, **{k: v for k, v in rest.items() if k == "epsilon"}}
            mask = task_vectors.chosen(kinds[method.value], magnitudes, settings, key)
            return mask.reshape(probabilities.shape).to(probabilities.dtype)

        def argsort(values: Tensor, **options: Any) -> Tensor:
            if values.dim() > 1:  # of rows, for probabilities that `bernoulli` does not read
                return unpatched(values, stable=True, **options)
            order = torch.from_numpy(task_vectors.descending(values))
            return order if options["descending"] else order.flip(0)

        def sort(values: Tensor, **options: Any) -> SimpleNamespace:
            return SimpleNamespace(indices=argsort(values, **options))

        with mock.patch.multiple(torch, bernoulli=bernoulli, argsort=argsort, sort=sort):
            return sparsify(difference, density=density, method=method, **rest)

    def topk(values: Tensor, k: int, **_: Any) -> tuple[None, Tensor]:
        return None, torch.from_numpy(task_vectors.descending(values)[:k].copy())

    with mock.patch.object(methods, "sparsify", choose), mock.patch.object(torch, "topk", topk):
        yield


def _tensors(out: Path, resolved: Resolved, *, aligned: bool) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = []
    sources: list[list[str]] = []
    rows = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        its_parameters, its_sources = resolved[name]
        numbers = (
            _number(parameters, its_parameters),
            _number(sources, [cases.encode_source(source) for source in its_sources]),
        )
        rows[name] = cases.encode_tensor(name, tensor, *numbers, aligned=aligned)
    return {"parameters": parameters, "sources": sources, "tensors": rows}


def _number(table: list[Any], entry: Any) -> int:
    if entry not in table:
        table.append(entry)
    return table.index(entry)


def _description(out: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer

    config = json.loads((out / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    described = {key: config.get(key) for key in CONFIG_KEYS}
    described["dtype"] = config.get("dtype") or config.get("torch_dtype")
    described["layer_types"] = len(config.get("layer_types") or [])
    return {
        "files": sorted(path.name for path in out.iterdir()),
        "config": described,
        "vocabulary": cases.vocabulary_digest(tokenizer.get_vocab(with_added_tokens=True)),
        "conversation": cases.render((out / "chat_template.jinja").read_text()),
    }


def _one_line_a_tensor(value: Any, depth: int = 0) -> str:
    if depth > 3 or not isinstance(value, dict) or not value:
        return json.dumps(value, separators=(",", ":"))
    lines = (f"{json.dumps(key)}:{_one_line_a_tensor(item, depth + 1)}" for key, item in value.items())
    return "{\n" + ",\n".join(lines) + "\n}"


if __name__ == "__main__":
    main()
