"""The tied head: logits = softcap * tanh(x W^T / softcap), and functions of the logits that do not keep them.

The ops take x [T, D], the weight [V, D], and:
    softcap: bound of the logits; 0 for none.
    stepwise: round to the dtype of x after the product, the quotient, the tanh and the product with softcap, as
        transformers does; on the CPU by the same calls of torch, a few rows at a time. Equal logits are then common in
        bfloat16. Otherwise products are summed and capped in float32.

Source: Gemma 2 (arXiv 2408.00118) and modeling_gemma2.py; one pass without logits in memory: Cut Cross-Entropy (arXiv
2411.09009).
"""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import require_dtype, require_head, require_same_device, shapes
from arcmerge.dispatch.native import native_dtype
from arcmerge.dispatch.registry import op

# The reference converts this many rows of the weight to float32 at a time: 150 MB of Gemma-2 2.6B, not 2.4 GB.
PART = 2**14
# Rows of x whose logits are in memory at a time where they are kept: 16 MB of Gemma-2 2.6B in float32.
ROWS = 16


@op(stepwise_by_reference=("native",))
def lm_head_logits(x: Tensor, weight: Tensor, *, softcap: float = 0.0, stepwise: bool = False) -> Tensor:
    """All logits. Takes 1 MB a row of a Gemma-2, so it is for few rows; plain torch on a GPU.

    Args:
        x: [T, D], bfloat16 or float32.
        weight: [V, D], in the dtype and on the device of x.
        softcap, stepwise: see the module.

    Returns:
        [T, V] float32.

    Raises:
        ArcmergeError: for other shapes, dtypes, devices and a negative softcap.
    """
    return logits(x, weight, softcap, stepwise)


@op()
def lm_head_argmax(x: Tensor, weight: Tensor, *, softcap: float = 0.0, stepwise: bool = False) -> Tensor:
    """The id of the largest logit of each row, the lowest among equals.

    Moves the weight once, x and the ids; on a GPU also 8 bytes for each row and 32 to 128 ids.

    Args:
        x, weight, softcap, stepwise: as in `lm_head_logits`.

    Returns:
        [T] int64.

    Raises:
        ArcmergeError: as in `lm_head_logits`.
    """
    return logits(x, weight, softcap, stepwise).argmax(dim=1)  # the first of equals, says torch


@op()
def lm_head_logprob(
    x: Tensor, weight: Tensor, ids: Tensor, *, softcap: float = 0.0, stepwise: bool = False
) -> tuple[Tensor, Tensor]:
    """The log-probability of an id for each row, logit[id] - log(sum of exp(logits)), and the id of the largest logit.

    The logarithm of the sum is taken in float32, also with stepwise. Moves the weight once, x, ids and the outputs; on
    a GPU also 12 bytes for each row and 32 to 128 ids.

    Args:
        x, weight, softcap, stepwise: as in `lm_head_logits`.
        ids: [T] int64, each below V, which is not checked.

    Returns:
        The log-probabilities, [T] float32; the ids of `lm_head_argmax`, [T] int64.

    Raises:
        ArcmergeError: as in `lm_head_logits`, and for ids of another shape, dtype or device.
    """
    every = logits(x, weight, softcap, stepwise)
    chosen = every.gather(1, ids[:, None])[:, 0]
    return chosen - every.logsumexp(dim=1), every.argmax(dim=1)


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


@lm_head_logits.check
@lm_head_argmax.check
def _check(x: Tensor, weight: Tensor, *, softcap: float, **_: object) -> None:
    require_head(x, weight, softcap)


@lm_head_logprob.check
def _check_logprob(x: Tensor, weight: Tensor, ids: Tensor, *, softcap: float, **_: object) -> None:
    T, _V = require_head(x, weight, softcap)
    shapes("T", ids=ids, T=T)
    require_dtype((torch.int64,), ids=ids)
    require_same_device(x=x, ids=ids)


@lm_head_logits.fake
def _fake_logits(x: Tensor, weight: Tensor, **_: object) -> Tensor:
    return x.new_empty(len(x), len(weight), dtype=torch.float32)


@lm_head_argmax.fake
def _fake_argmax(x: Tensor, *_: Tensor, **__: object) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


@lm_head_logprob.fake
def _fake_logprob(x: Tensor, *_: Tensor, **__: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), dtype=torch.int64)


def native_head(x: Tensor, weight: Tensor, softcap: float) -> _C.LmHead:
    """Contiguous CPU tensors for the native backend, which reads them in place."""
    return _C.LmHead(
        x.data_ptr(), weight.data_ptr(), x.shape[0], weight.shape[0], x.shape[1], native_dtype(x.dtype), softcap
    )


@lm_head_logits.native
def _native_logits(x: Tensor, weight: Tensor, *, softcap: float) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    out = _fake_logits(x, weight)
    _C.lm_head_scores(out.data_ptr(), 0, native_head(x, weight, softcap), 0, 1.0, 1.0)
    return out


@lm_head_argmax.native
def _native_argmax(x: Tensor, weight: Tensor, *, softcap: float, stepwise: bool) -> Tensor:
    if stepwise:
        return torch.cat([logits(part, weight, softcap, stepwise).argmax(dim=1) for part in x.split(ROWS)])
    x, weight = x.contiguous(), weight.contiguous()
    best = _fake_argmax(x)
    _C.lm_head_logprob(0, best.data_ptr(), native_head(x, weight, softcap), 0)
    return best


@lm_head_logprob.native
def _native_logprob(x: Tensor, weight: Tensor, ids: Tensor, *, softcap: float, stepwise: bool) -> tuple[Tensor, Tensor]:
    if stepwise:
        reference, parts = (
            lm_head_logprob.implementations["reference"],
            zip(x.split(ROWS), ids.split(ROWS), strict=True),
        )
        found = [reference(some, weight, wanted, softcap=softcap, stepwise=True) for some, wanted in parts]
        return torch.cat([logprob for logprob, _ in found]), torch.cat([best for _, best in found])
    x, weight, ids = x.contiguous(), weight.contiguous(), ids.contiguous()
    out, best = x.new_empty(len(x), dtype=torch.float32), torch.empty_like(ids)
    _C.lm_head_logprob(out.data_ptr(), best.data_ptr(), native_head(x, weight, softcap), ids.data_ptr())
    return out, best


@lm_head_argmax.triton
def _triton_argmax(x: Tensor, weight: Tensor, *, softcap: float, stepwise: bool) -> Tensor:
    from arcmerge.kernels.lm_head import Scores, argmax

    out = _fake_argmax(x)
    if len(x):
        argmax(out, Scores(x.contiguous(), weight.contiguous(), softcap, stepwise))
    return out


@lm_head_logprob.triton
def _triton_logprob(x: Tensor, weight: Tensor, ids: Tensor, *, softcap: float, stepwise: bool) -> tuple[Tensor, Tensor]:
    from arcmerge.kernels.lm_head import Scores, logprob

    out, best = _fake_logprob(x)
    if len(x):
        logprob(out, best, Scores(x.contiguous(), weight.contiguous(), softcap, stepwise), ids.contiguous())
    return out, best
