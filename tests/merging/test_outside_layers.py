"""Merges of networks with more than a decoder, or with other names: the source of each tensor of the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arcmerge
import decoders
from decoders import EMBEDDING, HEAD, TOKENS, WIDTH

VISION = [
    ("visual.patch_embed.proj.weight", (4, 4)),
    ("visual.blocks.0.mlp.up_proj.weight", (4, 4)),
    ("visual.merger.mlp.0.weight", (4, 4)),
]
LAST = "model.layers.4."
PREDICTION = [(f"{LAST}self_attn.q_proj.weight", (WIDTH, WIDTH)), (f"{LAST}eh_proj.weight", (WIDTH, 2 * WIDTH))]


# ---- towers and buffers


@pytest.mark.parametrize("how", ["slerp", "slices"])
def test_a_tower_is_copied_from_the_base(how: str, tmp_path: Path) -> None:
    a, b = decoders.pair(tmp_path, more=VISION)
    config = decoders.slerp(b, a) if how == "slerp" else decoders.slices((a, 0, 3), (b, 1, 4), base_model=str(b))
    found, report = decoders.merge(config, tmp_path / "out")
    assert all(torch.equal(found[name], decoders.weights(b)[name]) for name, _ in VISION)
    (note,) = report.notes
    assert note == f"visual (3 tensors) copied from {b}"
    assert note in report.warnings
    assert note in str(report)


def test_a_tower_is_cast_like_other_tensors(tmp_path: Path) -> None:
    a, b = decoders.pair(tmp_path, more=VISION, config={"vision_config": {"torch_dtype": "bfloat16"}})
    found, _ = decoders.merge(decoders.slerp(a, b, dtype="float32", out_dtype="float16"), tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert decoders.settings(tmp_path / "out")["vision_config"] == {"torch_dtype": "float16"}


def test_a_tower_that_the_base_does_not_have_is_left_out(tmp_path: Path) -> None:
    a, b = decoders.pair(tmp_path, only_b=VISION)
    found, report = decoders.merge(decoders.slerp(a, b), tmp_path / "out")
    assert not [name for name in found if name.startswith("visual")]
    assert report.notes == (f"visual (3 tensors) left out, because {a} has none",)


def test_a_tower_with_as_many_layers_as_the_language_model(tmp_path: Path) -> None:
    more = [(f"model.vision_tower.encoder.layers.{layer}.mlp.up_proj.weight", (4, 4)) for layer in range(4)]
    names = {"stack": "model.language_model.layers.", "embedding": "model.language_model.embed_tokens.weight"}
    config = {"architectures": ["XForConditionalGeneration"], "text_config": {"num_hidden_layers": 4}}
    a, b = decoders.pair(tmp_path, more=more, norm="model.language_model.norm.weight", config=config, **names)
    found, report = decoders.merge(decoders.slices((a, 0, 4), (b, 2, 4)), tmp_path / "out")
    assert "model.language_model.layers.5.mlp.up_proj.weight" in found
    assert all(torch.equal(found[name], decoders.weights(a)[name]) for name, _ in more)
    assert "model.vision_tower (4 tensors)" in report.notes[0]
    assert decoders.settings(tmp_path / "out")["text_config"] == {"num_hidden_layers": 6}


@pytest.mark.parametrize("owner", ["both", "base", "other"])
def test_buffers_are_the_bases_if_it_has_them(owner: str, tmp_path: Path) -> None:
    mask = np.tril(np.ones((1, 1, 4, 4), bool))
    buffers = {
        "gpt_neox.layers.3.attention.bias": mask,
        "gpt_neox.layers.3.attention.masked_bias": np.array(-np.inf, np.float64),
        "gpt_neox.layers.3.attention.rotary_emb.inv_freq": np.ones(4, np.float64),
    }
    folders = []
    for letter, has in (("a", owner != "other"), ("b", owner != "base")):
        tensors = decoders.decoder(
            1, stack="gpt_neox.layers.", embedding="gpt_neox.embed_in.weight", head="embed_out.weight"
        )
        folders.append(decoders.write(tmp_path / letter, {**tensors, **(buffers if has else {})}, decoders.config()))
    config = decoders.slices((folders[0], 0, 4), (folders[1], 3, 4), dtype="bfloat16")
    found, report = decoders.merge(config, tmp_path / "out")
    kept = {name for name in found if "attention" in name and "attn" not in name}
    assert len(kept) == (0 if owner == "other" else 6)
    assert ("left out" in report.notes[0]) == (owner == "other")
    if kept:
        assert torch.equal(found["gpt_neox.layers.4.attention.bias"], torch.from_numpy(mask))
        assert found["gpt_neox.layers.4.attention.masked_bias"].item() == -np.inf


# ---- layers for multi-token prediction


def test_a_layer_after_the_last_is_merged_with_whole_models(tmp_path: Path) -> None:
    a, b = decoders.pair(tmp_path, more=PREDICTION, config={"num_nextn_predict_layers": 1})
    found, report = decoders.merge(
        decoders.slerp(a, b, merge_method="linear", parameters={"weight": 0.5}), tmp_path / "out"
    )
    name = PREDICTION[1][0]
    expected = (decoders.weights(a)[name].float() + decoders.weights(b)[name].float()) / 2
    torch.testing.assert_close(found[name].float(), expected, rtol=2**-7, atol=0)
    assert "multi-token prediction (2 tensors) merged" in report.notes[0]


@pytest.mark.parametrize("also_b", [True, False])
def test_it_follows_the_last_layer_of_slices_and_is_from_the_base(also_b: bool, tmp_path: Path) -> None:
    a, b = decoders.pair(
        tmp_path, only_a=PREDICTION, only_b=PREDICTION if also_b else [], config={"num_nextn_predict_layers": 1}
    )
    found, report = decoders.merge(decoders.slices((a, 0, 4), (b, 2, 4)), tmp_path / "out")
    assert torch.equal(found["model.layers.6.eh_proj.weight"], decoders.weights(a)[f"{LAST}eh_proj.weight"])
    assert f"multi-token prediction (2 tensors) copied from {a}" in report.notes[0]
    config = decoders.settings(tmp_path / "out")
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (6, 1)


def test_a_separate_stack_in_one_model_only_is_left_out(tmp_path: Path) -> None:
    a, b = decoders.pair(tmp_path, only_b=[("mtp.layers.0.mlp.up_proj.weight", (4, 4)), ("mtp.fc.weight", (4, 4))])
    found, report = decoders.merge(decoders.slerp(a, b), tmp_path / "out")
    assert "mtp.fc.weight" not in found
    assert f"left out, because {a} has none" in report.notes[0]


# ---- the same network under other names


def test_a_checkpoint_of_the_base_class_is_merged_with_one_of_the_full_class(tmp_path: Path) -> None:
    whole = {"stack": "transformer.h.", "embedding": "transformer.wte.weight", "norm": "transformer.ln_f.weight"}
    base = {name: value.removeprefix("transformer.") for name, value in whole.items()}
    settings = decoders.config(tie_word_embeddings=True, n_layer=4)
    a = decoders.write(tmp_path / "a", decoders.decoder(1, head=None, **whole), settings)
    b = decoders.write(tmp_path / "b", decoders.decoder(2, head=None, **base), settings)
    found, _ = decoders.merge(decoders.slerp(a, b), tmp_path / "out")
    assert found.keys() == decoders.weights(a).keys()
    found, _ = decoders.merge(decoders.slices((b, 0, 4), (a, 3, 4)), tmp_path / "deeper")
    assert torch.equal(found["h.4.mlp.up_proj.weight"], decoders.weights(a)["transformer.h.3.mlp.up_proj.weight"])
    deeper = decoders.settings(tmp_path / "deeper")
    assert (deeper["n_layer"], deeper["num_hidden_layers"]) == (5, 5)


# ---- tensors that do not fit other layers


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens_per_layer.weight",
        "model.layer_scalars.3.weight",
        "model.residuals.queries.3",
        "model.layers.0.shared_transformer.adapter_list.0.weight",
    ],
)
def test_tensors_with_a_part_for_each_layer_cannot_be_sliced(name: str, tmp_path: Path) -> None:
    more = [(name.replace("3", str(i)), (TOKENS, 16)) for i in range(4)]
    a, b = decoders.pair(tmp_path, more=more)
    decoders.merge(decoders.slerp(a, b), tmp_path / "whole")
    decoders.merge(decoders.slices((a, 0, 2), (a, 2, 4)), tmp_path / "same")
    for wrong in (decoders.slices((a, 0, 4), (a, 2, 4)), decoders.slices((a, 0, 2), (b, 2, 4))):
        with pytest.raises(arcmerge.ArcmergeError, match="serves several of the 4 layers"):
            arcmerge.merge(wrong, tmp_path / "out")


@pytest.mark.parametrize(("owners", "word"), [([0], "has"), ([1, 2, 3], "lacks")])
def test_a_first_layer_with_other_tensors_must_stay_first(owners: list[int], word: str, tmp_path: Path) -> None:
    a, _ = decoders.pair(tmp_path, more=[(f"model.layers.{layer}.pre_norm.weight", (WIDTH,)) for layer in owners])
    found, _ = decoders.merge(decoders.slices((a, 0, 4), (a, 2, 4)), tmp_path / "out")
    assert ("model.layers.0.pre_norm.weight" in found) == (0 in owners)
    with pytest.raises(arcmerge.ArcmergeError, match=rf"only this layer {word} '.*layers\.0\.pre_norm\.weight'"):
        arcmerge.merge(decoders.slices((a, 0, 2), (a, 0, 4)), tmp_path / "wrong")


def test_layers_that_no_key_can_describe_are_refused(tmp_path: Path) -> None:
    a, _ = decoders.pair(tmp_path, config={"first_k_dense_replace": 3})
    with pytest.raises(arcmerge.ArcmergeError, match=r"'first_k_dense_replace' must .*, got 3 .*; give other"):
        arcmerge.merge(decoders.slices((a, 0, 4), (a, 2, 4)), tmp_path / "out")


def test_an_embedding_with_rows_for_more_than_tokens(tmp_path: Path) -> None:
    """Mllama's has eight rows for images, which its head does not have."""
    folders = []
    for seed, letter in enumerate("ab"):
        tensors = decoders.decoder(seed)
        tensors[EMBEDDING] = np.concatenate([tensors[EMBEDDING], tensors[EMBEDDING][:8]])
        folders.append(decoders.write(tmp_path / letter, tensors, decoders.config()))
    found, _ = decoders.merge(decoders.slerp(*folders), tmp_path / "out")
    assert (found[EMBEDDING].shape[0], found[HEAD].shape[0]) == (TOKENS + 8, TOKENS)
    assert decoders.settings(tmp_path / "out")["vocab_size"] == TOKENS


