"""geglu: the activation of Gemma-2's MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import require_activations, require_contiguous_rows, require_same_dtype, shapes
from arcmerge.dispatch.native import native_dtype
from arcmerge.dispatch.registry import op


@op()
def geglu(gate: Tensor, up: Tensor, *, stepwise: bool = False) -> Tensor:
    """out = gelu(gate) * up, with gelu(g) = g/2 * (1 + tanh(0.7978845608028654 * (g + 0.044715 * g^3))).

    Arithmetic is in float32 and rounded once. Moves the bytes of gate, up and the output once.
    Source: Gemma2MLP of transformers with hidden_activation "gelu_pytorch_tanh".

    Args:
        gate, up: [T, F], both bfloat16 or both float32; rows contiguous, at any distance from one another, so that the
            two may be the halves of one [T, 2F].
        stepwise: round gelu(gate) to the dtype before the product, as transformers does.

    Returns:
        [T, F], contiguous, in the dtype of gate.

    Raises:
        ArcmergeError: for other shapes, dtypes, devices and strides.
    """
    working = torch.promote_types(gate.dtype, torch.float32)
    activated = torch.nn.functional.gelu(gate.to(working), approximate="tanh")
    if stepwise:
        activated = activated.to(gate.dtype).to(working)
    return (activated * up.to(working)).to(gate.dtype).contiguous()


@geglu.check
def _check(gate: Tensor, up: Tensor, **_: object) -> None:
    require_activations(gate=gate, up=up)
    require_same_dtype(gate=gate, up=up)
    shapes("T F, T F", gate=gate, up=up)
    require_contiguous_rows(gate=gate, up=up)


@geglu.fake
def _fake(gate: Tensor, *_: Tensor, **__: object) -> Tensor:
    return gate.new_empty(gate.shape)


@geglu.native
def _native(gate: Tensor, up: Tensor, *, stepwise: bool) -> Tensor:
    out = _fake(gate)
    rows, columns = out.shape
    _C.geglu(
        out.data_ptr(),
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        rows,
        columns,
        native_dtype(out.dtype),
        stepwise,
    )
    return out


@geglu.triton
def _triton(gate: Tensor, up: Tensor, *, stepwise: bool) -> Tensor:
    from arcmerge.kernels.geglu import geglu as launch

    out = _fake(gate)
    if out.numel():
        launch(out, gate, up, stepwise)
    return out
