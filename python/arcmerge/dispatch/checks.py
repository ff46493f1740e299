"""Checks of the arguments of ops. Each raises ArcmergeError for an argument that breaks its rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from arcmerge.dtypes import MERGEABLE
from arcmerge.errors import ArcmergeError

ACTIVATIONS = (torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128, 256)
WEIGHTS: tuple[torch.dtype, ...] = tuple(getattr(torch, dtype.name) for dtype in MERGEABLE)


def require(met: bool, name: str, rule: str, value: object) -> None:
    """Raise ArcmergeError, "'name' must RULE, got VALUE", unless the rule is met."""
    if not met:
        raise ArcmergeError(f"'{name}' must {rule}, got {value}")


def _any_of(values: Sequence[object]) -> str:
    """ "a, b or c"."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


# ---- shapes


def shapes(letters: str, **named: Any) -> list[int]:
    """Check the shapes of tensors against letters, as in einsum, and return the sizes of the letters.

    Args:
        letters: the shape of each tensor, as "T K, M K": a letter or word for each dimension, the same where sizes must
            be equal. "..." in front stands for any number of dimensions.
        named: the tensors, by the names of their parameters, in the order of their shapes. A keyword that is one of the
            letters is the size that the letter must have.

    Returns:
        The size of each letter in the order in which they first appear, without "...".

    Raises:
        ArcmergeError: "'key' must have the shape [T, Hkv, Dh] = [7, *, 256], got [6, 4, 256]".

    Example:
        >>> T, H, Dh, Hkv = shapes("T H Dh, T Hkv Dh, T Hkv Dh", query=query, key=key, value=value)
        >>> shapes("T", positions=positions, T=T)
    """
    specs, free = _split(letters)
    sizes: dict[str, Any] = {}
    if len(named) > len(specs):
        for letter in free:
            if letter in named:
                sizes[letter] = named.pop(letter)
    for (dims, leading), (name, tensor) in zip(specs, named.items(), strict=True):
        shape, known = tuple(tensor.shape), len(sizes)
        rest = len(shape) - len(dims)
        if leading and rest >= 0:
            first, shape = shape[:rest], shape[rest:]
            rest = sizes.setdefault("...", first) != first
        if rest or tuple(map(sizes.setdefault, dims, shape)) != shape:
            raise _mismatch(name, tensor, dims, leading, sizes, known)
    return [*map(sizes.__getitem__, free)]


@lru_cache
def _split(letters: str) -> tuple[list[tuple[list[str], bool]], list[str]]:
    """The letters of each tensor and whether "..." is in front of them; all letters."""
    specs = [([dim for dim in dims.split() if dim != "..."], "..." in dims) for dims in letters.split(",")]
    return specs, list(dict.fromkeys(letter for dims, _ in specs for letter in dims))


def _mismatch(
    name: str, tensor: Tensor, dims: Sequence[str], leading: bool, sizes: Mapping[str, Any], known: int
) -> ArcmergeError:
    """The error of a tensor, before which the first `known` sizes were known."""
    before = dict(list(sizes.items())[:known])
    rule = ["..."] * leading + [*dims]
    wanted = [str(before.get(dim, "*")) for dim in dims]
    if leading:
        wanted[:0] = map(str, before.get("...", ["..."]))
    equal = f" = [{', '.join(wanted)}]" if any(dim in before for dim in rule) else ""
    return ArcmergeError(f"'{name}' must have the shape [{', '.join(rule)}]{equal}, got {list(tensor.shape)}")


