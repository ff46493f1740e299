"""The targets of fuzzing: for each kind of file a seed, a way to change it, and all code that reads it."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tiny
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.gemma2.model import Gemma2
from arcmerge.merging.merge import merge
from arcmerge.merging.options import Options
from arcmerge.merging.output.files import small_files
from arcmerge.merging.prepare import prepare
from arcmerge.sweeping.journal import Journal, Scored
from arcmerge.sweeping.results import best_of, write_tables
from arcmerge.sweeping.scores import MultipleChoice, Scoring, read_questions
from fuzz.mutations import Mutate, mutate_json, mutate_lines, mutate_safetensors, mutate_text

SMALL = replace(tiny.GEOMETRY, num_hidden_layers=2, hidden_size=16, intermediate_size=16, vocab_size=280)
RECIPE: dict[str, Any] = {
    "merge_method": "slerp",
    "base_model": "a",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 1]}, {"model": "b", "layer_range": [0, 1]}]},
        {"sources": [{"model": "a", "layer_range": [1, 2]}, {"model": "b", "layer_range": [1, 2]}]},
    ],
    "parameters": {"t": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.3}]},
    "tokenizer": {"source": "union", "tokens": {"<unk>": {"source": "b", "force": True}}, "pad_to_multiple_of": 8},
    "dtype": "bfloat16",
    "chat_template": "auto",
}
_WORDS = (b"t: 0.5", b"- ", b"{", b"}", b"&a", b"*a", b"<<: *a", b"!!python/object", b"null", b"layer_range: [0, 2]")
_TAGS = (b"{{", b"}}", b"{%", b"%}", b"{% for m in messages %}", b"{% endfor %}", b"messages", b"|", b"(", b"[0]", b"~")
_TAGS += (b"raise_exception('x')", b"strftime_now('%d')", b"{% break %}", b"{% generation %}", b"tools", b".__class__")
TEMPLATE = b"{{ bos_token }}{% for m in messages %}{{ m['role'] + m.content | trim }}<end_of_turn>\n{% endfor %}"
# The keys of published files that the tiny models do not have, as far as any code reads them.
CONFIG: dict[str, Any] = {
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "dtype": "bfloat16",
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 64,
    "query_pre_attn_scalar": 16,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": 10000.0},
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 8,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_bidirectional_attention": None,
    "auto_map": {"AutoConfig": "configuration_x.Config"},
}
GENERATION_CONFIG: dict[str, Any] = {
    "_from_model_config": True,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "max_new_tokens": 2,
    "max_length": 20,
    "stop_strings": ["ab"],
    "eos_token_id": [1, 5],
    "bos_token_id": 2,
    "pad_token_id": 0,
    "num_beams": 1,
    "bad_words_ids": None,
}
TURNS = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]


@dataclass(frozen=True)
class Target:
    """A file of a world to change, and the code that reads it.

    Attributes:
        file: the path in the world's folder.
        mutate: changes the content.
        run: reads the changed file, given the world's folder; raises ArcmergeError if the file is wrong.
        seed: the content to start from, given the world's folder.
    """

    file: str
    mutate: Mutate
    run: Callable[[Path], object]
    seed: Callable[[Path], bytes]


class World:
    """A folder with two small models and other files to read; one of its files is changed at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for seed, name in enumerate("ab"):
            weights = partial(tiny.weights, seed, geometry=SMALL)
            tiny.write_checkpoint(folder / name, tiny.Model(weights, geometry=SMALL))
            (folder / name / "chat_template.jinja").write_bytes(TEMPLATE)
            for file, more in (("config.json", CONFIG), ("generation_config.json", GENERATION_CONFIG)):
                path = folder / name / file
                path.write_text(json.dumps({**json.loads(path.read_bytes()), **more}))
        sharded = tiny.Model(partial(tiny.weights, 2, geometry=SMALL), geometry=SMALL, shards=2)
        tiny.write_checkpoint(folder / "s", sharded)
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]})
        )
        (folder / "recipe.yml").write_text(json.dumps(RECIPE))
        (folder / "questions.jsonl").write_text(
            "".join(json.dumps({"context": "ab", "choices": ["c", "d"], "answer": n % 2}) + "\n" for n in range(3))
        )
        with Journal(folder / "journal.jsonl", _ABOUT) as journal:
            for t in range(2):
                journal.add(Scored(f"t={t}", {"t": t}, {"t": float(t)}, score=2.5, seconds=0.1))

    def run(self, name: str, data: bytes) -> None:
        """Read the target's file with `data` as its content; raises the errors of reading it."""
        target = TARGETS[name]
        file = self.folder / target.file
        before = file.read_bytes()
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            file.write_bytes(data)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.run(self.folder)
        finally:
            os.chdir(here)
            file.write_bytes(before)


