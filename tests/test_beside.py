"""Merges of networks that hold more than a decoder, or hold it under other names: what each tensor of the result is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

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


def pair(folder: Path, *, more: Any = (), only_a: Any = (), only_b: Any = (), **names: Any) -> tuple[Path, Path]:
    config = names.pop("config", {})
    found = []
    for letter, seed, extra in (("a", 1, only_a), ("b", 2, only_b)):
        tensors = decoders.decoder(seed, more=[*more, *extra], **names)
        found.append(decoders.write(folder / letter, tensors, decoders.config(**config)))
    return found[0], found[1]


def merge(config: Any, out: Path) -> tuple[dict[str, torch.Tensor], arcmerge.MergeReport]:
    report = arcmerge.merge(config, out, warn=lambda sentence: None)
    return load_file(out / "model.safetensors"), report


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---- towers and buffers


@pytest.mark.parametrize("how", ["slerp", "slices"])
def test_a_tower_comes_whole_from_the_base(how: str, tmp_path: Path) -> None:
    a, b = pair(tmp_path, more=VISION)
    config = decoders.slerp(b, a) if how == "slerp" else decoders.slices((a, 0, 3), (b, 1, 4), base_model=str(b))
    found, report = merge(config, tmp_path / "out")
    assert all(torch.equal(found[name], weights(b)[name]) for name, _ in VISION)
    (note,) = report.notes
    assert note == f"visual (3 tensors) taken whole from {b}"
    assert note in report.warnings
    assert note in str(report)


def test_a_tower_is_cast_as_the_rest(tmp_path: Path) -> None:
    a, b = pair(tmp_path, more=VISION, config={"vision_config": {"torch_dtype": "bfloat16"}})
    found, _ = merge(decoders.slerp(a, b, dtype="float32", out_dtype="float16"), tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert decoders.settings(tmp_path / "out")["vision_config"] == {"torch_dtype": "float16"}


def test_a_tower_that_the_base_has_not_is_left_out(tmp_path: Path) -> None:
    a, b = pair(tmp_path, only_b=VISION)
    found, report = merge(decoders.slerp(a, b), tmp_path / "out")
    assert not [name for name in found if name.startswith("visual")]
    assert report.notes == (f"visual (3 tensors) left out, as {a} has none",)


def test_a_tower_beside_a_language_model_of_as_many_layers(tmp_path: Path) -> None:
    more = [(f"model.vision_tower.encoder.layers.{layer}.mlp.up_proj.weight", (4, 4)) for layer in range(4)]
    names = {"stack": "model.language_model.layers.", "embedding": "model.language_model.embed_tokens.weight"}
    config = {"architectures": ["XForConditionalGeneration"], "text_config": {"num_hidden_layers": 4}}
    a, b = pair(tmp_path, more=more, norm="model.language_model.norm.weight", config=config, **names)
    found, report = merge(decoders.slices((a, 0, 4), (b, 2, 4)), tmp_path / "out")
    assert "model.language_model.layers.5.mlp.up_proj.weight" in found
    assert all(torch.equal(found[name], weights(a)[name]) for name, _ in more)
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
    found, report = merge(config, tmp_path / "out")
    kept = {name for name in found if "attention" in name and "attn" not in name}
    assert len(kept) == (0 if owner == "other" else 6)
    assert ("left out" in report.notes[0]) == (owner == "other")
    if kept:
        assert torch.equal(found["gpt_neox.layers.4.attention.bias"], torch.from_numpy(mask))
        assert found["gpt_neox.layers.4.attention.masked_bias"].item() == -np.inf


# ---- layers for multi-token prediction


def test_a_layer_behind_the_last_is_merged_where_whole_models_meet(tmp_path: Path) -> None:
    a, b = pair(tmp_path, more=PREDICTION, config={"num_nextn_predict_layers": 1})
    found, report = merge(decoders.slerp(a, b, merge_method="linear", parameters={"weight": 0.5}), tmp_path / "out")
    name = PREDICTION[1][0]
    expected = (weights(a)[name].float() + weights(b)[name].float()) / 2
    torch.testing.assert_close(found[name].float(), expected, rtol=2**-7, atol=0)
    assert "multi-token prediction (2 tensors) merged" in report.notes[0]


@pytest.mark.parametrize("also_b", [True, False])
def test_it_follows_the_last_layer_of_slices_and_is_the_bases(also_b: bool, tmp_path: Path) -> None:
    a, b = pair(
        tmp_path, only_a=PREDICTION, only_b=PREDICTION if also_b else [], config={"num_nextn_predict_layers": 1}
    )
    found, report = merge(decoders.slices((a, 0, 4), (b, 2, 4)), tmp_path / "out")
    assert torch.equal(found["model.layers.6.eh_proj.weight"], weights(a)[f"{LAST}eh_proj.weight"])
    assert f"multi-token prediction (2 tensors) taken whole from {a}" in report.notes[0]
    config = decoders.settings(tmp_path / "out")
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (6, 1)


def test_a_stack_of_its_own_in_one_parent_only_is_left_out(tmp_path: Path) -> None:
    a, b = pair(tmp_path, only_b=[("mtp.layers.0.mlp.up_proj.weight", (4, 4)), ("mtp.fc.weight", (4, 4))])
    found, report = merge(decoders.slerp(a, b), tmp_path / "out")
    assert "mtp.fc.weight" not in found
    assert f"left out, as {a} has none" in report.notes[0]


# ---- heads


@pytest.mark.parametrize("head", ["language_model.lm_head.weight", "embed_out.weight", "output.weight", "head.weight"])
def test_heads_of_any_name_leave_config_json_as_it_is(head: str, tmp_path: Path) -> None:
    a, b = pair(tmp_path, head=head)
    found, _ = merge(decoders.slerp(a, b), tmp_path / "out")
    assert head in found
    assert decoders.settings(tmp_path / "out") == decoders.settings(a)


@pytest.mark.parametrize("score", ["score.weight", None])
@pytest.mark.parametrize("tied", [{"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {}])
def test_models_without_a_head_leave_config_json_as_it_is(
    tied: dict[str, bool], score: str | None, tmp_path: Path
) -> None:
    config = {key: value for key, value in decoders.config().items() if key != "tie_word_embeddings"}
    config |= {"architectures": ["LlamaForSequenceClassification" if score else "LlamaModel"], **tied}
    folders = [
        decoders.write(
            tmp_path / letter, decoders.decoder(seed, head=None, more=[(score, (1, WIDTH))] if score else []), config
        )
        for seed, letter in enumerate("ab")
    ]
    found, _ = merge(decoders.slerp(*folders), tmp_path / "out")
    assert decoders.settings(tmp_path / "out") == config
    assert ("score.weight" in found) == (score is not None)


@pytest.mark.parametrize("head", [HEAD, "language_model.lm_head.weight", "embed_out.weight"])
@pytest.mark.parametrize("of_base", [True, False])
def test_a_head_of_one_parent_meets_the_embedding_of_the_other(head: str, of_base: bool, tmp_path: Path) -> None:
    tied = decoders.write(tmp_path / "tied", decoders.decoder(1, head=None), decoders.config(tie_word_embeddings=True))
    own = decoders.write(tmp_path / "own", decoders.decoder(2, head=head), decoders.config())
    config = decoders.slerp(*([own, tied] if of_base else [tied, own]), merge_method="linear", parameters={"weight": 1})
    found, _ = merge(config, tmp_path / "out")
    expected = (weights(tied)[EMBEDDING].float() + weights(own)[head].float()) / 2
    torch.testing.assert_close(found[head].float(), expected, rtol=2**-7, atol=0)
    assert decoders.settings(tmp_path / "out")["tie_word_embeddings"] is False


def test_a_score_or_a_head_of_unknown_name_is_no_lost_head(tmp_path: Path) -> None:
    for name, shape in (("score.weight", (1, WIDTH)), ("model.to_logits.weight", (TOKENS, WIDTH))):
        a, b = pair(tmp_path / name, head=None, more=[(name, shape)])
        found, _ = merge(decoders.slerp(a, b), tmp_path / name / "out")
        assert name in found
        assert decoders.settings(tmp_path / name / "out") == decoders.settings(a)


def test_the_key_is_added_only_where_the_merge_has_made_the_head(tmp_path: Path) -> None:
    silent = {key: value for key, value in decoders.config().items() if key != "tie_word_embeddings"}
    tied = decoders.write(tmp_path / "tied", decoders.decoder(1, head=None), silent)
    own = decoders.write(tmp_path / "own", decoders.decoder(2), silent)
    merge(decoders.slerp(tied, own), tmp_path / "made")
    merge(decoders.slerp(own, tied), tmp_path / "kept")
    assert decoders.settings(tmp_path / "made") == {**silent, "tie_word_embeddings": False}
    assert decoders.settings(tmp_path / "kept") == silent


def test_heads_of_parents_that_all_say_they_are_tied_leave_the_key(tmp_path: Path) -> None:
    """BigBird-Pegasus: its class ties nothing, whatever config.json says."""
    said = decoders.config(tie_word_embeddings=True)
    a, b = (decoders.write(tmp_path / letter, decoders.decoder(seed), said) for seed, letter in enumerate("ab"))
    own = decoders.write(tmp_path / "own", decoders.decoder(2), decoders.config())
    for other, tied in ((b, True), (own, False)):
        found, _ = merge(decoders.slerp(a, other), out := tmp_path / f"out-{tied}")
        assert HEAD in found
        assert decoders.settings(out)["tie_word_embeddings"] is tied


def test_a_head_that_ends_with_a_slice_of_a_tied_model_is_said_to_be_tied(tmp_path: Path) -> None:
    own = decoders.write(tmp_path / "own", decoders.decoder(2), decoders.config())
    tied = decoders.write(tmp_path / "tied", decoders.decoder(1, head=None), decoders.config(tie_word_embeddings=True))
    found, _ = merge(decoders.slices((own, 0, 2), (tied, 2, 4)), tmp_path / "out")
    assert HEAD not in found
    assert decoders.settings(tmp_path / "out")["tie_word_embeddings"] is True


@pytest.mark.parametrize("nested", [False, True])
def test_a_head_that_was_lost_is_refused(nested: bool, tmp_path: Path) -> None:
    a, _ = pair(tmp_path)
    config = decoders.config()
    if nested:
        config["text_config"] = {"tie_word_embeddings": config.pop("tie_word_embeddings"), "num_hidden_layers": 4}
    lost = decoders.write(tmp_path / "lost", decoders.decoder(3, head=None), config)
    with pytest.raises(
        arcmerge.ArcmergeError, match=r"lost: .*tie_word_embeddings: false, so a LlamaForCausalLM .*lm_head"
    ):
        arcmerge.merge(decoders.slerp(a, lost), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the same network under other names


def test_a_checkpoint_of_the_base_class_meets_one_of_the_whole(tmp_path: Path) -> None:
    whole = {"stack": "transformer.h.", "embedding": "transformer.wte.weight", "norm": "transformer.ln_f.weight"}
    base = {name: value.removeprefix("transformer.") for name, value in whole.items()}
    settings = decoders.config(tie_word_embeddings=True, n_layer=4)
    a = decoders.write(tmp_path / "a", decoders.decoder(1, head=None, **whole), settings)
    b = decoders.write(tmp_path / "b", decoders.decoder(2, head=None, **base), settings)
    found, _ = merge(decoders.slerp(a, b), tmp_path / "out")
    assert found.keys() == weights(a).keys()
    found, _ = merge(decoders.slices((b, 0, 4), (a, 3, 4)), tmp_path / "deeper")
    assert torch.equal(found["h.4.mlp.up_proj.weight"], weights(a)["transformer.h.3.mlp.up_proj.weight"])
    deeper = decoders.settings(tmp_path / "deeper")
    assert (deeper["n_layer"], deeper["num_hidden_layers"]) == (5, 5)


# ---- what fits no other layers


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens_per_layer.weight",
        "model.layer_scalars.3.weight",
        "model.residuals.queries.3",
        "model.layers.0.shared_transformer.adapter_list.0.weight",
    ],
)
def test_tensors_with_a_part_for_each_layer_fit_no_slices(name: str, tmp_path: Path) -> None:
    more = [(name.replace("3", str(i)), (TOKENS, 16)) for i in range(4)]
    a, b = pair(tmp_path, more=more)
    merge(decoders.slerp(a, b), tmp_path / "whole")
    merge(decoders.slices((a, 0, 2), (a, 2, 4)), tmp_path / "same")
    for wrong in (decoders.slices((a, 0, 4), (a, 2, 4)), decoders.slices((a, 0, 2), (b, 2, 4))):
        with pytest.raises(arcmerge.ArcmergeError, match="serves several of the 4 layers"):
            arcmerge.merge(wrong, tmp_path / "out")


@pytest.mark.parametrize(("owners", "word"), [([0], "no layer between the ends"), ([1, 2, 3], "only this layer of ")])
def test_an_end_with_other_tensors_stays_at_its_end(owners: list[int], word: str, tmp_path: Path) -> None:
    a, _ = pair(tmp_path, more=[(f"model.layers.{layer}.pre_norm.weight", (WIDTH,)) for layer in owners])
    found, _ = merge(decoders.slices((a, 0, 4), (a, 2, 4)), tmp_path / "out")
    assert ("model.layers.0.pre_norm.weight" in found) == (0 in owners)
    with pytest.raises(arcmerge.ArcmergeError, match=rf"layers\.0\.pre_norm\.weight: {word}"):
        arcmerge.merge(decoders.slices((a, 0, 2), (a, 0, 4)), tmp_path / "wrong")


def test_layer_numbers_that_no_key_can_say_are_refused(tmp_path: Path) -> None:
    a, _ = pair(tmp_path, config={"first_k_dense_replace": 3})
    with pytest.raises(arcmerge.ArcmergeError, match=r"`first_k_dense_replace: 3`.*give other layer ranges"):
        arcmerge.merge(decoders.slices((a, 0, 4), (a, 2, 4)), tmp_path / "out")


def test_an_embedding_with_rows_for_more_than_tokens(tmp_path: Path) -> None:
    """Mllama's has eight for images, which its head has not."""
    folders = []
    for seed, letter in enumerate("ab"):
        tensors = decoders.decoder(seed)
        tensors[EMBEDDING] = np.concatenate([tensors[EMBEDDING], tensors[EMBEDDING][:8]])
        folders.append(decoders.write(tmp_path / letter, tensors, decoders.config()))
    found, _ = merge(decoders.slerp(*folders), tmp_path / "out")
    assert (found[EMBEDDING].shape[0], found[HEAD].shape[0]) == (TOKENS + 8, TOKENS)
    assert decoders.settings(tmp_path / "out")["vocab_size"] == TOKENS


