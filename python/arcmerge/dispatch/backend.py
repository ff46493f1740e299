"""Which code serves an op: the first of an ordered list that can work on the tensors' device.

ARCMERGE_BACKEND names the one that must serve; if it cannot, the op raises.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arcmerge import _C
from arcmerge.dtypes import BY_NAME, MERGEABLE
from arcmerge.errors import ArcmergeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Backend:
    """objection: given a device type, why the backend cannot serve tensors there, or None. detail: what it runs on."""

    name: str
    objection: Callable[[str], str | None]
    detail: Callable[[], str]


def _against_native(device: str) -> str | None:
    return None if device == "cpu" else f"it works on the cpu, not on {device}"


def _against_triton(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"it works on cuda (on the cpu with TRITON_INTERPRET=1), not on {device}"


BACKENDS = (
    Backend("native", _against_native, lambda: f"{_C.variant()} code"),
    Backend("triton", _against_triton, lambda: "kernels compiled on first use"),
    Backend("reference", lambda device: None, lambda: "plain torch"),
)


def choose(device: str, op: str, offered: Collection[str]) -> Backend:
    """The backend for tensors on a device type, among those that an op offers.

    Raises ArcmergeError if ARCMERGE_BACKEND names one that cannot serve.
    """
    forced = os.environ.get("ARCMERGE_BACKEND")
    if forced is None:
        return next(backend for backend in BACKENDS if _objection(backend, device, op, offered) is None)
    for backend in BACKENDS:
        if backend.name == forced:
            if objection := _objection(backend, device, op, offered):
                raise ArcmergeError(f"ARCMERGE_BACKEND={forced} cannot serve: {objection}")
            return backend
    names = ", ".join(backend.name for backend in BACKENDS)
    raise ArcmergeError(f"ARCMERGE_BACKEND must be one of {names}, got '{forced}'")


def _objection(backend: Backend, device: str, op: str, offered: Collection[str]) -> str | None:
    return backend.objection(device) if backend.name in offered else f"it has no {op}"


def explain(device: str, op: str, offered: Collection[str]) -> str:
    """What serves an op on a device type, and why, in words."""
    try:
        chosen = choose(device, op, offered)
    except ArcmergeError as error:
        return str(error)
    if "ARCMERGE_BACKEND" in os.environ:
        return f"{chosen.name} ({chosen.detail()}): forced by ARCMERGE_BACKEND"
    passed_over = [
        f"{backend.name} not, as {_objection(backend, device, op, offered)}"
        for backend in BACKENDS[: BACKENDS.index(chosen)]
    ]
    return "; ".join([f"{chosen.name} ({chosen.detail()})", *passed_over])


def require_alike(tensors: Sequence[Tensor], base: Tensor | None = None) -> None:
    """1 to 8 tensors, and a base, of one shape and device, in bfloat16, float16 or float32; ArcmergeError if not."""
    if not 1 <= len(tensors) <= _C.MAX_OPERANDS:
        raise ArcmergeError(f"'tensors' must be 1 to {_C.MAX_OPERANDS} tensors, got {len(tensors)}")
    named = {f"'tensors[{number}]'": tensor for number, tensor in enumerate(tensors)}
    if base is not None:
        named["'base'"] = base
    first = tensors[0]
    for name, tensor in named.items():
        if tensor.shape != first.shape:
            shape = tuple(first.shape)
            raise ArcmergeError(f"{name} must have the shape of 'tensors[0]' {shape}, got {tuple(tensor.shape)}")
        if tensor.device != first.device:
            raise ArcmergeError(f"{name} must be on the device of 'tensors[0]' {first.device}, got {tensor.device}")
        require_dtype(name, tensor.dtype)


def require_dtype(name: str, dtype: torch.dtype) -> None:
    """Raises ArcmergeError for a torch.dtype that no backend takes."""
    names = [mergeable.name for mergeable in MERGEABLE]
    if str(dtype).removeprefix("torch.") not in names:
        raise ArcmergeError(f"{name} must be {', '.join(names[:-1])} or {names[-1]}, got {dtype}")


def require_matrix_dim(tensor: Tensor, dim: int) -> int:
    """`dim` as 0 or 1 of a matrix; ArcmergeError if the tensor is not one or has no such dimension."""
    if tensor.dim() != 2 or dim not in (-2, -1, 0, 1):
        raise ArcmergeError(f"'dim' must be 0 or 1 of matrices, got {dim} with the shape {tuple(tensor.shape)}")
    return dim % 2


def native_dtype(dtype: torch.dtype) -> int:
    """The number by which the native backend knows a torch.dtype."""
    return BY_NAME[str(dtype).removeprefix("torch.")].native


def operand(tensor: Tensor) -> _C.Operand:
    """A contiguous CPU tensor for the native backend, which reads it in place."""
    return _C.Operand(tensor.data_ptr(), native_dtype(tensor.dtype))


def native_cache(key_cache: Tensor, value_cache: Tensor) -> _C.Cache:
    """Contiguous (B, Hkv, S, Dh) on the CPU for the native backend, which reads and writes them in place."""
    sequences, heads, slots, head_dim = key_cache.shape
    dtype = native_dtype(key_cache.dtype)
    return _C.Cache(key_cache.data_ptr(), value_cache.data_ptr(), sequences, heads, slots, head_dim, dtype)
