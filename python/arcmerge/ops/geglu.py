"""geglu: the activation of Gemma-2's MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.backend import native_dtype
from arcmerge.dispatch.checks import require_activations, require_dtype_of, require_shape
from arcmerge.dispatch.registry import op
from arcmerge.errors import ArcmergeError


def geglu(gate: Tensor, up: Tensor, *, stepwise: bool = False) -> Tensor:
    """out = gelu(gate) * up, with gelu(g) = g/2 * (1 + tanh(0.7978845608028654 * (g + 0.044715 * g^3))).

    gate, up: [T, F], both bfloat16 or both float32; rows contiguous, at any distance from one another, so that the two
    may be the halves of one [T, 2F].

    Returns [T, F], contiguous, in their dtype. Arithmetic is in float32 and rounded once; with `stepwise`, as in
    transformers, gelu(gate) is rounded to the dtype before the product. Moves the bytes of gate, up and the output
    once. Raises ArcmergeError for other shapes, dtypes and strides.
    Source: Gemma2MLP of transformers with hidden_activation "gelu_pytorch_tanh".
    """
    return _geglu(gate, up, stepwise)


def _check(gate: Tensor, up: Tensor, stepwise: bool) -> None:
    require_activations(gate=gate, up=up)
    require_dtype_of("gate", gate, up=up)
    if gate.dim() != 2:
        raise ArcmergeError(f"'gate' must have the shape (T, F), got {tuple(gate.shape)}")
    require_shape(gate.shape, up=up)
    for name, tensor in (("gate", gate), ("up", up)):
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ArcmergeError(f"'{name}' must have contiguous rows, got the strides {tensor.stride()}")


def _reference(gate: Tensor, up: Tensor, stepwise: bool) -> Tensor:
    working = torch.promote_types(gate.dtype, torch.float32)
    activated = torch.nn.functional.gelu(gate.to(working), approximate="tanh")
    if stepwise:
        activated = activated.to(gate.dtype).to(working)
    return (activated * up.to(working)).to(gate.dtype).contiguous()


def _native(gate: Tensor, up: Tensor, stepwise: bool) -> Tensor:
    out = _fake(gate, up, stepwise)
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


def _triton(gate: Tensor, up: Tensor, stepwise: bool) -> Tensor:
    from arcmerge.kernels.geglu import geglu as launch

    out = _fake(gate, up, stepwise)
    if out.numel():
        launch(out, gate, up, stepwise)
    return out


def _fake(gate: Tensor, up: Tensor, stepwise: bool) -> Tensor:
    return gate.new_empty(gate.shape)


_geglu = op(
    "geglu(Tensor gate, Tensor up, bool stepwise) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    native=_native,
    triton=_triton,
)
