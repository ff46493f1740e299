"""The ops on torch tensors that everything else is made of; also torch.ops.arcmerge.<name>.

gram, combine, slerp, magnitude_histogram and consensus_combine merge; the others run a Gemma-2.
"""

from arcmerge.ops.attention import attention
from arcmerge.ops.attention_decode import attention_decode
from arcmerge.ops.combine import combine
from arcmerge.ops.consensus_combine import consensus_combine
from arcmerge.ops.geglu import geglu
from arcmerge.ops.gram import gram
from arcmerge.ops.linear import linear
from arcmerge.ops.linear_geglu import linear_geglu
from arcmerge.ops.lm_head import lm_head_argmax, lm_head_logits, lm_head_logprob
from arcmerge.ops.lm_head_sample import lm_head_draw, lm_head_sample
from arcmerge.ops.magnitude_histogram import magnitude_histogram
from arcmerge.ops.rmsnorm import rmsnorm
from arcmerge.ops.rmsnorm_add_rmsnorm import rmsnorm_add_rmsnorm
from arcmerge.ops.rope_cache import rope_cache
from arcmerge.ops.slerp import slerp

__all__ = [
    "attention",
    "attention_decode",
    "combine",
    "consensus_combine",
    "geglu",
    "gram",
    "linear",
    "linear_geglu",
    "lm_head_argmax",
    "lm_head_draw",
    "lm_head_logits",
    "lm_head_logprob",
    "lm_head_sample",
    "magnitude_histogram",
    "rmsnorm",
    "rmsnorm_add_rmsnorm",
    "rope_cache",
    "slerp",
]
