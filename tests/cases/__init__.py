"""The cases of every kernel, on which all proofs are made."""

from __future__ import annotations

from cases import (
    attention,
    attention_decode,
    combine,
    consensus_combine,
    geglu,
    gram,
    linear,
    linear_geglu,
    lm_head,
    magnitude_histogram,
    rmsnorm,
    rmsnorm_add_rmsnorm,
    rope_cache,
    slerp,
)
from cases.case import Blank, Call, Case, Draw, Expected, Random, disagreement

OPS = (
    gram,
    combine,
    slerp,
    magnitude_histogram,
    consensus_combine,
    rmsnorm,
    rmsnorm_add_rmsnorm,
    rope_cache,
    attention,
    attention_decode,
    linear,
    linear_geglu,
    geglu,
    lm_head,
)

SMALL: list[Case] = [case for op in OPS for case in op.SMALL]
MODELS: list[Case] = [case for op in OPS for case in op.MODELS]

__all__ = ["MODELS", "OPS", "SMALL", "Blank", "Call", "Case", "Draw", "Expected", "Random", "disagreement"]
