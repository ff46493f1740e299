"""Every argument of lm-eval's own model `hf`, compared with arcmerge's model."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import arcmerge
from gemma2_models import TOKENS, build, build_chain, save_byte_tokenizer

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from arcmerge.gemma2.generation.generation_config import has_effect
from arcmerge.integrations import lm_eval_arguments
from arcmerge.integrations.lm_eval import ArcmergeLM

TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}[model]{% endif %}{% if enable_thinking is defined %}think{% endif %}"
)
END_OF_TURN = 259


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    settings = dict(vocab_size=260, bos_token_id=2, eos_token_id=1, pad_token_id=0, num_hidden_layers=2)
    build(folder, "2.6B", torch.float32, **settings, max_position_embeddings=200)
    save_byte_tokenizer(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": END_OF_TURN, "content": "<end_of_turn>"})
    single = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    named = [{"name": "default", "template": TURNS}, {"name": "other", "template": "{{ messages[0].content }}"}]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": named, **special})
    )
    return folder


def answering(folder: Path, *tokens: str) -> Path:
    """A model that continues the first of these tokens with the others."""
    build_chain(folder, [TOKENS[token] for token in tokens])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ours(folder: Path, **options: Any) -> ArcmergeLM:
    return ArcmergeLM(str(folder), dtype="float32", device="cpu", **options)


def theirs(folder: Path, **options: Any) -> HFLM:
    options = {"attn_implementation": "eager", "batch_size": 1, **options}
    return HFLM(str(folder), dtype="float32", device="cpu", **options)


def answers(lm: Any, contexts: list[str], **options: Any) -> list[str]:
    requests = [Instance("generate_until", {}, (text, dict(options)), n) for n, text in enumerate(contexts)]
    found: list[str] = lm.generate_until(requests, disable_tqdm=True)
    return found


def scores(lm: Any, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    found: list[tuple[float, bool]] = lm.loglikelihood(requests, disable_tqdm=True)
    return found


# ---- arguments of the model


# Effects: "same" as in `hf`, compared below; "named" in a warning or an error; "none".
MODEL_ARGUMENTS = {
    **dict.fromkeys(["pretrained", "tokenizer", "max_length", "dtype", "add_bos_token", "prefix_token_id"], "same"),
    **dict.fromkeys(["think_end_token", "enable_thinking", "chat_template_args", "revision", "device"], "same"),
    **dict.fromkeys(["batch_size", "max_batch_size", "logits_cache", "trust_remote_code", "backend"], "none"),
    **dict.fromkeys(["offload_folder"], "none"),
    **dict.fromkeys(["truncation", "softmax_dtype", "mixed_precision_dtype", "use_fast_tokenizer"], "named"),
    **dict.fromkeys(["parallelize", "max_memory_per_gpu", "max_cpu_memory", "tp_plan", "subfolder"], "named"),
    **dict.fromkeys(["peft", "delta", "autogptq", "gptqmodel", "gguf_file"], "named"),
}
SET = {"truncation": True, "softmax_dtype": "bfloat16", "use_fast_tokenizer": False}


def test_every_argument_of_the_model_for_transformers_is_in_the_table() -> None:
    parameters = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
    assert parameters == set(MODEL_ARGUMENTS)
    own = set(inspect.signature(ArcmergeLM.__init__).parameters)
    for name, what in MODEL_ARGUMENTS.items():
        assert name in own or name in lm_eval_arguments.KNOWN, name
        assert (what == "same") <= (name in own), name


@pytest.mark.parametrize("name", [name for name, what in MODEL_ARGUMENTS.items() if what == "named"])
def test_an_argument_without_effect_is_named(folder: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    default = inspect.signature(HFLM.__init__).parameters[name].default
    ours(folder, **{name: default})
    assert not caplog.records
    said = ""
    try:
        ours(folder, **{name: SET.get(name, "something")})
    except arcmerge.ArcmergeError as error:
        said = str(error)
    assert name in said + caplog.text


def test_an_unknown_argument_raises(folder: Path) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=r"'max_lenght' must be an argument.*did you mean 'max_length'\?"):
        ours(folder, max_lenght=4)


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("brings_bos", [True, False])
def test_add_bos_token(folder: Path, tmp_path: Path, add_bos_token: bool | None, brings_bos: bool) -> None:
    if not brings_bos:
        folder = shutil.copytree(folder, tmp_path / "model")
        data = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**data, "post_processor": None}))
    one, other = ours(folder, add_bos_token=add_bos_token), theirs(folder, add_bos_token=add_bos_token)
    for text in ("", "ab", "<bos>ab", " a", "<end_of_turn>"):
        for special in (None, True, False):
            assert one.tok_encode(text, add_special_tokens=special) == other.tok_encode(
                text, add_special_tokens=special
            ), (text, special)
        assert one.tok_encode(text, left_truncate_len=1) == other.tok_encode(text, left_truncate_len=1)


def test_the_prefix_token_and_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(folder, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    options = {"prefix_token_id": 7, "tokenizer": str(elsewhere)}
    one, other = ours(folder, **options), theirs(folder, **options)
    assert one.prefix_token_id == other.prefix_token_id == 7
    assert one.tokenizer_name == other.tokenizer_name
    (found,), (wanted,) = scores(one, ("", "abc")), scores(other, ("", "abc"))
    assert found == pytest.approx(wanted, rel=1e-5)
    loaded = ours(folder, tokenizer=AutoTokenizer.from_pretrained(elsewhere))
    assert loaded.tok_encode("ab <bos>") == one.tok_encode("ab <bos>")


def test_a_model_of_transformers_raises(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(arcmerge.ArcmergeError, match="'pretrained' must be a folder, a hub name or a Gemma2, got a"):
        ArcmergeLM(pretrained=model)


def test_threads_of_torch_are_not_changed(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        ours(folder)
        assert torch.get_num_threads() == 7
    finally:
        torch.set_num_threads(before)


def test_answers_do_not_include_thinking(tmp_path: Path) -> None:
    folder = answering(tmp_path, *"qabTcd")
    for end in ("T", "b", None):
        one, other = (make(folder, think_end_token=end) for make in (ours, theirs))
        assert answers(one, ["q"], max_gen_toks=5) == answers(other, ["q"], max_gen_toks=5), end
    with pytest.raises(arcmerge.ArcmergeError, match="think_end_token"):
        ours(folder, enable_thinking=True)
    with pytest.raises(arcmerge.ArcmergeError, match="enable_thinking"):
        scores(ours(folder, enable_thinking=True, think_end_token="T"), ("a", "b"))


# ---- conversations

USER, SYSTEM = {"role": "user", "content": "2+2?"}, {"role": "system", "content": "Of biology."}
BEGUN = {"role": "assistant", "content": "The answer is"}


@pytest.mark.parametrize("history", [[USER], [USER, BEGUN], [SYSTEM, USER], [SYSTEM, USER, BEGUN]])
@pytest.mark.parametrize("asked", [True, False])
def test_conversations_render_as_in_transformers(
    folder: Path, history: list[dict[str, str]], asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if not asked and history[-1] is USER:
        pytest.skip("a prefix is of the assistant")
    for options in ({}, {"enable_thinking": True, "think_end_token": "x"}):
        one, other = ours(folder, **options), theirs(folder, **options)
        assert one.apply_chat_template(history, asked) == other.apply_chat_template(history, asked)
    assert ("system" in caplog.text) == (SYSTEM in history)


def test_templates_by_name(folder: Path) -> None:
    one, other = ours(folder), theirs(folder)
    for name in (False, True, "default", "other"):
        assert one.chat_template(name) == other.chat_template(name)
    with pytest.raises(arcmerge.ArcmergeError, match="'third'"):
        one.chat_template("third")


# ---- generation arguments

# Effects: "same" as in `hf`, compared below; "neutral": no change of tokens; all others are named in a warning.
GENERATION_ARGUMENTS: dict[str, dict[str, Any]] = {
    "max_gen_toks": {"max_gen_toks": 7},
    "max_new_tokens": {"max_new_tokens": 6},
    "max_length": {"max_length": 20, "max_gen_toks": 30},
    "eos_token_id": {"eos_token_id": list(range(60, 200)), "max_gen_toks": 20},
    "repetition_penalty": {"repetition_penalty": 1.9, "max_gen_toks": 12},
    "until": {"until": ["a", "<end_of_turn>"], "max_gen_toks": 40},
    "one until": {"until": "e", "max_gen_toks": 40},
    "greedy": {"do_sample": False, "temperature": 0.7, "max_gen_toks": 8},
    "temperature 0": {"temperature": 0.0, "max_gen_toks": 8},
    "nearly greedy": {"do_sample": True, "temperature": 1.0, "top_k": 1, "max_gen_toks": 8},
    "top_p": {"do_sample": True, "temperature": 1.0, "top_p": 1e-6, "max_gen_toks": 8},
    "top_p 0": {"do_sample": True, "temperature": 1.0, "top_p": 0.0, "max_gen_toks": 8},
    "temperature as text": {"temperature": "0", "max_gen_toks": 8},
    "min_p": {"do_sample": True, "temperature": 1.0, "min_p": 1.0, "max_gen_toks": 8},
}


@pytest.mark.parametrize("name", GENERATION_ARGUMENTS)
def test_generation_arguments_take_effect(folder: Path, name: str) -> None:
    options = GENERATION_ARGUMENTS[name]
    contexts = ["Question: what?", "Another one", ""]
    one, other = ours(folder), theirs(folder)
    assert answers(one, contexts, **options) == [answers(other, [text], **options)[0] for text in contexts]


def test_every_other_generation_argument_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [name for name in vars(GenerationConfig()) if has_effect(name, 3)]
    assert {"num_beams", "no_repeat_ngram_size", "typical_p", "min_new_tokens"} <= set(names)
    lm = ours(folder)
    for name in names:
        caplog.clear()
        answers(lm, ["a"], max_gen_toks=1, **{name: 3})
        assert f"'{name}=3'" in caplog.text
    caplog.clear()
    answers(lm, ["a"], max_gen_toks=1, num_beams=1, use_cache=True, typical_p=1.0, early_stopping=False)
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_length": 3, "max_gen_toks": 9}, "'max_length' must be above the [0-9]+ tokens of the context"),
        ({"max_gen_toks": 0}, "'max_gen_toks' must be 1 or more, got 0"),
        ({"until": 3}, "'until' must be a string or a list of strings"),
        (["x"], "'gen_kwargs' must be a mapping of names to values, got"),
    ],
)
def test_impossible_generation_arguments_raise(folder: Path, options: Any, sentence: str) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=sentence):
        ours(folder).generate_until([Instance("generate_until", {}, ("Question", options), 0)])


def test_an_empty_stop_string_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers(ours(folder), ["a"], max_gen_toks=2, until=[""])
    assert "the stop string '' has no effect" in caplog.text


def test_samples_of_a_repeated_question_differ(folder: Path) -> None:
    lm = ours(folder)
    options = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 8}
    torch.manual_seed(5)
    first = answers(lm, ["same"] * 20, **options)
    assert len(set(first)) > 15
    assert set(answers(lm, ["same"] * 20, **options)).isdisjoint(first)
    torch.manual_seed(5)
    assert answers(lm, ["same"] * 20, **options) == first
    torch.manual_seed(5)
    assert answers(lm, ["another", *["same"] * 19], **options)[1:] == first[1:]
    assert answers(lm, ["same"] * 3, **options, seed=1) == answers(lm, ["same"] * 3, **options, seed=1)


def test_defaults_of_generation_config_json(folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.7, "eos_token_id": [1, 100]}))
    contexts = ["Question: what?", "Another one"]
    wanted = [answers(theirs(folder), [text], max_gen_toks=20)[0] for text in contexts]
    assert answers(ours(folder), contexts, max_gen_toks=20) == wanted


def test_an_answer_ends_at_a_special_token(tmp_path: Path) -> None:
    folder = answering(tmp_path, *"qab", "<end_of_turn>", *"cd")
    options = {"until": ["<end_of_turn>"], "max_gen_toks": 5}
    assert answers(ours(folder), ["q"], **options) == answers(theirs(folder), ["q"], **options) == ["ab"]


def test_contexts_are_truncated_on_the_left_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["word " * 60, "short"]
    one, other = ours(folder), theirs(folder)
    wanted = [answers(other, [text], max_gen_toks=20)[0] for text in texts]
    caplog.clear()
    assert answers(one, texts, max_gen_toks=20) == wanted
    assert "1 of 2 contexts are truncated on the left to 180" in caplog.text
    with pytest.raises(arcmerge.ArcmergeError, match="'max_gen_toks' must be below 200, the tokens of a window"):
        answers(one, ["a"], max_gen_toks=200)


# ---- scores


def test_an_answer_inside_a_token_of_the_context_is_scored_by_its_own_tokens(folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folder, tmp_path / "model")
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    spare = [token for token in list(vocabulary) if len(token) == 1 and ord(token) > 300][:2]
    numbers = [vocabulary.pop(token) for token in spare]
    vocabulary |= dict(zip(("wo", "rd"), numbers, strict=True))
    vocabulary["word"] = vocabulary.pop(chr(299))
    data["model"]["merges"] = [["w", "o"], ["r", "d"], ["wo", "rd"]]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    lm = ours(folder)
    before = lm.tok_encode("a wo")
    (found,) = scores(lm, ("a wo", "rd"))
    (wanted,) = lm.model.score([(before, lm._tokenizer.encode_plain("rd"))])
    assert found == tuple(wanted)
    assert found[0] < 0
    (found,) = scores(lm, ("a wo", "x"))
    assert found == pytest.approx(scores(theirs(folder), ("a wo", "x"))[0], rel=1e-5)


def test_answers_that_do_not_fit_raise(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = ours(folder), theirs(folder)
    pair = ("word " * 60, "end")
    assert scores(one, pair)[0] == pytest.approx(scores(other, pair)[0], rel=1e-5)
    assert "1 of 1 contexts are truncated on the left" in caplog.text
    for wrong, said in (
        (("a", "word " * 60), "must have at most 200 tokens"),
        (("a", ""), "'continuation' must have one character or more"),
    ):
        with pytest.raises(AssertionError):
            scores(other, wrong)
        with pytest.raises(arcmerge.ArcmergeError, match=said):
            scores(one, wrong)
    assert logging.getLogger("arcmerge.integrations.lm_eval").name in {record.name for record in caplog.records}
