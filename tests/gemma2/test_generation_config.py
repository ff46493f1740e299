"""Defaults of generation_config.json, as in transformers; seeds; temperature 0."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2ForCausalLM

import arcmerge
from arcmerge.cli import main
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.generation.generation_config import GenerationConfig
from arcmerge.gemma2.model import Gemma2
from gemma2_models import build, save_byte_tokenizer

F32 = torch.float32
IDS = torch.tensor([[2, 70, 80, 90, 100]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build(folder, "2.6B", F32, num_hidden_layers=2, vocab_size=259)
    save_byte_tokenizer(folder)
    return folder


def write(folder: Path, **settings: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


def load(folder: Path) -> Gemma2:
    return Gemma2.from_pretrained(folder, "cpu", F32)


@torch.inference_mode()
@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 9, "repetition_penalty": 1.8},
        {"max_length": 12},
        {"max_length": 12, "max_new_tokens": 4},
        {"do_sample": True, "top_k": 1, "max_new_tokens": 6},
        {"do_sample": True, "top_p": 1e-6, "temperature": 0.7, "max_new_tokens": 6},
        {"do_sample": True, "min_p": 1.0, "max_new_tokens": 6},
        {"max_new_tokens": 5, "temperature": None, "top_k": None, "do_sample": None, "pad_token_id": None},
        {"max_new_tokens": 30, "eos_token_id": list(range(130, 259)), "pad_token_id": 7},
        {"max_new_tokens": 30, "eos_token_id": 40},
    ],
    ids=lambda value: " ".join(value),
)
def test_the_defaults_are_those_of_transformers(folder: Path, settings: dict[str, Any]) -> None:
    write(folder, **{"eos_token_id": 1, "pad_token_id": 0, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load(folder)
    theirs = Gemma2ForCausalLM.from_pretrained(folder, dtype=F32, attn_implementation="eager").eval()
    two = torch.cat([IDS, IDS + 1])
    for ids in (IDS, two):
        assert torch.equal(ours.generate(ids), theirs.generate(ids, attention_mask=torch.ones_like(ids)))
    assert ours.generate(IDS, max_new_tokens=3, eos_token_id=[]).shape == (1, 8)  # what a call says wins
    assert ours.generate(IDS, max_length=7, eos_token_id=[]).shape == (1, 7)


def test_the_commands_have_the_same_defaults(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["generate", str(folder), "abc", "--dtype", "float32"]
    write(folder, max_new_tokens=4, repetition_penalty=1.9, do_sample=True, top_k=1, eos_token_id=[])
    assert main(call) == 0
    said = capsys.readouterr()
    assert said.out == load(folder).generate("abc", do_sample=False) + "\n"
    assert re.search(r"4 new at .*, seed \d+", said.err)
    assert main([*call, "--no-sample", "--max-new-tokens", "2"]) == 0
    assert re.search("2 new at", said := capsys.readouterr().err)
    assert "seed" not in said
    write(folder, stop_strings=["x"], max_length=9)
    model = load(folder)
    assert model.generation_config.settings == {"stop_strings": ("x",), "max_length": 9}
    assert len(model.generate([2, 3, 4], eos_token_id=[])) <= 9


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": "hot"}, "'temperature' must be a number, got 'hot'"),
        ({"temperature": -1}, "'temperature' must be 0 (greedy) or more, got -1.0"),
        ({"top_k": 2.5}, "'top_k' must be a whole number, got 2.5"),
        ({"do_sample": "yes"}, "'do_sample' must be True or False, got 'yes'"),
        ({"max_new_tokens": 0}, "'max_new_tokens' must be 1 or more, got 0"),
        ({"eos_token_id": ["</s>"]}, "'eos_token_id' must be a token id or a list of token ids"),
        ({"stop_strings": [""]}, "'stop_strings' must be strings of one character or more"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_values_raise(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    write(tmp_path, **settings)
    with pytest.raises(ArcmergeError, match=re.escape(sentence)) as refusal:
        GenerationConfig.read(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path / "generation_config.json"))


def test_unsupported_options_warn_once(tmp_path: Path) -> None:
    asked = {"num_beams": 4, "suppress_tokens": [5], "no_repeat_ngram_size": 2}
    write(tmp_path, **asked, num_return_sequences=1, typical_p=1.0, bad_words_ids=None, cache_implementation="hybrid")
    with pytest.warns(UserWarning, match="which arcmerge does not support") as said:
        GenerationConfig.read(tmp_path)
    (warning,) = said
    assert str(warning.message).endswith(
        "ignored 'num_beams', 'suppress_tokens', 'no_repeat_ngram_size', which arcmerge does not support"
    )


def test_the_defaults_of_transformers_do_not_warn(tmp_path: Path) -> None:
    from transformers import GenerationConfig as Theirs

    everything = Theirs(**{**Theirs._get_default_generation_params(), "output_scores": True})
    (tmp_path / "generation_config.json").write_text(everything.to_json_string(use_diff=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GenerationConfig.read(tmp_path).max_answer_tokens


def test_max_length_includes_the_prompt(folder: Path) -> None:
    write(folder, max_length=4)
    with pytest.raises(
        ArcmergeError, match=r"'max_length' must be above the 5 tokens of the prompt, .* got 4; give max_new"
    ):
        load(folder).generate(IDS)


def test_without_a_seed_every_call_has_a_new_one(folder: Path) -> None:
    write(folder, eos_token_id=[])
    model = load(folder)
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "temperature": 2.0}
    assert model.last_seed is None
    samples = {tuple(model.generate([2, 70], **options)) for _ in range(6)}
    assert len(samples) == 6
    again = model.generate([2, 70], **options)
    assert model.generate([2, 70], seed=model.last_seed, **options) == again
    torch.manual_seed(3)
    first = model.generate([2, 70], **options)
    torch.manual_seed(3)
    assert model.generate([2, 70], **options) == first
    seed = model.last_seed
    model.generate([2, 70], max_new_tokens=2)
    assert model.last_seed == seed  # nothing was drawn


def test_temperature_0_is_greedy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, do_sample=True, temperature=0.0, max_new_tokens=6)
    model = load(folder)
    greedy = model.generate("abc", do_sample=False)
    assert model.generate("abc") == model.generate("abc", temperature=0, do_sample=True, top_k=5) == greedy
    (folder / "generation_config.json").unlink()
    call = ["generate", str(folder), "abc", "--dtype", "float32", "-q", "--max-new-tokens", "6"]
    assert main([*call, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == greedy + "\n"
    outputs = set()
    for _ in range(2):
        assert main([*call, "--temperature", "3"]) == 0
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 2


def test_a_merge_in_memory_has_the_defaults_of_its_base(folder: Path) -> None:
    write(folder, max_new_tokens=3, eos_token_id=[])
    slerp = {"merge_method": "slerp", "base_model": str(folder), "dtype": "float32", "parameters": {"t": 0.5}}
    model = arcmerge.Gemma2.from_merge({**slerp, "models": [{"model": str(folder)}] * 2}, "cpu")
    assert len(model.generate([2, 70])) == 5
