"""Checks of a single model by its headers and its config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.errors import Problems
from arcmerge.merging.plan.config_layers import KINDS, claimed_depths, decoder_settings
from arcmerge.merging.plan.tensor_names import TensorNames, is_before, split
from arcmerge.merging.recipe.model_reference import ModelReference

_HAS_HEAD = re.compile("ForCausalLM|ForConditionalGeneration|LMHead|ForMaskedLM|ForPreTraining")
# Classes of transformers with a task head, which no key of config.json ties to the embedding, and names of such heads.
_HAS_TASK_HEAD = re.compile("For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)")
_TASK_HEAD = re.compile(
    r"(?:^|\.)(?:\w*classifier\w*|\w*score|\w*head|\w*outputs?|\w*logits\w*|sequence_summary|cls|answer_class)\."
)
# Heads that replace the output head.
_SCORES = re.compile(r"(?:^|\.)(?:score|classifier|reward_head|v_head|value_head|regression_head)\.")


def check_model(model: ModelReference, checkpoint: Checkpoint, names: TensorNames, problems: Problems) -> bool:
    """Whether a checkpoint can be merged with others. If not, a problem is added."""
    config = checkpoint.config
    outside = {part for name in names.towers for part in name.split(".")}
    halves = len(names.stacks) != 1 or not outside.isdisjoint({"encoder", "decoder"})
    if config.get("is_encoder_decoder") is True and halves:
        problems.add(
            f"{model}: 'is_encoder_decoder' must be false in config.json, got true; only networks with one stack of "
            "layers can be merged"
        )
        return False
    # Funnel has blocks of numbered layers, which are more than one stack.
    groups = any(split(rest) and rest[0].isdecimal() for rests in names.layers.values() for rest in rests)
    if len(names.stacks) != 1 or groups:
        found = ", ".join(f"'{prefix}N{'.M' * groups}'" for prefix in names.stacks) or "none"
        problems.add(
            f"{model} must have one stack of layers, such as tensors 'model.layers.N....' or 'transformer.h.N....', "
            f"got {found}; " + ("other networks cannot be merged" if names.stacks else _unknown(checkpoint))
        )
        return False
    claimed, present = claimed_depths(config), sorted(names.layers)
    if present != list(range(len(present))) or not _counts(config, len(present)):
        said = " and ".join(f"{key} {depth}" for key, depth in claimed.items()) or "no number of layers"
        problems.add(
            f"{model} must have the layers that its config.json counts, {said}, "
            f"got layers {present[0]} to {present[-1]} ({len(present)} of them); "
            + (
                "the checkpoint is incomplete, download it again"
                if len(present) < max(claimed.values(), default=present[-1] + 1)
                else "the weights and config.json are of different models, download both again"
            )
        )
        return False
    return _check_head(model, checkpoint, names, problems)


def _unknown(checkpoint: Checkpoint) -> str:
    numbered = next((name for name in checkpoint.tensors if any(part.isdecimal() for part in name.split("."))), None)
    seen = numbered or next(iter(checkpoint.tensors), None)
    return f"its architecture is unknown, '{seen}' is not part of a layer" if seen else "check the folder"


def _counts(config: Mapping[str, Any], depth: int) -> bool:
    """Whether config.json counts `depth` layers, or counts halves of layers and lists the kind of each."""
    claimed = set(claimed_depths(config).values())
    settings = decoder_settings(config)
    listed = {len(settings[key]) for key in KINDS if isinstance(settings.get(key), list)}
    return (
        not claimed
        or depth in claimed
        or depth in listed
        or any(count % depth == 0 and count in listed for count in claimed)
    )


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether config.json says that the head is the embedding; None if it leaves that to a default."""
    said = config.get("tie_word_embeddings", decoder_settings(config).get("tie_word_embeddings"))
    return said if isinstance(said, bool) else None


def _check_head(model: ModelReference, checkpoint: Checkpoint, names: TensorNames, problems: Problems) -> bool:
    """Whether the files have the head that config.json promises."""
    architecture = str(next(iter(checkpoint.config.get("architectures") or ()), ""))
    if _HAS_TASK_HEAD.search(architecture) and not any(_TASK_HEAD.search(role) for role in names.outer):
        problems.add(
            f"{model} must have a head, such as 'score.weight' or 'classifier.weight', as config.json says "
            f"{architecture}, got none; download the checkpoint again, or set the architecture without a head in "
            "config.json"
        )
        return False
    if says_tied(checkpoint.config) is not False or names.head or names.embedding is None:
        return True
    if not _HAS_HEAD.search(architecture) or any(_SCORES.search(role) for role in names.outer):
        return True
    shape = checkpoint.tensors[names.embedding].shape
    others = [name for name in names.outer.values() if name != names.embedding and not is_before(name)]
    if any(checkpoint.tensors[name].shape == shape for name in others):  # a head with an unknown name
        return True
    problems.add(
        f"{model} must have an output head, 'lm_head.weight' or another of its names, as config.json says "
        f"{architecture} with tie_word_embeddings: false, got none; download the checkpoint again, or set "
        "tie_word_embeddings: true if the embedding is its head"
    )
    return False
