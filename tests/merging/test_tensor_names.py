"""The role of a tensor by its name and shape, for checkpoints of many architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arcmerge
import decoders
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.merging.plan.tensor_names import TensorNames, is_before, kind_of, place, tower_of
from decoders import TOKENS, WIDTH

# Prefix of the layers, embedding, head, norm; as transformers, or the authors' own code, saves them.
NETWORKS = {
    "llama": ("model.layers.", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"),
    "base-class": ("layers.", "embed_tokens.weight", None, "norm.weight"),
    "gpt2": ("transformer.h.", "transformer.wte.weight", None, "transformer.ln_f.weight"),
    "gpt2-base": ("h.", "wte.weight", None, "ln_f.weight"),
    "falcon": ("transformer.h.", "transformer.word_embeddings.weight", "lm_head.weight", "transformer.ln_f.weight"),
    "mpt": ("transformer.blocks.", "transformer.wte.weight", None, "transformer.norm_f.weight"),
    "gpt-neox": (
        "gpt_neox.layers.",
        "gpt_neox.embed_in.weight",
        "embed_out.weight",
        "gpt_neox.final_layer_norm.weight",
    ),
    "chatglm": (
        "transformer.encoder.layers.",
        "transformer.embedding.word_embeddings.weight",
        "transformer.output_layer.weight",
        "transformer.encoder.final_layernorm.weight",
    ),
    "internlm2": ("model.layers.", "model.tok_embeddings.weight", "output.weight", "model.norm.weight"),
    "rwkv": ("rwkv.blocks.", "rwkv.embeddings.weight", "head.weight", "rwkv.ln_out.weight"),
    "olmo": (
        "model.transformer.blocks.",
        "model.transformer.wte.weight",
        "model.transformer.ff_out.weight",
        "model.transformer.ln_f.weight",
    ),
    "openelm": ("transformer.layers.", "transformer.token_embeddings.weight", None, "transformer.norm.weight"),
    "phi-1": ("transformer.h.", "transformer.embd.wte.weight", "lm_head.linear.weight", "lm_head.ln.weight"),
    "inkling": ("model.llm.layers.", "model.llm.embed.weight", "model.llm.unembed.weight", "model.llm.norm.weight"),
    "mamba": ("backbone.layers.", "backbone.embeddings.weight", None, "backbone.norm_f.weight"),
    "opt": (
        "model.decoder.layers.",
        "model.decoder.embed_tokens.weight",
        None,
        "model.decoder.final_layer_norm.weight",
    ),
    "bert": (
        "bert.encoder.layer.",
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.weight",
        "cls.predictions.transform.LayerNorm.weight",
    ),
    "llava": (
        "language_model.model.layers.",
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "language_model.model.norm.weight",
    ),
    "gemma3": (
        "model.language_model.layers.",
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
        "model.language_model.norm.weight",
    ),
}
TOWERS = (
    "vision_tower.encoder.layers.0.self_attn.q_proj.weight",
    "vision_tower.encoder.layers.3.self_attn.q_proj.weight",
    "visual.blocks.0.attn.qkv.weight",
    "visual.merger.mlp.0.weight",
    "audio_tower.layers.1.fc1.weight",
    "multi_modal_projector.linear_1.weight",
    "model.image_newline",
)


def names_of(folder: Path, tensors: decoders.Tensors, **changes: Any) -> TensorNames:
    return TensorNames(Checkpoint(decoders.write(folder, tensors, decoders.config(**changes))))


@pytest.mark.parametrize("network", NETWORKS)
def test_parts_of_the_decoder(network: str, tmp_path: Path) -> None:
    stack, embedding, head, norm = NETWORKS[network]
    more = [(name, (4, 4)) for name in TOWERS]
    tensors = decoders.decoder(1, stack=stack, embedding=embedding, norm=norm, head=head, more=more)
    names = names_of(tmp_path / "a", tensors)
    assert (names.stacks, names.depth, names.embedding, names.head) == ((stack,), 4, embedding, head)
    assert names.layers[3] == {"self_attn.q_proj.weight", "mlp.up_proj.weight"}
    assert set(names.outer.values()) == {embedding, norm}
    assert set(names.towers) == set(TOWERS)


def test_parts_outside_the_language_model_are_not_part_of_it(tmp_path: Path) -> None:
    stack, embedding, head, norm = NETWORKS["llava"]
    more = [(name, (4, 4)) for name in ("mlp1.0.weight", "vit.layers.0.attn.q.weight", "score.weight")]
    names = names_of(
        tmp_path / "a", decoders.decoder(1, stack=stack, embedding=embedding, head=head, norm=norm, more=more)
    )
    assert names.towers == ["mlp1.0.weight", "vit.layers.0.attn.q.weight"]
    assert "score.weight" in names.outer


def test_a_head_is_found_by_its_number_of_rows(tmp_path: Path) -> None:
    more = [("output.weight", (TOKENS + 1, WIDTH)), ("model.head.weight", (2, WIDTH))]
    assert names_of(tmp_path / "a", decoders.decoder(1, head=None, more=more)).head is None


def test_a_reward_model_has_no_head(tmp_path: Path) -> None:
    names = names_of(tmp_path / "a", decoders.decoder(1, head=None, more=[("score.weight", (1, WIDTH))]))
    assert names.head is None
    assert "score.weight" in names.outer


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({"num_nextn_predict_layers": 1}, "model.layers.4.mlp.up_proj.weight"),
        ({}, "model.layers.4.eh_proj.weight"),
        ({}, "mtp.layers.0.mlp.up_proj.weight"),
        ({}, "model.mtp_layers.0.mlp.up_proj.weight"),
    ],
    ids=["counted", "by its parts", "mtp", "mtp_layers"],
)
def test_layers_for_multi_token_prediction(changes: dict[str, Any], extra: str, tmp_path: Path) -> None:
    names = names_of(tmp_path / "a", decoders.decoder(1, more=[(extra, (4, 4))]), **changes)
    assert names.depth == 4
    found = [names.in_layer(number, rest) for number, rests in names.prediction_layers.items() for rest in rests]
    assert [*names.prediction, *found] == [extra]


def test_masks_are_not_biases(tmp_path: Path) -> None:
    stack = "transformer.h."
    masks = [(f"{stack}0.attn.bias", (1, 1, 4, 4)), (f"{stack}0.attn.masked_bias", ()), ("rotary_emb.inv_freq", (4,))]
    weights = [(f"{stack}0.attn.c_attn.bias", (12,)), (f"{stack}1.attn.bias", (12,))]
    names = names_of(tmp_path / "a", decoders.decoder(1, stack=stack, more=[*masks, *weights]))
    assert names.layer_buffers() == [name for name, _ in masks[:2]]
    assert names.outer_buffers == ["rotary_emb.inv_freq"]
    assert "attn.c_attn.bias" in names.layers[0]
    assert "attn.bias" in names.layers[1]


def test_rows_of_tokens(tmp_path: Path) -> None:
    more = [
        ("lm_head.bias", (TOKENS,)),
        ("model.layers.4.shared_head.head.weight", (TOKENS, WIDTH)),
        ("model.layers.4.embed_tokens.weight", (TOKENS, WIDTH)),
        ("model.layers.4.mlp.head.weight", (4, WIDTH)),
    ]
    names = names_of(tmp_path / "a", decoders.decoder(1, more=more), num_nextn_predict_layers=1)
    of_tokens = {name for name, _ in [*more, (decoders.NORM, ())] if names.is_vocabulary(name)}
    assert of_tokens == {name for name, _ in more[:3]}
    assert names.is_vocabulary(decoders.EMBEDDING)
    assert names.is_vocabulary(decoders.HEAD)


@pytest.mark.parametrize("bias", ["vocab_projector.bias", "lm_loss.bias", "cls.predictions.bias", "lm_head.bias"])
def test_the_bias_of_a_tied_head_is_merged_with_the_rest(bias: str, tmp_path: Path) -> None:
    names = names_of(tmp_path / "a", decoders.decoder(1, head=None, more=[(bias, (TOKENS,))]))
    assert not names.towers
    assert bias in names.outer.values()
    assert names.is_vocabulary(bias)


@pytest.mark.parametrize(
    ("config", "stacks", "word"),
    [
        ({}, ("encoder.block.", "decoder.block."), "'encoder.block.N', 'decoder.block.N'"),
        ({"is_encoder_decoder": True}, ("encoder.block.", "decoder.block."), "'is_encoder_decoder' must be false"),
        ({}, ("vision_model.layers.",), "got none"),
        ({}, ("encoder.blocks.0.",), "'encoder.blocks.N.M'"),
        ({"n_layer": 5}, ("h.",), "num_hidden_layers 4 and n_layer 5, got layers 0 to 2 .*incomplete"),
        ({"num_hidden_layers": 2}, ("h.",), "got layers 0 to 2 .*of different models"),
    ],
    ids=["two", "encoder-decoder", "none", "groups", "incomplete", "one too many"],
)
def test_networks_that_are_refused(config: dict[str, Any], stacks: tuple[str, ...], word: str, tmp_path: Path) -> None:
    tensors = {"shared.weight": np.ones((TOKENS, WIDTH), np.float32)}
    for stack in stacks:
        tensors |= decoders.decoder(1, stack=stack, layers=3, embedding="shared.weight")
    folder = decoders.write(tmp_path / "a", tensors, decoders.config(**config))
    with pytest.raises(arcmerge.ArcmergeError, match=word):
        arcmerge.merge(decoders.slices((folder, 0, 3)), tmp_path / "out")


def test_names_of_parts() -> None:
    assert tower_of("model.vision_tower.encoder.layers.0.q.weight") == "model.vision_tower"
    assert tower_of("mlp1.0.weight") == "mlp1"
    assert kind_of("transformer.h.3.attn.masked_bias") == "attn.masked_bias"
    assert place("transformer.h.3.attn.c_attn.weight") == (3, "attn.c_attn", "attn")
    assert place("visual.blocks.3.attn.qkv.weight")[0] is None
    before = ("wpe.weight", "embeddings.LayerNorm.weight", "embed_positions.weight")
    after = (
        "ln_f.weight",
        "norm.weight",
        "embedding_norm.weight",
        "altup_unembed_projections.0.weight",
        "score.weight",
    )
    assert [name for name in (*before, *after) if is_before(name)] == list(before)
