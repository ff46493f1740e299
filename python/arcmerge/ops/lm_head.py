"""The tied head: logits = softcap * tanh(x W^T / softcap), and what is asked of them without keeping them.

x is [T, D], weight [V, D], both bfloat16 or both float32. Products are summed and
capped in float32; softcap 0 is no cap. stepwise: round to the dtype of x after the product, the quotient, the tanh and
the product with softcap, as transformers does, on the CPU by its own calls of torch, a few rows at a time; equal logits
are then common in bfloat16. Source: Gemma 2 (arXiv 2408.00118) and modeling_gemma2.py; one pass without logits in
memory: Cut Cross-Entropy (arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.backend import native_dtype
from arcmerge.dispatch.checks import require_activations, require_dtype_of, require_shape
from arcmerge.dispatch.registry import op
from arcmerge.errors import ArcmergeError

# The reference converts this many rows of the weight to float32 at a time: 150 MB of Gemma-2 2.6B, not 2.4 GB.
PART = 2**14
# Rows whose logits are in memory at a time, where they have to be: 25 MB of Gemma-2 2.6B's.
ROWS = 16


def lm_head_logits(x: Tensor, weight: Tensor, softcap: float, stepwise: bool) -> Tensor:
    """All logits, [T, V] float32: 1 MB a row of a Gemma-2, so for few rows. Plain torch on a GPU.

    Raises ArcmergeError for operands that do not fit together.
    """
    return _head_logits(x, weight, softcap, stepwise)


def lm_head_argmax(x: Tensor, weight: Tensor, softcap: float, stepwise: bool) -> Tensor:
    """The id of the greatest logit of each row, the lowest among equals: [T] int64.

    Moves the weight once, x and the ids; on a GPU also 8 bytes for each row and 32 to 128 ids. Raises ArcmergeError
    for operands that do not fit together.
    """
    return _head_argmax(x, weight, softcap, stepwise)


def lm_head_logprob(x: Tensor, weight: Tensor, ids: Tensor, softcap: float, stepwise: bool) -> tuple[Tensor, Tensor]:
    """(logit[ids] - log(sum of exp(logits)), [T] float32; the id of the largest logit as lm_head_argmax, [T] int64).

    ids: [T] int64, each below V. The logarithm of the sum is taken in float32, also with stepwise. Moves the weight
    once, x, ids and the outputs; on a GPU also 12 bytes for each row and 32 to 128 ids. Raises ArcmergeError for
    operands that do not fit together.
    """
    return _head_logprob(x, weight, ids, softcap, stepwise)


def require_head(x: Tensor, weight: Tensor, softcap: float) -> None:
    """ArcmergeError unless x is [T, D] and weight [V, D], of one dtype and device, V > 0, and softcap is from 0 up."""
    require_activations(x=x, weight=weight)
    require_dtype_of("x", x, weight=weight)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ArcmergeError(
            f"'x' must be [T, D] and 'weight' [V, D] with the same D, got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if not len(weight):
        raise ArcmergeError("'weight' must have a row for each id, got none")
    if not 0 <= softcap < float("inf"):
        raise ArcmergeError(f"'softcap' must be above 0, or 0 for none, got {softcap}")


def require_integers(x: Tensor, shape: Sequence[int], dtype: torch.dtype, **tensors: Tensor) -> None:
    """ArcmergeError unless the tensors have this shape and dtype and are on the device of x."""
    require_shape(shape, **tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or tensor.device != x.device:
            wanted = str(dtype).removeprefix("torch.")
            raise ArcmergeError(f"'{name}' must be {wanted} on {x.device}, got {tensor.dtype} on {tensor.device}")


def _check_head(x: Tensor, weight: Tensor, softcap: float, stepwise: bool) -> None:
    require_head(x, weight, softcap)


def _check_logprob(x: Tensor, weight: Tensor, ids: Tensor, softcap: float, stepwise: bool) -> None:
    require_head(x, weight, softcap)
    require_integers(x, (len(x),), torch.int64, ids=ids)


def logits(x: Tensor, weight: Tensor, softcap: float, stepwise: bool) -> Tensor:
    """The definition: [T, V] float32, or float64 of float64 operands."""
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    if stepwise:
        products = torch.nn.functional.linear(x, weight)
    else:
        products = torch.cat([x.to(working) @ part.to(working).mT for part in weight.split(PART)], dim=1)
    if softcap:
        products = (products / softcap).tanh() * softcap
    return products.to(working)


def _reference_argmax(x: Tensor, weight: Tensor, softcap: float, stepwise: bool) -> Tensor:
    return logits(x, weight, softcap, stepwise).argmax(dim=1)  # the first of equals, says torch


def _reference_logprob(x: Tensor, weight: Tensor, ids: Tensor, softcap: float, stepwise: bool) -> tuple[Tensor, Tensor]:
    every = logits(x, weight, softcap, stepwise)
    chosen = every.gather(1, ids[:, None])[:, 0]
    return chosen - every.logsumexp(dim=1), every.argmax(dim=1)


def native_head(x: Tensor, weight: Tensor, softcap: float) -> _C.Head:
    """Contiguous CPU tensors for the native backend, which reads them in place."""
    return _C.Head(x.data_ptr(), weight.data_ptr(), len(x), len(weight), x.shape[1], native_dtype(x.dtype), softcap)


def _native_logits(x: Tensor, weight: Tensor, softcap: float, stepwise: bool) -> Tensor:
    if stepwise:
        return logits(x, weight, softcap, stepwise)
    x, weight = x.contiguous(), weight.contiguous()
    out = x.new_empty(len(x), len(weight), dtype=torch.float32)
    _C.head_scores(out.data_ptr(), 0, native_head(x, weight, softcap), 0, 1.0, 1.0)
    return out


def _native_argmax(x: Tensor, weight: Tensor, softcap: float, stepwise: bool) -> Tensor:
    if stepwise:
        return torch.cat([_reference_argmax(part, weight, softcap, stepwise) for part in x.split(ROWS)])
    x, weight = x.contiguous(), weight.contiguous()
    best = x.new_empty(len(x), dtype=torch.int64)
    _C.lm_head_logprob(0, best.data_ptr(), native_head(x, weight, softcap), 0)
    return best


def _native_logprob(x: Tensor, weight: Tensor, ids: Tensor, softcap: float, stepwise: bool) -> tuple[Tensor, Tensor]:
    if stepwise:
        parts = zip(x.split(ROWS), ids.split(ROWS), strict=True)
        found = [_reference_logprob(some, weight, wanted, softcap, stepwise) for some, wanted in parts]
        return torch.cat([logprob for logprob, _ in found]), torch.cat([best for _, best in found])
    x, weight, ids = x.contiguous(), weight.contiguous(), ids.contiguous()
    out, best = x.new_empty(len(x), dtype=torch.float32), torch.empty_like(ids)
    _C.lm_head_logprob(out.data_ptr(), best.data_ptr(), native_head(x, weight, softcap), ids.data_ptr())
    return out, best


def _triton_argmax(x: Tensor, weight: Tensor, softcap: float, stepwise: bool) -> Tensor:
    from arcmerge.kernels.lm_head import Scores, argmax

    out = x.new_empty(len(x), dtype=torch.int64)
    if len(x):
        argmax(out, Scores(x.contiguous(), weight.contiguous(), softcap, stepwise))
    return out


def _triton_logprob(x: Tensor, weight: Tensor, ids: Tensor, softcap: float, stepwise: bool) -> tuple[Tensor, Tensor]:
    from arcmerge.kernels.lm_head import Scores, logprob

    out, best = x.new_empty(len(x), dtype=torch.float32), torch.empty_like(ids)
    if len(x):
        logprob(out, best, Scores(x.contiguous(), weight.contiguous(), softcap, stepwise), ids.contiguous())
    return out, best


_head_logits = op(
    "lm_head_logits(Tensor x, Tensor weight, float softcap, bool stepwise) -> Tensor",
    check=_check_head,
    reference=logits,
    fake=lambda x, weight, softcap, stepwise: x.new_empty(len(x), len(weight), dtype=torch.float32),
    native=_native_logits,
)

_head_argmax = op(
    "lm_head_argmax(Tensor x, Tensor weight, float softcap, bool stepwise) -> Tensor",
    check=_check_head,
    reference=_reference_argmax,
    fake=lambda x, weight, softcap, stepwise: x.new_empty(len(x), dtype=torch.int64),
    native=_native_argmax,
    triton=_triton_argmax,
)

_head_logprob = op(
    "lm_head_logprob(Tensor x, Tensor weight, Tensor ids, float softcap, bool stepwise) -> (Tensor, Tensor)",
    check=_check_logprob,
    reference=_reference_logprob,
    fake=lambda x, weight, ids, softcap, stepwise: (x.new_empty(len(x), dtype=torch.float32), ids.new_empty(len(x))),
    native=_native_logprob,
    triton=_triton_logprob,
)