# ---- config.json


def test_the_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    folders = []
    for seed, letter in enumerate("ab"):
        bias = {"model.layers.0.mlp.gate.e_score_correction_bias": np.ones(4, np.float64)}
        folders.append(decoders.write(tmp_path / letter, {**decoders.decoder(seed), **bias}, decoders.config()))
    found, _ = decoders.merge(decoders.slerp(*folders), tmp_path / "out")
    assert found["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert decoders.settings(tmp_path / "out")["torch_dtype"] == "bfloat16"


def test_models_with_other_settings_give_a_warning_with_both_values(tmp_path: Path) -> None:
    a, b = (tmp_path / letter for letter in "ab")
    common = {"rms_norm_eps": 1e-6, "use_sliding_window": False, "max_position_embeddings": 8}
    ours = {
        "num_attention_heads": 4,
        "rope_theta": 10000.0,
        "sliding_window": 8,
        "rope_scaling": None,
        "head_dim": None,
    }
    theirs = {
        "num_attention_heads": 2,
        "rope_parameters": {"rope_theta": 10000, "rope_type": "default"},
        "sliding_window": 4,
        "head_dim": 8,
    }
    decoders.write(a, decoders.decoder(1), decoders.config(**common, **ours))
    decoders.write(b, decoders.decoder(2), decoders.config(**{**common, "rms_norm_eps": 1e-5}, **theirs))
    _, report = decoders.merge(decoders.slerp(a, b), tmp_path / "out")
    assert set(report.warnings) == {
        f"`num_attention_heads` differs between the models: 4 in {a}, which is kept, 2 in {b}",
        f"`rms_norm_eps` differs between the models: 1e-06 in {a}, which is kept, 1e-05 in {b}",
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "key"),
    [
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope_theta"),
        ({"rope_theta": 1e4}, {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"text_config": {"head_dim": 8}}, {"text_config": {"head_dim": 4}}, "head_dim"),
        ({"layer_norm_epsilon": 1e-5}, {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"attn_config": {"clip_qkv": 8}}, {"attn_config": {"clip_qkv": 6}}, "clip_qkv"),
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, "hidden_act"),
        ({"final_logit_softcapping": 30.0}, {"final_logit_softcapping": None}, "final_logit_softcapping"),
        ({"sliding_window": 4096}, {"sliding_window": None}, "sliding_window"),
        ({}, {"rope_theta": 1e6}, "rope_theta"),
        ({"rope_theta": 1e6}, {}, "rope_theta"),
        ({}, {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"layer_types": ["full_attention"] * 4}, {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keys_that_change_the_results_of_weights(ours: Any, theirs: Any, key: str, tmp_path: Path) -> None:
    for letter, changes in (("a", ours), ("b", theirs)):
        decoders.write(tmp_path / letter, decoders.decoder(1), decoders.config(**changes))
    _, report = decoders.merge(decoders.slerp(tmp_path / "a", tmp_path / "b"), tmp_path / "out")
    (warning,) = report.warnings
    assert f"`{key}`" in warning


# ---- code


def test_code_is_copied_and_not_run(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M", "AutoModel": "absent_x.M"}
    a, b = decoders.pair(tmp_path, config={"auto_map": auto_map})
    ran = tmp_path / "ran"
    run = f"open({str(ran)!r}, 'w')\n"
    imports = "from .layers_x import (\n    y,\n)\nfrom . import helpers_x as h, other\nfrom .gone_x import z\n"
    code = {
        "configuration_x.py": run,
        "modeling_x.py": run + imports,
        "layers_x.py": "import torch\nfrom .configuration_x import C\n",
        "helpers_x.py": run,
        "tokenization_x.py": "\xff",
        "unused.py": run,
    }
    for name, text in code.items():
        (a / name).write_text(text, encoding="latin-1")
    (a / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}}))
    _, report = decoders.merge(decoders.slerp(a, b), tmp_path / "out")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.py")}
    assert copied == {name: (a / name).read_bytes() for name in code if name != "unused.py"}
    assert not ran.exists()
    assert not [name for name in sys.modules if name.endswith("_x")]
    assert sorted(sentence.split(",")[0] for sentence in report.warnings) == ["absent_x.py", "gone_x.py"]


@pytest.mark.parametrize(
    "reference", ["owner/repo--modeling_x.M", "../modeling_x.M", "sub/modeling_x.M", "/etc/x.M", "x"]
)
def test_code_of_other_repositories_gives_a_warning(reference: str, tmp_path: Path) -> None:
    a, b = decoders.pair(tmp_path, config={"auto_map": {"AutoModelForCausalLM": reference}})
    (tmp_path / "modeling_x.py").write_text("")
    _, report = decoders.merge(decoders.slerp(a, b), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.py"))
    assert reference in report.warnings[0]
