"""linear_geglu: the first half of Gemma-2's MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.backend import native_dtype
from arcmerge.dispatch.checks import require_shape
from arcmerge.dispatch.registry import op
from arcmerge.ops.geglu import geglu
from arcmerge.ops.linear import MOST_TOKENS, require_linear, torch_multiplies


def linear_geglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor, *, stepwise: bool = False) -> Tensor:
    """out = gelu(x G^T) * (x U^T), with gelu(g) = g/2 * (1 + tanh(0.7978845608028654 * (g + 0.044715 * g^3))).

    x: [T, K]. gate_weight G, up_weight U: [F, K]. All bfloat16 or all float32, on one device.

    Returns [T, F], contiguous, in their dtype. Arithmetic is in float32 and rounded once where T is at most 16. With
    `stepwise`, as in transformers, both products, gelu and the output are rounded to the dtype, and on the CPU torch.mm
    is called twice, then `geglu`; so it is past 16 rows where torch.mm serves (see `linear`), with rounded products. Up
    to 16 rows, weights, x and output are moved once, and the bits of a row of the output depend on neither the other
    rows nor their number. Raises ArcmergeError for other shapes and dtypes.
    Source: Gemma2MLP of transformers with hidden_activation "gelu_pytorch_tanh", without its down_proj.
    """
    return _linear_geglu(x, gate_weight, up_weight, stepwise)


def _check(x: Tensor, gate_weight: Tensor, up_weight: Tensor, stepwise: bool) -> None:
    require_linear(x, gate_weight=gate_weight, up_weight=up_weight)
    require_shape(gate_weight.shape, up_weight=up_weight)


def _reference(x: Tensor, gate_weight: Tensor, up_weight: Tensor, stepwise: bool) -> Tensor:
    working = torch.promote_types(x.dtype, torch.float32)
    gate, up = (x.to(working) @ weight.to(working).T for weight in (gate_weight, up_weight))
    if stepwise:
        gate, up = gate.to(x.dtype).to(working), up.to(x.dtype).to(working)
    activated = torch.nn.functional.gelu(gate, approximate="tanh")
    if stepwise:
        activated = activated.to(x.dtype).to(working)
    return (activated * up).to(x.dtype)


def _native(x: Tensor, gate_weight: Tensor, up_weight: Tensor, stepwise: bool) -> Tensor:
    if stepwise or (x.shape[0] > MOST_TOKENS and torch_multiplies(x.dtype)):
        return _activated_products(x, gate_weight, up_weight, stepwise)
    out, (tokens, columns) = _fake(x, gate_weight, up_weight, stepwise), x.shape
    x, gate_weight, up_weight = x.contiguous(), gate_weight.contiguous(), up_weight.contiguous()
    _C.linear_geglu(
        out.data_ptr(),
        x.data_ptr(),
        tokens,
        columns,
        gate_weight.data_ptr(),
        up_weight.data_ptr(),
        len(gate_weight),
        native_dtype(x.dtype),
    )
    return out


def _triton(x: Tensor, gate_weight: Tensor, up_weight: Tensor, stepwise: bool) -> Tensor:
    from arcmerge.kernels.linear_geglu import linear_geglu as launch

    if x.shape[0] > MOST_TOKENS:
        return _activated_products(x, gate_weight, up_weight, stepwise)
    out = _fake(x, gate_weight, up_weight, stepwise)
    if out.numel():
        launch(out, x.contiguous(), gate_weight.contiguous(), up_weight.contiguous(), stepwise)
    return out


def _activated_products(x: Tensor, gate_weight: Tensor, up_weight: Tensor, stepwise: bool) -> Tensor:
    return geglu(torch.mm(x, gate_weight.T), torch.mm(x, up_weight.T), stepwise=stepwise)


def _fake(x: Tensor, gate_weight: Tensor, up_weight: Tensor, stepwise: bool) -> Tensor:
    return x.new_empty(x.shape[0], gate_weight.shape[0])


_linear_geglu = op(
    "linear_geglu(Tensor x, Tensor gate_weight, Tensor up_weight, bool stepwise) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    native=_native,
    triton=_triton,
)
