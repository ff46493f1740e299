"""Prompts, options and devices in the forms of Python, numpy, torch and transformers."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.arguments import read_device
from arcmerge.gemma2.generation.generation_config import READERS
from arcmerge.gemma2.model import Gemma2
from fuzz.mutations import ODD
from gemma2_models import build, save_byte_tokenizer

F32 = torch.float32
PROMPT = [2, 70, 80]
OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build(folder, "2.6B", F32, num_hidden_layers=1, vocab_size=259, max_position_embeddings=64)
    save_byte_tokenizer(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Gemma2:
    return Gemma2.from_pretrained(folder, "cpu", F32)


@pytest.fixture(scope="module")
def expected(model: Gemma2) -> list[int]:
    return list(model.generate(PROMPT, **OPTIONS))


ONE: dict[str, Any] = {
    "list": PROMPT,
    "tuple": tuple(PROMPT),
    "list of numpy numbers": [np.int64(token) for token in PROMPT],
    "list of tensors": [torch.tensor(token) for token in PROMPT],
    "array": np.array(PROMPT, np.int32),
    "uint16 array": np.array(PROMPT, np.uint16),
    "tensor": torch.tensor(PROMPT),
    "int32 tensor": torch.tensor(PROMPT, dtype=torch.int32),
    "uint8 tensor": torch.tensor(PROMPT, dtype=torch.uint8),
    "range": range(2, 5),
}


@pytest.mark.parametrize("prompt", ONE.values(), ids=ONE)
def test_the_result_has_the_form_of_the_prompt(model: Gemma2, expected: list[int], prompt: Any) -> None:
    wanted = expected if prompt is not ONE["range"] else model.generate([2, 3, 4], **OPTIONS)
    found = model.generate(prompt, **OPTIONS)
    assert type(found) is (type(prompt) if isinstance(prompt, torch.Tensor | np.ndarray) else list)
    assert [int(token) for token in found] == wanted
    if isinstance(prompt, torch.Tensor | np.ndarray):
        assert found.dtype == prompt.dtype
        assert model.generate(prompt[None], **OPTIONS).shape == (1, 6)
    assert model.generate([prompt, prompt], **OPTIONS) == [wanted, wanted]
    assert torch.equal(model.logits(prompt), model.logits([prompt]))
    assert model.perplexity(prompt) == model.perplexity([int(token) for token in prompt])
    assert model.score([(prompt, prompt)]) == model.score([([*map(int, prompt)], [*map(int, prompt)])])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, torch.BoolTensor], ids=lambda kind: kind.__name__)
def test_masks_of_every_kind(model: Gemma2, expected: list[int], kind: Any) -> None:
    ids, mask = [[0, 0, *PROMPT], [2, 9, 8, 7, 6]], kind([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for form in (lambda rows: rows, np.array, torch.tensor):
        found = model.generate(form(ids), mask, **OPTIONS)
        rows = found if isinstance(found, list) else found.tolist()
        assert rows[0] == [0, 0, *expected]
        assert rows[1] == model.generate(ids[1], **OPTIONS)
        assert torch.equal(model.logits(form(ids), mask), model.logits(torch.tensor(ids), torch.as_tensor(mask)))


def test_results_of_a_tokenizer_of_transformers(model: Gemma2, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="<pad>",
        padding_side="left",
        return_token_type_ids=False,
    )
    texts = ["abc", "a longer one"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    alone = [model.generate(tokenizer(text)["input_ids"], **OPTIONS)[-3:] for text in texts]
    assert model.generate(**batch, **OPTIONS)[:, -3:].tolist() == alone
    for whole in (tokenizer(texts, return_tensors="pt", padding=True), UserDict(batch)):
        assert model.generate(whole, **OPTIONS)[:, -3:].tolist() == alone
        assert torch.equal(model.logits(whole), model.logits(**batch))
    assert [row[-3:] for row in model.generate(tokenizer(texts), **OPTIONS)] == alone
    arrays = model.generate(tokenizer(texts, return_tensors="np", padding=True), **OPTIONS)
    assert isinstance(arrays, np.ndarray)
    assert arrays[:, -3:].tolist() == alone


def test_lists_of_prompts_give_lists_of_answers(model: Gemma2) -> None:
    texts = ["abc", "a longer one"]
    answers = [model.generate(text, **OPTIONS) for text in texts]
    for several in (texts, tuple(texts), np.array(texts)):
        assert model.generate(several, **OPTIONS) == answers
    assert model.generate(["abc"], **OPTIONS) == answers[:1]
    talks = [[{"role": "user", "content": text}] for text in texts]
    assert model.generate(talks, **OPTIONS) == [model.generate(talk, **OPTIONS) for talk in talks]
    first = answers[0][:1]
    stopped = [model.generate(text, stop=first, **OPTIONS) for text in texts]
    for stop in (first, [first], (first,), np.array([first])):
        assert model.generate(texts, stop=stop, **OPTIONS) == stopped
    tokens = torch.tensor([model.tokenizer.encode("abc")])
    assert model.generate(tokens, stop=first, **OPTIONS).shape[1] < tokens.shape[1] + 3 or not first


def numbers(value: Any) -> list[Any]:
    """A number in the types of Python, numpy and torch."""
    kind = np.int64 if isinstance(value, int) else np.float64
    return [
        value,
        kind(value),
        np.array(value),
        torch.tensor(value, dtype=torch.float64 if kind is np.float64 else None),
    ]


FORMS = {
    "max_new_tokens": numbers(4),
    "max_length": numbers(7),
    "temperature": [*numbers(0.5), *numbers(2)],
    "top_k": numbers(9),
    "top_p": numbers(0.5),
    "min_p": numbers(0.25),
    "repetition_penalty": numbers(1.5),
    "seed": numbers(11),
    "pad_token_id": numbers(5),
    "do_sample": [True, 1, np.True_, np.array(True), torch.tensor(True)],
    "eos_token_id": [
        40,
        [40],
        {40},
        (40,),
        np.int64(40),
        np.array([40]),
        torch.tensor(40),
        torch.tensor([40]),
        [np.int32(40)],
    ],
}


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({}, optional={name: st.integers(0, len(forms) - 1) for name, forms in FORMS.items()}))
def test_options_in_every_form(model: Gemma2, chosen: dict[str, int]) -> None:
    sampled = {"do_sample": True, "seed": 3, "max_new_tokens": 3}
    found = model.generate(PROMPT, **{**sampled, **{name: FORMS[name][number] for name, number in chosen.items()}})
    first = {name: FORMS[name][number // 4 * 4 if name == "temperature" else 0] for name, number in chosen.items()}
    assert found == model.generate(PROMPT, **{**sampled, **first})


def test_none_is_not_set(model: Gemma2) -> None:
    parameters = inspect.signature(model.generate).parameters
    nothing = {name: None for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert nothing.keys() >= FORMS.keys() | {"stop", "stream"}
    assert all(one.default is None for name, one in parameters.items() if name != "input_ids")
    del nothing["max_new_tokens"]
    assert model.generate(PROMPT, None, max_new_tokens=5, **nothing) == model.generate(PROMPT, max_new_tokens=5)
    assert model.perplexity("abc", window=None) == model.perplexity("abc", window=np.int32(64))


def test_scores_of_text_and_of_its_tokens_are_equal(model: Gemma2) -> None:
    encode = model.tokenizer.encode_plain
    assert model.score([("ab", " cd"), ("", "x")]) == model.score(
        [([2, *encode("ab")], encode(" cd")), ([2], encode("x"))]
    )
    assert model.score([np.array([PROMPT, PROMPT])]) == model.score([(PROMPT, PROMPT)])
    assert model.score(iter([])) == []


@pytest.mark.parametrize("form", ["float32", "torch.float32", torch.float32, "auto"])
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_devices_and_dtypes_in_every_form(folder: Path, form: Any, device: Any) -> None:
    for path in (folder, str(folder)):
        assert Gemma2.from_pretrained(path, device, dtype=form, numerics=None, revision=None).dtype == torch.float32


def test_default_dtypes_and_devices(folder: Path, tmp_path: Path) -> None:
    assert Gemma2.from_pretrained(folder, None, None).dtype == torch.bfloat16
    assert read_device(None) == read_device("auto")
    build(tmp_path, "2.6B", torch.float16, num_hidden_layers=1, vocab_size=50)
    assert Gemma2.from_pretrained(tmp_path, "cpu", "auto").dtype == torch.float32
    build(tmp_path, "2.6B", torch.bfloat16, num_hidden_layers=1, vocab_size=50)
    assert Gemma2.from_pretrained(tmp_path, "cpu", "auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda model: model.generate([1.5]), "'input_ids' must be token ids, which are integers, got [1.5]"),
        (lambda model: model.generate(torch.ones(1, 2)), "'input_ids' must be token ids"),
        (lambda model: model.generate(torch.ones(1, 2, dtype=torch.bool)), "'input_ids' must be token ids"),
        (lambda model: model.generate(None), "'input_ids' must be text, messages, token ids"),
        (lambda model: model.generate(5), "'input_ids' must be text, messages, token ids"),
        (lambda model: model.generate({"role": "user"}), "'input_ids' must be text, messages, token ids"),
        (lambda model: model.generate([[[5]]]), "'input_ids' must be text, messages, token ids"),
        (lambda model: model.generate(["abc", PROMPT]), "'input_ids' must be text, messages, token ids"),
        (lambda model: model.generate("abc", [1]), "'attention_mask' must be None for text"),
        (lambda model: model.generate([PROMPT], [[1, 1]]), "'attention_mask' must have the shape of 'input_ids'"),
        (lambda model: model.generate([PROMPT], 1), "'attention_mask' must have the shape of 'input_ids'"),
        (
            lambda model: model.generate([PROMPT] * 2, stream=print),
            "'stream' must be None for several prompts, got one for 2",
        ),
        (lambda model: model.generate(PROMPT, max_new_tokens=2.5), "'max_new_tokens' must be a whole number, got 2.5"),
        (lambda model: model.generate(PROMPT, top_k="many"), "'top_k' must be a whole number, got 'many'"),
        (lambda model: model.generate(PROMPT, temperature=[1, 2]), "'temperature' must be a number, got [1, 2]"),
        (lambda model: model.generate(PROMPT, do_sample=2), "'do_sample' must be True or False, got 2"),
        (lambda model: model.generate(PROMPT, seed=-1), "'seed' must be a whole number from 0 to 2^63 - 1, or None"),
        (lambda model: model.generate(PROMPT, eos_token_id="</s>"), "'eos_token_id' must be a token id or a list"),
        (lambda model: model.generate(PROMPT, stop=5), "'stop' must be a string or a list of strings, got 5"),
        (lambda model: model.generate(PROMPT, stop=["a", ""]), "'stop' must be strings of one character or more"),
        (lambda model: model.score(["ab"]), "'pairs[0]' must be a context and a continuation, got 'ab'"),
        (
            lambda model: model.score([(PROMPT, "b")]),
            "'pairs[0]' must be two texts or two lists of token ids, got [2",
        ),
        (
            lambda model: model.score([("a", None)]),
            "'pairs[0]' must be two texts or two lists of token ids, got text",
        ),
        (lambda model: model.score([([2], [9999])]), "'pairs[0]' must have token ids from 0 to 258"),
        (lambda model: model.score([("a", "")]), "'pairs[0]' must have a continuation of one token"),
        (
            lambda model: model.score([("a", "b"), ([2], [])]),
            "'pairs[1]' must have a continuation of one token",
        ),
        (lambda model: model.generate(b"Hello"), "'input_ids' must be text, messages, token ids"),
        (lambda model: model.generate([b"Hello"]), "'input_ids' must be"),
        (lambda model: model.perplexity(b"Hello"), "'text' must be token ids"),
        (copy.deepcopy, "'model' must not be copied or pickled"),
        (pickle.dumps, "'model' must not be copied or pickled"),
        (
            lambda model: model.score([(PROMPT, PROMPT), ([2] * 60, [5] * 9)]),
            "'pairs[1]' must have at most 65 tokens, one more than the model's max_position_embeddings, got 69",
        ),
        (
            lambda model: model.perplexity("abc", window=100),
            "'window' must be from 2 to 64, the model's max_position_embeddings, got 100",
        ),
        (lambda model: model.perplexity("abc", window=1), "'window' must be from 2 to 64"),
        (lambda model: model.perplexity("abc", window=3.5), "'window' must be a whole number, got 3.5"),
        (lambda model: model.perplexity(None), "'text' must be token ids"),
        (
            lambda model: model.logits([[5] * 65]),
            "'prompt' must have at most 64 tokens, the model's max_position_embeddings, got 65",
        ),
        (
            lambda model: Gemma2.from_pretrained(".", dtype="int8"),
            "'dtype' must be bfloat16, float32 or 'auto', got 'int8'",
        ),
        (
            lambda model: Gemma2.from_pretrained(".", device="gpu"),
            "'device' must be auto, cpu, cuda or cuda:N, got 'gpu'",
        ),
    ],
)
def test_errors_name_argument_rule_and_value(model: Gemma2, call: Any, sentence: str) -> None:
    with pytest.raises(ArcmergeError) as refusal:
        call(model)
    assert sentence in str(refusal.value)
    assert "new tokens" not in str(refusal.value)


def test_scores_up_to_the_maximum_length(model: Gemma2) -> None:
    (score,) = model.score([([2] * 60, [5] * 5)])
    assert score.logprob < 0
    assert model.perplexity([5] * 200) == model.perplexity([5] * 200, window=64)


def refusal(call: Callable[[], object]) -> str:
    """The message of the ArcmergeError that a call raises, or an empty string."""
    try:
        call()
    except ArcmergeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", sorted({*READERS, "stop", "seed"} - {"stop_strings"}))
def test_any_value_of_an_option_is_accepted_or_raises(model: Gemma2, name: str) -> None:
    for value in (*ODD, 2**40, [[1]], object(), b"ab"):
        options = {"do_sample": True, "max_new_tokens": 1, name: value}
        assert len(refusal(lambda options=options: model.generate(PROMPT, **options))) < 300, value


@pytest.mark.parametrize("call", ["generate", "score", "logits", "perplexity"])
def test_any_input_is_accepted_or_raises(model: Gemma2, call: str) -> None:
    for value in (*ODD, 2**31, [2**31], [10**400], b"ab", [b"ab"], [[2**40]], [None, 5], [{"role": "user"}], object()):
        assert len(refusal(lambda value=value: getattr(model, call)(value))) < 300, value
