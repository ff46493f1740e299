"""What is wrong with a parent, told from its headers and config.json before any other is looked at."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.merging.plan.config_layers import KINDS, claimed_depths, decoder_settings
from arcmerge.merging.plan.tensor_names import Names, is_before, split

_HAS_HEAD = re.compile("ForCausalLM|ForConditionalGeneration|LMHead|ForMaskedLM|ForPreTraining")
# Classes of transformers with a head of another kind, which no key of config.json ties to anything, and its names.
_HAS_TASK_HEAD = re.compile("For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)")
_TASK_HEAD = re.compile(
    r"(?:^|\.)(?:\w*classifier\w*|\w*score|\w*head|\w*outputs?|\w*logits\w*|sequence_summary|cls|answer_class)\."
)
# A head of another kind in its place.
_SCORES = re.compile(r"(?:^|\.)(?:score|classifier|reward_head|v_head|value_head|regression_head)\.")


def fault(checkpoint: Checkpoint, names: Names) -> str | None:
    """Why a checkpoint cannot be merged, in a sentence without the name of the model; None: it can be."""
    config = checkpoint.config
    beside = {part for name in names.towers for part in name.split(".")}
    halves = len(names.stacks) != 1 or not beside.isdisjoint({"encoder", "decoder"})
    if config.get("is_encoder_decoder") is True and halves:
        return "is a network of an encoder and a decoder, says config.json; only networks with one stack can be merged"
    # Funnel's blocks hold numbered layers each: more stacks than one.
    groups = any(split(rest) and rest[0].isdecimal() for rests in names.layers.values() for rest in rests)
    if len(names.stacks) != 1 or groups:
        found = ", ".join(f"'{prefix}N{'.M' * groups}'" for prefix in names.stacks) or "none"
        return (
            "must hold one stack of layers, such as tensors 'model.layers.N....' or 'transformer.h.N....', "
            f"found {found}; " + ("other networks cannot be merged" if names.stacks else _unknown(checkpoint))
        )
    claimed, present = claimed_depths(config), sorted(names.layers)
    if present != list(range(len(present))) or not _counts(config, len(present)):
        said = " and ".join(f"{key} {depth}" for key, depth in claimed.items()) or "nothing of their number"
        return (
            f"config.json says {said} but the weights hold layers {present[0]} to {present[-1]} "
            f"({len(present)} of them); "
            + (
                "the checkpoint is incomplete, fetch it again"
                if len(present) < max(claimed.values(), default=present[-1] + 1)
                else "the two are not of one model, fetch both again"
            )
        )
    return _lost_head(checkpoint, names)


def _unknown(checkpoint: Checkpoint) -> str:
    numbered = next((name for name in checkpoint.tensors if any(part.isdecimal() for part in name.split("."))), None)
    seen = numbered or next(iter(checkpoint.tensors), None)
    return f"its architecture is not known here: '{seen}' is no layer's" if seen else "check the folder"


def _counts(config: Mapping[str, Any], depth: int) -> bool:
    """Whether config.json speaks of `depth` layers, be it that it counts their halves, with a list of what each is."""
    claimed = set(claimed_depths(config).values())
    settings = decoder_settings(config)
    listed = {len(settings[key]) for key in KINDS if isinstance(settings.get(key), list)}
    return (
        not claimed
        or depth in claimed
        or depth in listed
        or any(number % depth == 0 and number in listed for number in claimed)
    )


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether config.json says that the head is the embedding; None where it leaves that to a default."""
    said = config.get("tie_word_embeddings", decoder_settings(config).get("tie_word_embeddings"))
    return said if isinstance(said, bool) else None


def _lost_head(checkpoint: Checkpoint, names: Names) -> str | None:
    architecture = str(next(iter(checkpoint.config.get("architectures") or ()), ""))
    if _HAS_TASK_HEAD.search(architecture) and not any(_TASK_HEAD.search(role) for role in names.outer):
        return (
            f"config.json says {architecture}, which has a head of its own, such as 'score.weight' or "
            "'classifier.weight', but no file holds one; fetch the checkpoint again, or name the architecture without "
            "a head in config.json"
        )
    if says_tied(checkpoint.config) is not False or names.head or names.embedding is None:
        return None
    if not _HAS_HEAD.search(architecture) or any(_SCORES.search(role) for role in names.outer):
        return None
    shape = checkpoint.tensors[names.embedding].shape
    others = [name for name in names.outer.values() if name != names.embedding and not is_before(name)]
    if any(checkpoint.tensors[name].shape == shape for name in others):  # a head by a name that is not known
        return None
    return (
        f"config.json says tie_word_embeddings: false, so a {architecture} has an output head of its own, but no file "
        "holds one ('lm_head.weight' or another of its names); fetch the checkpoint again, or set tie_word_embeddings: "
        "true if the embedding is its head"
    )
