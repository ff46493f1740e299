"""linear_geglu: the first half of Gemma-2's MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import require_activations, require_same_dtype, shapes
from arcmerge.dispatch.native import native_dtype
from arcmerge.dispatch.registry import op
from arcmerge.ops.geglu import geglu
from arcmerge.ops.linear import MAX_ROWS, side_by_side, torch_multiplies

# On a GPU for bfloat16. Two weights of one launch share the reads of more rows of x than a single one can afford, and
# the rounded products, which torch.mm writes and `geglu` reads, stay in registers.
MAX_ROWS_ON_GPU = 64


@op()
def linear_geglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor, *, stepwise: bool = False) -> Tensor:
    """out = gelu(x G^T) * (x U^T), with gelu(g) = g/2 * (1 + tanh(0.7978845608028654 * (g + 0.044715 * g^3))).

    Up to T = 16, in bfloat16 on a GPU 64, arithmetic is in float32 and rounded once; weights, x and output are moved
    once, and the bits of a row of the output depend on neither the other rows nor their number, except that they may
    differ between at most 16 rows and more. For larger T, where `linear` calls torch.mm, so does this op, twice, or as
    `linear` does once, followed by `geglu`: the products are then rounded.
    Source: Gemma2MLP of transformers with hidden_activation "gelu_pytorch_tanh", without its down_proj.

    Args:
        x: [T, K], bfloat16 or float32.
        gate_weight, up_weight: G and U, [F, K], in the dtype and on the device of x.
        stepwise: round both products, gelu and the output to the dtype, as transformers does; by torch.mm on the CPU
            for any T, on a GPU above 16.

    Returns:
        [T, F], contiguous, in the dtype of x.

    Raises:
        ArcmergeError: for other shapes, dtypes and devices.
    """
    working = torch.promote_types(x.dtype, torch.float32)
    gate, up = (x.to(working) @ weight.to(working).T for weight in (gate_weight, up_weight))
    if stepwise:
        gate, up = gate.to(x.dtype).to(working), up.to(x.dtype).to(working)
    activated = torch.nn.functional.gelu(gate, approximate="tanh")
    if stepwise:
        activated = activated.to(x.dtype).to(working)
    return (activated * up).to(x.dtype)


@linear_geglu.check
def _check(x: Tensor, gate_weight: Tensor, up_weight: Tensor, **_: object) -> None:
    require_activations(x=x, gate_weight=gate_weight, up_weight=up_weight)
    require_same_dtype(x=x, gate_weight=gate_weight, up_weight=up_weight)
    shapes("T K, F K, F K", x=x, gate_weight=gate_weight, up_weight=up_weight)


@linear_geglu.fake
def _fake(x: Tensor, gate_weight: Tensor, *_: Tensor, **__: object) -> Tensor:
    return x.new_empty(x.shape[0], gate_weight.shape[0])


@linear_geglu.native
def _native(*tensors: Tensor, stepwise: bool) -> Tensor:
    rows, columns = tensors[0].shape
    if stepwise or (rows > MAX_ROWS and torch_multiplies(tensors[0].dtype)):
        return _activated_products(*tensors, stepwise=stepwise)
    out = _fake(*tensors)
    x, gate_weight, up_weight = (tensor.contiguous() for tensor in tensors)
    _C.linear_geglu(
        out.data_ptr(),
        x.data_ptr(),
        rows,
        columns,
        gate_weight.data_ptr(),
        up_weight.data_ptr(),
        gate_weight.shape[0],
        native_dtype(x.dtype),
    )
    return out


@linear_geglu.triton
def _triton(*tensors: Tensor, stepwise: bool) -> Tensor:
    from arcmerge.kernels.linear_geglu import linear_geglu as launch

    kernel_multiplies = tensors[0].dtype == torch.bfloat16 and not stepwise
    if len(tensors[0]) > (MAX_ROWS_ON_GPU if kernel_multiplies else MAX_ROWS):
        whole = None if stepwise else side_by_side(tensors[1:])
        if whole is None:
            return _activated_products(*tensors, stepwise=stepwise)
        return geglu(*torch.mm(tensors[0], whole.T).chunk(2, dim=1))
    out = _fake(*tensors)
    if out.numel():
        x, gate_weight, up_weight = (tensor.contiguous() for tensor in tensors)
        launch(out, x, gate_weight, up_weight, stepwise)
    return out


def _activated_products(x: Tensor, gate_weight: Tensor, up_weight: Tensor, *, stepwise: bool) -> Tensor:
    return geglu(torch.mm(x, gate_weight.T), torch.mm(x, up_weight.T), stepwise=stepwise)
