"""What the ops of a network ask of their tensors, in the sentences that the user reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge.errors import ArcmergeError

ACTIVATIONS = (torch.bfloat16, torch.float32)


def require_activations(**tensors: Tensor) -> None:
    """bfloat16 or float32, and all on the device of the first; ArcmergeError if not."""
    (first_name, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dtype not in ACTIVATIONS:
            raise ArcmergeError(f"'{name}' must be bfloat16 or float32, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ArcmergeError(f"'{name}' must be on the device of '{first_name}' {first.device}, got {tensor.device}")


def require_dtype_of(first_name: str, first: Tensor, **tensors: Tensor) -> None:
    """The dtype of `first` in all; ArcmergeError if not."""
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise ArcmergeError(f"'{name}' must have the dtype of '{first_name}' {first.dtype}, got {tensor.dtype}")


def require_shape(shape: Sequence[int], **tensors: Tensor) -> None:
    """ArcmergeError if a tensor has another shape."""
    for name, tensor in tensors.items():
        if tensor.shape != torch.Size(shape):
            raise ArcmergeError(f"'{name}' must have the shape {tuple(shape)}, got {tuple(tensor.shape)}")
