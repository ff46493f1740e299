"""Merges of every architecture that transformers can build tiny: both ends, the middle, and slices of another depth.

`make test` runs a sample of architectures of different kinds; `make architectures` runs all of them and writes
docs/architectures.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import architecture_checks
import architectures
from architecture_checks import Outcome
from architecture_expectations import REFUSED, REFUSED_DEPTH, UNBUILDABLE
from architectures import Kind

ALL = os.environ.get("ARCMERGE_ARCHITECTURES") == "all"
TABLE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"

SAMPLE: tuple[tuple[Kind, str], ...] = (
    ("causal", "llama"),  # layers.N, a head of its own
    ("causal", "gemma3_text"),  # tied; attention by a list, an entry a layer
    ("causal", "gpt2"),  # h.N under a prefix, tied
    ("causal", "gpt_neox"),  # a head called embed_out
    ("causal", "qwen3_next"),  # experts in layers by their number, attention by a list
    ("causal", "bart"),  # a decoder whose config.json has keys of an encoder
    ("causal", "jamba"),  # attention and state-space layers, by their number
    ("causal", "gemma4_text"),  # settings of single layers in an object of layer numbers
    ("reward", "qwen2"),  # a score in place of the head
    ("masked", "bert"),  # an encoder
    ("image", "llava"),  # a tower and a projector beside the decoder
)


# Classes of other kinds than decoders, of the families that are merged most often and of unusual networks.
OTHERS: dict[Kind, str] = {
    "reward": (
        "bert bloom deberta-v2 falcon gemma2 gemma3 gemma3_text gpt2 gpt_neox jamba llama mistral mixtral modernbert "
        "opt phi3 qwen2 qwen3 qwen3_moe"
    ),
    "masked": "albert bert convbert deberta-v2 distilbert electra eurobert modernbert roberta xlm-roberta",
    "base": "bert falcon gemma2 gemma3 gpt2 gpt_neox llama mamba modernbert qwen3 t5",
    "sequence": "bart t5",
    "image": (
        "aria aya_vision cohere2_vision gemma3 gemma4 got_ocr2 idefics3 internvl lfm2_vl llava llava_next "
        "llava_onevision mistral3 mllama ovis2 paligemma qwen3_5 qwen3_vl "
        "qwen3_vl_moe smolvlm video_llama_3 vipllava"
    ),
}


def _all() -> list[tuple[Kind, str]]:
    others = [(kind, name) for kind, listed in OTHERS.items() for name in listed.split()]
    return [*(("causal", name) for name in architectures.names("causal")), *others]


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, Outcome | str]]:
    found: dict[str, Outcome | str] = {}
    yield found
    if ALL:
        TABLE.write_text(architecture_checks.table(found))


@pytest.mark.parametrize(
    ("kind", "model_type"), [pytest.param(*one, id="-".join(one)) for one in (_all() if ALL else SAMPLE)]
)
def test_a_merge_of_this_architecture_is_right_or_refused(
    kind: Kind, model_type: str, tmp_path: Path, outcomes: dict[str, Any]
) -> None:
    name = f"{kind}/{model_type}"
    if name in UNBUILDABLE:
        outcomes[name] = UNBUILDABLE[name]
        pytest.skip(UNBUILDABLE[name])
    outcome = architecture_checks.examine(kind, model_type, tmp_path)
    outcomes[name] = outcome
    assert not outcome.remarks
    assert _as_expected(outcome.refused, REFUSED.get(name)), outcome.refused
    assert _as_expected(outcome.refused_depth, REFUSED_DEPTH.get(name)), outcome.refused_depth


def _as_expected(sentence: str | None, reason: str | None) -> bool:
    """Whether a merge was refused for its reason, or not refused if there is no reason."""
    return sentence is None if reason is None else reason in (sentence or "")
