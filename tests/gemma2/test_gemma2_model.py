"""Logits, tokens and scores equal those of transformers' eager Gemma-2, on small models of every shape."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma2ForCausalLM

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.model import Gemma2
from arcmerge.gemma2.runtime.network import Network
from gemma2_models import SHAPES, build

BF16, F32 = torch.bfloat16, torch.float32
LENGTHS = (1, 2, 7, 8, 9, 10, 64, 129, 300)  # the window is 8


@pytest.fixture(scope="module", params=SHAPES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same bfloat16 weights, stored as bfloat16 and as float32."""
    short = tmp_path_factory.mktemp("bf16")
    build(short, request.param, BF16)
    long = tmp_path_factory.mktemp("f32")
    Gemma2ForCausalLM.from_pretrained(short, dtype=F32).save_pretrained(long)
    return short, long


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    build(folder, "2.6B", BF16)
    return folder


def theirs(folder: Path, dtype: torch.dtype) -> Gemma2ForCausalLM:
    return Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def tokens(*shape: int, seed: int = 5) -> Tensor:
    return torch.randint(3, 1003, shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths: tuple[int, ...], left: bool) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask of prompts of these lengths, padded to the longest."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(-length, None) if left else slice(0, length)
        ids[row, place] = tokens(length, seed=row)
        mask[row, place] = 1
    return ids, mask


@torch.inference_mode()
def test_logits_in_float32_are_those_of_transformers(folders: tuple[Path, Path]) -> None:
    ours, reference = Gemma2.from_pretrained(folders[1], dtype=F32), theirs(folders[1], F32)
    for length in LENGTHS:
        ids = tokens(1, length)
        assert (ours.logits(ids) - reference(ids).logits).abs().max() <= 1e-4, f"{length} tokens"


