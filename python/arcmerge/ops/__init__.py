"""The ops that everything is made of, on torch tensors; also torch.ops.arcmerge.<name>.

gram and combine merge; the others run a Gemma-2.
"""

from arcmerge.dispatch.recording import recorded
from arcmerge.dispatch.registry import backends
from arcmerge.ops.attention import attention
from arcmerge.ops.attention_decode import attention_decode
from arcmerge.ops.combine import combine
from arcmerge.ops.geglu import geglu
from arcmerge.ops.gram import gram
from arcmerge.ops.head import head_argmax, head_logits, head_logprob
from arcmerge.ops.linear import linear
from arcmerge.ops.linear_geglu import linear_geglu
from arcmerge.ops.rmsnorm import rmsnorm
from arcmerge.ops.rmsnorm_add_rmsnorm import rmsnorm_add_rmsnorm
from arcmerge.ops.rope_cache import rope_cache, rope_table
from arcmerge.ops.sampling import head_sample

__all__ = [
    "attention",
    "attention_decode",
    "backends",
    "combine",
    "geglu",
    "gram",
    "head_argmax",
    "head_logits",
    "head_logprob",
    "head_sample",
    "linear",
    "linear_geglu",
    "recorded",
    "rmsnorm",
    "rmsnorm_add_rmsnorm",
    "rope_cache",
    "rope_table",
]