def _ignore(sentence: str) -> None:
    pass


def _plan(recipe: Mapping[str, Any] | str, folder: Path) -> None:
    small_files(prepare(recipe, Options(), _ignore), "merged")


def _plan_union(folder: Path) -> None:
    _plan(RECIPE, folder)


def _plan_plain(folder: Path) -> None:
    _plan({key: value for key, value in RECIPE.items() if key not in ("tokenizer", "chat_template")}, folder)


def _merge(recipe: Any, folder: Path) -> None:
    """Merge to disk and check that the output is complete or absent."""
    out = folder / "out"
    try:
        merge(recipe, out, warn=_ignore, threads=1)
        Checkpoint(out)
    finally:
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        shutil.rmtree(out, ignore_errors=True)
        assert not left, left


def _model(folder: Path) -> None:
    """Plan a merge, and run the model even if that fails, because one error would hide the other."""
    try:
        _plan_plain(folder)
    finally:
        Gemma2.from_pretrained(folder / "a", device="cpu").generate([2, 7, 8], max_new_tokens=2)


def _text(folder: Path) -> None:
    tokenizer = Gemma2.from_pretrained(folder / "a", device="cpu").tokenizer
    tokenizer.decode(tokenizer.encode("ab <bos> é"))
    tokenizer.render_chat(TURNS)


def _tokenizer(folder: Path) -> None:
    try:
        _plan_union(folder)
    finally:
        _text(folder)


def _template(folder: Path) -> None:
    try:
        _text(folder)
    finally:
        _plan_union(folder)


def _journal(folder: Path) -> None:
    with Journal(folder / "journal.jsonl", _ABOUT) as journal:
        journal.add(Scored("t=2", {"t": 2}, {"t": 2.0}, score=2.5, seconds=0.1))
        best_of(journal.scored, minimize=True)
        write_tables(journal.scored, Scoring([MultipleChoice([])] * 2, seeds=[1]), lambda one: one.name, folder)


def _of(file: str) -> Callable[[Path], bytes]:
    return lambda folder: (folder / file).read_bytes()


def _target(file: str, mutate: Mutate, run: Callable[[Path], object]) -> Target:
    return Target(file, mutate, run, _of(file))


_ABOUT = {"recipe": "x", "score": "y", "parents": {}, "numerics": "default"}
TARGETS: Mapping[str, Target] = {
    "config": _target("a/config.json", mutate_json, _model),
    "config-merge": _target("b/config.json", mutate_json, partial(_merge, RECIPE)),
    "generation-config": _target("a/generation_config.json", mutate_json, _model),
    "tokenizer": _target("a/tokenizer.json", mutate_json, _tokenizer),
    "tokenizer-other": _target("b/tokenizer.json", mutate_json, _plan_union),
    "tokenizer-config": _target("a/tokenizer_config.json", mutate_json, _tokenizer),
    "chat-template": _target("a/chat_template.jinja", partial(mutate_text, words=_TAGS), _template),
    "header": _target("a/model.safetensors", mutate_safetensors, partial(_merge, RECIPE)),
    "index": _target("s/model.safetensors.index.json", mutate_json, lambda folder: Checkpoint(folder / "s")),
    "recipe": _target("recipe.yml", mutate_json, partial(_merge, "recipe.yml")),
    "recipe-text": _target(
        "recipe.yml", partial(mutate_text, words=_WORDS), lambda folder: _plan("recipe.yml", folder)
    ),
    "journal": _target("journal.jsonl", mutate_lines, _journal),
    "questions": _target("questions.jsonl", mutate_lines, lambda folder: read_questions(folder / "questions.jsonl")),
    "adapter": _target("adapter/adapter_config.json", mutate_json, lambda folder: Checkpoint(folder / "adapter")),
}