@torch.inference_mode()
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_has_no_effect(folders: tuple[Path, Path], left: bool) -> None:
    ours, reference = Gemma2.from_pretrained(folders[1], dtype=F32), theirs(folders[1], F32)
    ids, mask = padded((3, 19, 12, 1), left)
    found = ours.logits(ids, mask)
    expected = reference(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert (found - expected)[mask.bool()].abs().max() <= 1e-4
    assert not found[~mask.bool()].any()


@torch.inference_mode()
def test_bfloat16_is_more_accurate_than_transformers(folders: tuple[Path, Path]) -> None:
    ours, eager, truth = Gemma2.from_pretrained(folders[0]), theirs(folders[0], BF16), theirs(folders[1], F32)
    our_error, their_error = 0.0, 0.0
    for length in LENGTHS:  # all together, as with one prompt the better rounding may have the worse luck
        ids = tokens(1, length)
        exact = truth(ids).logits
        our_error += (ours.logits(ids) - exact).square().mean().item()
        their_error += (eager(ids).logits.float() - exact).square().mean().item()
    # Some 0.4 of it in most draws: the residual stream, RoPE and softcaps no longer round.
    assert our_error <= 0.75 * their_error


@torch.inference_mode()
def test_hf_numerics_reproduce_transformers(folders: tuple[Path, Path]) -> None:
    ours, eager = Gemma2.from_pretrained(folders[0], numerics="hf"), theirs(folders[0], BF16)
    ids = tokens(1, 40)
    found, expected = ours.logits(ids), eager(ids).logits.float()
    exact = theirs(folders[1], F32)(ids).logits
    # The same roundings; the difference is the order of sums inside matrix products.
    assert (found - expected).square().mean() <= 0.1 * (expected - exact).square().mean()


@torch.inference_mode()
def test_a_prompt_in_passes_gives_the_logits_of_one_pass(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gemma2.from_pretrained(one, dtype=F32)
    ids = tokens(2, 150)
    whole = model.logits(ids)
    monkeypatch.setattr("arcmerge.gemma2.runtime.runner.PASS_TOKENS", 64)
    assert (model.logits(ids) - whole).abs().max() <= 1e-4


@torch.inference_mode()
def test_greedy_tokens_are_those_of_transformers(one: Path) -> None:
    ours, reference = Gemma2.from_pretrained(one, dtype=F32), theirs(one, F32)
    for length in (1, 5, 8, 17):
        ids = tokens(1, length)
        expected = reference.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert ours.generate(ids, max_new_tokens=24, eos_token_id=[]).tolist() == expected.tolist()


@torch.inference_mode()
def test_hf_numerics_choose_the_tokens_of_transformers_up_to_ties(folders: tuple[Path, Path]) -> None:
    ours, reference = Gemma2.from_pretrained(folders[0], numerics="hf"), theirs(folders[0], BF16)
    for length in range(1, 40, 4):
        ids = tokens(1, length)
        expected = reference.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        found = ours.generate(ids, max_new_tokens=64, eos_token_id=[])
        if differing := (found != expected)[0].nonzero().flatten().tolist():
            first = differing[0]
            logits = reference(expected[:, :first]).logits[0, -1]
            assert logits[found[0, first]] == logits[expected[0, first]] == logits.max()


@torch.inference_mode()
def test_an_answer_does_not_depend_on_the_batch(one: Path) -> None:
    model = Gemma2.from_pretrained(one, dtype=F32)
    ids, mask = padded((3, 19, 12, 1), left=True)
    together = model.generate(ids, mask, max_new_tokens=12, eos_token_id=[])
    for row in range(len(ids)):
        alone = model.generate(ids[row][mask[row].bool()].tolist(), max_new_tokens=12, eos_token_id=[])
        assert together[row, ids.shape[1] :].tolist() == alone[-12:]


def test_an_answer_ends_with_a_stop_token(one: Path) -> None:
    model = Gemma2.from_pretrained(one, dtype=F32)
    prompt = tokens(6).tolist()
    free = model.generate(prompt, max_new_tokens=10, eos_token_id=[])
    end = free[8]
    first = free.index(end, 6)
    assert model.generate(prompt, max_new_tokens=10, eos_token_id=end) == free[: first + 1]
    batch = model.generate(torch.tensor([prompt, prompt]), max_new_tokens=10, eos_token_id=[end])
    assert batch.tolist() == [free[: first + 1]] * 2
    other = tokens(1, 6, seed=9)
    mixed = model.generate(torch.cat([torch.tensor([prompt]), other]), max_new_tokens=10, eos_token_id=[end])
    assert mixed[0].tolist() == free[: first + 1] + [0] * (mixed.shape[1] - first - 1)


def test_tokens_are_streamed(one: Path) -> None:
    model = Gemma2.from_pretrained(one, dtype=F32)
    heard: list[int] = []
    prompt = tokens(4).tolist()
    answer = model.generate(prompt, max_new_tokens=5, eos_token_id=[], stream=heard.append)
    assert answer == prompt + heard


def test_samples_depend_on_the_seed(one: Path) -> None:
    model = Gemma2.from_pretrained(one, dtype=F32)
    prompt = tokens(4).tolist()

    def sample(**options: Any) -> list[int]:
        return list(model.generate(prompt, max_new_tokens=20, eos_token_id=[], do_sample=True, **options))

    assert sample(seed=1) == sample(seed=1)
    assert sample(seed=1) != sample(seed=2)
    greedy = model.generate(prompt, max_new_tokens=20, eos_token_id=[])
    assert sample(top_k=1) == greedy
    assert sample(top_p=1e-6) == sample(top_p=0) == greedy
    assert sample(min_p=1.0) == greedy
    assert sample(temperature=1e-3) == greedy
    copies = model.generate(torch.tensor([prompt] * 2), max_new_tokens=20, eos_token_id=[], do_sample=True, seed=1)
    assert copies[0].tolist() == sample(seed=1)
    assert copies[1].tolist() != copies[0].tolist()


@torch.inference_mode()
def test_repetition_penalty_equals_that_of_transformers(one: Path) -> None:
    ours, reference = Gemma2.from_pretrained(one, dtype=F32), theirs(one, F32)
    ids = tokens(1, 9)
    options = {"max_new_tokens": 30, "repetition_penalty": 1.7, "do_sample": False}
    expected = reference.generate(ids, eos_token_id=None, pad_token_id=0, **options)
    assert ours.generate(ids, eos_token_id=[], **options).tolist() == expected.tolist()


@torch.inference_mode()
def test_scores_are_log_probabilities(one: Path) -> None:
    model, reference = Gemma2.from_pretrained(one, dtype=F32), theirs(one, F32)
    pairs = [(tokens(n, seed=n).tolist(), tokens(m, seed=m).tolist()) for n, m in ((5, 1), (30, 4), (2, 9), (300, 3))]
    best = reference(torch.tensor([pairs[1][0]])).logits[0, -1].argmax().item()
    pairs += [(pairs[1][0], [best]), ([], [4, 5])]
    for (context, continuation), (logprob, greedy) in zip(pairs, model.score(pairs), strict=True):
        context = context or [model.config.bos_token_id]
        logits = reference(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        exact = logits.double().log_softmax(-1)
        wanted = torch.tensor(continuation)
        # Up to nine tokens, each with a tolerance of 1e-4.
        assert logprob == pytest.approx(exact[torch.arange(len(wanted)), wanted].sum().item(), abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == wanted).all())
    assert model.score([]) == []


def test_perplexity_counts_one_bos_and_cuts_windows(one: Path) -> None:
    model = Gemma2.from_pretrained(one, dtype=F32)
    words = tokens(40).tolist()
    (whole,) = model.score([([2], words)])
    assert model.perplexity(words) == pytest.approx(math.exp(-whole.logprob / 40))
    assert model.perplexity([2, *words]) == model.perplexity(words)
    pieces = model.score([([2], words[:15]), ([2], words[15:30]), ([2], words[30:])])
    cut = math.exp(-sum(piece.logprob for piece in pieces) / 40)
    assert model.perplexity(words, window=16) == pytest.approx(cut)


# ---- tensors of a folder


def test_weights_are_mapped_not_copied(one: Path) -> None:
    model = Gemma2.from_pretrained(one)
    weights = model.network.weights
    checkpoint = weights.checkpoint
    assert checkpoint is not None
    assert weights.embed_tokens.data_ptr() == checkpoint.address("model.embed_tokens.weight")
    assert weights.layers[3].down_proj.data_ptr() == checkpoint.address("model.layers.3.mlp.down_proj.weight")
    assert weights.nbytes == sum(info.nbytes for info in checkpoint.tensors.values())


def test_wrong_tensors_are_named(one: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((one / "config.json").read_text())
    tensors = load_file(one / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 72, dtype=BF16)
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(3, dtype=BF16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArcmergeError) as refusal:
        Gemma2.from_pretrained(tmp_path)
    missing, shape, strange = refusal.value.problems
    assert "'model.layers.2.mlp.up_proj.weight' and 1 more must be in the checkpoint, got none" in missing
    assert "'model.layers.0.self_attn.q_proj.weight' must have the shape (512, 72)" in shape
    assert "must have only the tensors of a Gemma-2, got 'model.layers.0.self_attn.q_norm.weight' too" in strange


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda model: model.generate([]), r"'prompts\[0\]' must have one token id or more"),
        (
            lambda model: model.generate([5, 1003]),
            "must have token ids from 0 to 1002, .*, got 1003",
        ),
        (
            lambda model: model.generate([5] * 600),
            "'prompt' must have at most 512 tokens, .*, got 600",
        ),
        (lambda model: model.generate([5], max_new_tokens=0), "'max_new_tokens' must be 1 or more, got 0"),
        (
            lambda model: model.generate([5], temperature=-1.0),
            r"'temperature' must be 0 \(greedy\) or more, got -1.0",
        ),
        (lambda model: model.generate([5], top_p=1.5, min_p=-1), r"'top_p' must be from 0 \(greedy\) to 1"),
        (
            lambda model: model.generate("hello"),
            r"'tokenizer\.json' must be in the folder, got no such file; .*, or pass token ids",
        ),
        (lambda model: model.generate(["a", [5]]), "'input_ids' must be text, messages, token ids, or a list"),
        (lambda model: model.logits(torch.zeros(1, 3, 2, dtype=torch.int64)), "'input_ids' must be text, messages"),
        (lambda model: model.perplexity([2]), "'text' must have one token or more besides BOS, got none"),
        (
            lambda model: Gemma2.from_pretrained(".", dtype=torch.float16),
            "'dtype' must be bfloat16, float32 or 'auto', got",
        ),
    ],
)
def test_wrong_calls_raise(one: Path, call: Any, sentence: str) -> None:
    with pytest.raises(ArcmergeError, match=sentence):
        call(Gemma2.from_pretrained(one))


