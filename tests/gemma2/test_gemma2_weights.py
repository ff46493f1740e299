"""Names of tensors and the choice of the lm_head, compared with transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma2ForCausalLM, Gemma2Model

import arcmerge
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.model import Gemma2
from gemma2_models import build

F32 = torch.float32
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.tensor([[2, 9, 40, 7, 33, 12]])
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    build(folder, "2.6B", F32, num_hidden_layers=2, vocab_size=67)
    return folder


def variant(plain: Path, folder: Path, change: Callable[[Tensors], Tensors], **settings: Any) -> Path:
    """The model in `plain` with changed tensors and settings."""
    folder.mkdir(exist_ok=True)
    save_file(change(load_file(plain / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    config = {**json.loads((plain / "config.json").read_text()), **settings}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def own_head(seed: int = 1) -> Tensor:
    return torch.randn(67, 72, generator=torch.Generator().manual_seed(seed)) / 8


def load(folder: Path) -> Gemma2:
    return Gemma2.from_pretrained(folder, "cpu", F32)


@torch.inference_mode()
@pytest.mark.parametrize("tied", [False, True])
def test_an_untied_head_is_used_as_in_transformers(plain: Path, tmp_path: Path, tied: bool) -> None:
    variant(plain, tmp_path, lambda found: {**found, HEAD: own_head()}, tie_word_embeddings=tied)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = load(tmp_path)
    (warning,) = said
    assert "'lm_head.weight' differs from the embedding" in str(warning.message)
    assert ("set 'tie_word_embeddings' to false" in str(warning.message)) == tied
    reference = Gemma2ForCausalLM.from_pretrained(tmp_path, dtype=F32, attn_implementation="eager").eval()
    logits = reference(IDS).logits
    assert (ours.logits(IDS) - logits).abs().max() <= 1e-4
    assert (ours.logits(IDS) - load(plain).logits(IDS)).abs().max() > 1
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    for penalty in (1.0, 1.4):
        expected = reference.generate(IDS, eos_token_id=None, pad_token_id=0, repetition_penalty=penalty, **options)
        assert torch.equal(ours.generate(IDS, eos_token_id=[], repetition_penalty=penalty, **options), expected)
    greedy = ours.generate(IDS, eos_token_id=[], **options)
    assert torch.equal(ours.generate(IDS, eos_token_id=[], do_sample=True, top_k=1, max_new_tokens=8), greedy)
    (score,) = ours.score([(IDS[0, :3].tolist(), IDS[0, 3:].tolist())])
    exact = logits[0, 2:-1].double().log_softmax(-1)[torch.arange(3), IDS[0, 3:]].sum().item()
    assert score.logprob == pytest.approx(exact, abs=1e-3)
    # A decoding step reads the head and one row of the embedding.
    assert ours.network.weights.nbytes == load(plain).network.weights.nbytes
    assert len(ours.network.weights.tensors) == len(load(plain).network.weights.tensors) + 1


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_equal_to_the_embedding_takes_no_memory(plain: Path, tmp_path: Path, tied: bool) -> None:
    variant(plain, tmp_path, lambda found: {**found, HEAD: found[EMBEDDING].clone()}, tie_word_embeddings=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = load(tmp_path).network.weights
    assert weights.lm_head is weights.embed_tokens


@pytest.mark.parametrize(
    ("change", "settings", "sentence"),
    [
        (
            lambda found: found,
            {"tie_word_embeddings": False},
            "'lm_head.weight' must be in the checkpoint where tie_word_embeddings in config.json is false, got none",
        ),
        (lambda found: {**found, HEAD: own_head()[:60]}, {}, r"'lm_head.weight' must have the shape \(67, 72\)"),
        (
            lambda found: {**found, HEAD: own_head().to(torch.int32)},
            {},
            "'lm_head.weight' must be bfloat16, float16 or float32, got int32",
        ),
        (
            lambda found: {**found, "layers.0.self_attn.q_proj.bias": torch.zeros(512)},
            {},
            "must have only the tensors of a Gemma-2, got 'layers.0.self_attn.q_proj.bias' too",
        ),
        (
            lambda found: {**found, "layers.1.input_layernorm.weight": torch.zeros(72)},
            {},
            "must have only the tensors of a Gemma-2, got 'layers.1.input_layernorm.weight' too",
        ),
        (lambda found: found, {"tie_word_embeddings": "yes"}, "'tie_word_embeddings' must be true or false, got 'yes'"),
        (
            lambda found: found,
            {"quantization_config": {"quant_method": "awq"}},
            r"must have weights in bf16, f16 or f32, got quantized ones \(awq\)",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_weights_that_cannot_run_raise(
    plain: Path, tmp_path: Path, change: Any, settings: dict[str, Any], sentence: str
) -> None:
    variant(plain, tmp_path, change, **settings)
    with pytest.raises(ArcmergeError, match=sentence) as refusal:
        load(tmp_path)
    assert "merge" not in str(refusal.value).replace(str(tmp_path), "")


NAMES: dict[str, Callable[[str], str]] = {
    "base model class": lambda name: name.removeprefix("model."),
    "prefix twice": lambda name: f"model.{name}",
    "some with prefix": lambda name: name if "layers.0" in name else name.removeprefix("model."),
    "only the head": lambda name: HEAD if name == EMBEDDING else name,
}
WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "inside another": lambda name: f"language_model.{name}",
    "inside another, transformers 5": lambda name: f"model.language_model.{name.removeprefix('model.')}",
}


@torch.inference_mode()
@pytest.mark.parametrize("rename", [*NAMES.values(), *WRAPPED.values()], ids=[*NAMES, *WRAPPED])
def test_names_of_transformers_and_of_wrappers(plain: Path, tmp_path: Path, rename: Callable[[str], str]) -> None:
    variant(plain, tmp_path, lambda found: {rename(name): tensor for name, tensor in found.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(tmp_path)
    assert torch.equal(model.logits(IDS), load(plain).logits(IDS))
    if rename in NAMES.values():
        expected = Gemma2ForCausalLM.from_pretrained(tmp_path, dtype=F32, attn_implementation="eager")(IDS).logits
        assert (model.logits(IDS) - expected).abs().max() <= 1e-4


def test_a_checkpoint_of_the_base_model_class_runs_and_merges(plain: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    Gemma2Model.from_pretrained(plain, dtype=F32).save_pretrained(base)
    assert torch.equal(load(base).logits(IDS), load(plain).logits(IDS))
    slerp = {"merge_method": "slerp", "base_model": str(base), "dtype": "float32", "parameters": {"t": 0.0}}
    config = {**slerp, "models": [{"model": str(base)}, {"model": str(base)}]}
    model = Gemma2.from_merge(config, "cpu")
    assert torch.equal(model.logits(IDS), load(plain).logits(IDS))
    model.save(out)
    assert torch.equal(load(out).logits(IDS), load(plain).logits(IDS))


def test_unknown_tensors_outside_the_layers_are_ignored_with_a_warning(plain: Path, tmp_path: Path) -> None:
    more = {"v_head.summary.weight": torch.ones(1, 72), "mtp.layers.0.mlp.up_proj.weight": torch.ones(211, 72)}
    variant(
        plain, tmp_path, lambda found: {**found, **more, "model.layers.0.self_attn.rotary_emb.inv_freq": IDS.float()}
    )
    with pytest.warns(UserWarning, match=r"ignored 'v_head\.summary\.weight' and 1 more, which no Gemma-2 has"):
        model = load(tmp_path)
    assert torch.equal(model.logits(IDS), load(plain).logits(IDS))


def test_the_activation_of_old_releases_is_not_read(plain: Path, tmp_path: Path) -> None:
    variant(plain, tmp_path, lambda found: found, hidden_act="gelu", hidden_activation=...)
    assert torch.equal(load(tmp_path).logits(IDS), load(plain).logits(IDS))
    expected = Gemma2ForCausalLM.from_pretrained(tmp_path, dtype=F32, attn_implementation="eager")(IDS).logits
    assert (load(tmp_path).logits(IDS) - expected).abs().max() <= 1e-4


def test_weights_in_float16_are_converted(plain: Path, tmp_path: Path) -> None:
    half = variant(plain, tmp_path / "f16", lambda found: {name: tensor.half() for name, tensor in found.items()})
    same = variant(plain, tmp_path / "f32", lambda found: {name: t.half().float() for name, t in found.items()})
    assert torch.equal(load(half).logits(IDS), load(same).logits(IDS))


def test_a_merge_in_memory_may_have_an_untied_head(plain: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        head = own_head(seed)
        variant(plain, tmp_path / str(seed), lambda found, head=head: {**found, HEAD: head}, tie_word_embeddings=False)
    one, two = str(tmp_path / "1"), str(tmp_path / "2")
    slerp = {"merge_method": "slerp", "base_model": one, "dtype": "float32", "parameters": {"t": 0.0}}
    model = Gemma2.from_merge({**slerp, "models": [{"model": one}, {"model": two}]}, "cpu")
    assert torch.equal(model.logits(IDS), load(Path(one)).logits(IDS))
    model.set_t(1.0)
    assert torch.equal(model.logits(IDS), load(Path(two)).logits(IDS))
    model.set_t(0.4)
    model.save(tmp_path / "out")
    assert torch.equal(model.logits(IDS), load(tmp_path / "out").logits(IDS))
    assert arcmerge.Gemma2.from_pretrained(tmp_path / "out").config.tie_word_embeddings is False