# ---- config.json


def test_the_type_is_that_of_most_bytes(tmp_path: Path) -> None:
    folders = []
    for seed, letter in enumerate("ab"):
        bias = {"model.layers.0.mlp.gate.e_score_correction_bias": np.ones(4, np.float64)}
        folders.append(decoders.write(tmp_path / letter, {**decoders.decoder(seed), **bias}, decoders.config()))
    found, _ = merge(decoders.slerp(*folders), tmp_path / "out")
    assert found["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert decoders.settings(tmp_path / "out")["torch_dtype"] == "bfloat16"


def test_parents_that_compute_otherwise_are_named_with_both_values(tmp_path: Path) -> None:
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
    _, report = merge(decoders.slerp(a, b), tmp_path / "out")
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
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keys_that_change_what_weights_compute(ours: Any, theirs: Any, key: str, tmp_path: Path) -> None:
    for letter, changes in (("a", ours), ("b", theirs)):
        decoders.write(tmp_path / letter, decoders.decoder(1), decoders.config(**changes))
    _, report = merge(decoders.slerp(tmp_path / "a", tmp_path / "b"), tmp_path / "out")
    (warning,) = report.warnings
    assert f"`{key}`" in warning


# ---- code


def test_code_is_copied_and_not_run(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M", "AutoModel": "absent_x.M"}
    a, b = pair(tmp_path, config={"auto_map": auto_map})
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
    _, report = merge(decoders.slerp(a, b), tmp_path / "out")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.py")}
    assert copied == {name: (a / name).read_bytes() for name in code if name != "unused.py"}
    assert not ran.exists()
    assert not [name for name in sys.modules if name.endswith("_x")]
    assert sorted(sentence.split(",")[0] for sentence in report.warnings) == ["absent_x.py", "gone_x.py"]


@pytest.mark.parametrize(
    "reference", ["owner/repo--modeling_x.M", "../modeling_x.M", "sub/modeling_x.M", "/etc/x.M", "x"]
)
def test_code_elsewhere_is_named(reference: str, tmp_path: Path) -> None:
    a, b = pair(tmp_path, config={"auto_map": {"AutoModelForCausalLM": reference}})
    (tmp_path / "modeling_x.py").write_text("")
    _, report = merge(decoders.slerp(a, b), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.py"))
    assert reference in report.warnings[0]