@pytest.mark.parametrize("window", [6, 4096])
def test_shared_prefixes_run_once(tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of one or several tokens to a question, and sequences without a shared prefix, in batches of any size."""
    build(tmp_path, "2.6B", BF16, sliding_window=window)
    model = Gemma2.from_pretrained(tmp_path, "cpu", F32)
    question, other = tokens(40, seed=1).tolist(), tokens(9, seed=2).tolist()
    answers = [[5], [6], [5, 7, 8], tokens(12, seed=3).tolist(), [6]]
    pairs = [
        *((question, answer) for answer in answers),
        *((other, answer) for answer in ([3, 4], [5])),
        (tokens(30, seed=4).tolist(), [4, 5, 6]),
        *((tokens(20, seed=5).tolist(), [token]) for token in (7, 8)),
    ]
    alone = [model.score([pair])[0] for pair in pairs]
    fed: list[int] = []
    original = Network.embed
    monkeypatch.setattr(Network, "embed", lambda self, ids: fed.append(len(ids)) or original(self, ids))
    for most in (2048, 60, 1):
        monkeypatch.setattr("arcmerge.gemma2.generation.loglikelihood.PASS_TOKENS", most)
        monkeypatch.setattr("arcmerge.gemma2.generation.loglikelihood.PREFIX_SLOTS", most)
        fed.clear()
        for one, expected in zip(model.score(pairs), alone, strict=True):
            assert one.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert one.is_greedy == expected.is_greedy
        assert sum(fed) == 40 + 2 + 11 + 9 + 1 + 32 + 20