def require_contiguous(**tensors: Tensor) -> None:
    """Check that tensors are contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ArcmergeError(f"'{name}' must be contiguous, got the strides {tensor.stride()}")


def require_contiguous_rows(**tensors: Tensor) -> None:
    """Check that every row of the first dimension is contiguous; rows may be at any distance."""
    for name, tensor in tensors.items():
        expected = 1
        for size, stride in reversed(list(zip(tensor.shape, tensor.stride(), strict=True))[1:]):
            if stride != expected and size > 1 and tensor.numel():
                raise ArcmergeError(f"'{name}' must have contiguous rows, got the strides {tensor.stride()}")
            expected *= size


# ---- dtypes and devices


def require_dtype(dtypes: Sequence[torch.dtype], **named: Tensor | torch.dtype) -> None:
    """Check that tensors, or dtypes, have one of some dtypes."""
    for name, value in named.items():
        dtype = value.dtype if isinstance(value, Tensor) else value
        if dtype not in dtypes:
            require(False, name, f"be {_any_of([*map(_name, dtypes)])}", _name(dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_same_dtype(**tensors: Tensor) -> None:
    """Check that all tensors have the dtype of the first."""
    (first_name, first), *others = tensors.items()
    dtype = first.dtype
    for name, tensor in others:
        if tensor.dtype != dtype:
            raise ArcmergeError(
                f"'{name}' must have the dtype of '{first_name}', {_name(dtype)}, got {_name(tensor.dtype)}"
            )


def require_same_device(**tensors: Tensor) -> None:
    """Check that all tensors are on the device of the first."""
    (first_name, first), *others = tensors.items()
    device = first.device
    for name, tensor in others:
        if tensor.device != device:
            raise ArcmergeError(f"'{name}' must be on the device of '{first_name}', {device}, got {tensor.device}")


def require_activations(**tensors: Tensor) -> None:
    """Check that all tensors are bfloat16 or float32, and on one device."""
    device = next(iter(tensors.values())).device
    for tensor in tensors.values():
        if tensor.dtype not in ACTIVATIONS or tensor.device != device:
            require_dtype(ACTIVATIONS, **tensors)
            require_same_device(**tensors)


# ---- what several ops share


def require_alike(tensors: Sequence[Tensor], base: Tensor | None = None) -> None:
    """Check that tensors, and a base, have one shape and device, and are bfloat16, float16 or float32."""
    if not tensors:
        require(False, "tensors", "be 1 or more tensors", 0)
    first, named = tensors[0], {f"tensors[{index}]": tensor for index, tensor in enumerate(tensors)}
    if base is not None:
        named["base"] = base
    for name, tensor in named.items():
        if tensor.shape != first.shape:
            require(False, name, f"have the shape of 'tensors[0]', {list(first.shape)}", list(tensor.shape))
        if tensor.dtype not in WEIGHTS or tensor.device != first.device:
            require_dtype(WEIGHTS, **named)
            require_same_device(**named)


def require_matrix_dim(tensor: Tensor, dim: int | None) -> None:
    """Check that `dim` is None or a dimension of a matrix."""
    if dim is not None and (tensor.dim() != 2 or dim not in (-2, -1, 0, 1)):
        raise ArcmergeError(f"'dim' must be 0 or 1 of matrices, got {dim} with the shape {list(tensor.shape)}")


def require_caches(key_cache: Tensor, value_cache: Tensor, **states: Tensor) -> list[int]:
    """Check two caches [B, Hkv, S, Dh] and the states that they are for: all contiguous, of one dtype, on one device.

    Returns:
        B, Hkv, S and Dh.
    """
    tensors = {**states, "key_cache": key_cache, "value_cache": value_cache}
    require_activations(**tensors)
    require_same_dtype(**tensors)
    sizes = shapes("B Hkv S Dh, B Hkv S Dh", key_cache=key_cache, value_cache=value_cache)
    if sizes[3] not in HEAD_DIMS:
        require(False, "key_cache", f"have heads of {_any_of(HEAD_DIMS)} elements", sizes[3])
    require_contiguous(**tensors)
    return sizes


def require_lengths(key_cache: Tensor, **lengths: Tensor) -> None:
    """Check that lengths are int32, contiguous and on the device of the caches."""
    require_dtype((torch.int32,), **lengths)
    require_contiguous(**lengths)
    require_same_device(key_cache=key_cache, **lengths)


def require_heads(heads: int, key_value_heads: int) -> None:
    """Check that the query heads share the key-value heads evenly."""
    if heads < 1 or heads % key_value_heads:
        require(False, "heads", f"be a multiple of the {key_value_heads} key-value heads", heads)


def require_limits(softcap: float, window: int) -> None:
    """Check that softcap and window are not negative."""
    if softcap < 0 or window < 0:
        require(softcap >= 0, "softcap", "be 0 (no cap) or more", softcap)
        require(window >= 0, "window", "be 0 (no window) or more", window)


def require_slots(slots: int, longest: int, window: int, new: int) -> None:
    """Check that a cache has a slot for every token of the longest sequence, or for all that `new` queries see."""
    needed = min(longest, window + new - 1) if window else longest
    if slots < needed:
        require(False, "key_cache", f"have {needed} slots or more for {longest} tokens", slots)


def require_head(x: Tensor, weight: Tensor, softcap: float) -> tuple[int, int]:
    """Check hidden states x [T, D] and the weight [V, D] of a head, and the cap of its logits.

    Returns:
        T and V.
    """
    require_activations(x=x, weight=weight)
    require_same_dtype(x=x, weight=weight)
    T, _, V = shapes("T D, V D", x=x, weight=weight)
    require(V > 0, "weight", "have a row for each id", "none")
    require(0 <= softcap < float("inf"), "softcap", "be 0 (no cap) or more, and finite", softcap)
    return T, V
