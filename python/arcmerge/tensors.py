"""Slerp of tensors and of state dicts in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, overload

from arcmerge.errors import ArcmergeError

if TYPE_CHECKING:
    from torch import Tensor

_MISMATCH = "'a' and 'b' must both be tensors, with a number for t, or both be mappings of tensors"
Curve = float | Callable[[str], float]


@overload
def slerp(a: Tensor, b: Tensor, t: float, *, slerp_normalize: bool = False) -> Tensor: ...
@overload
def slerp(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], t: Curve, *, slerp_normalize: bool = False
) -> dict[str, Tensor]: ...
def slerp(
    a: Tensor | Mapping[str, Tensor], b: Tensor | Mapping[str, Tensor], t: Curve, *, slerp_normalize: bool = False
) -> Tensor | dict[str, Tensor]:
    """Spherical interpolation from `a` (t = 0) to `b` (t = 1), as the merge method `slerp` has it.

    a, b: tensors (*) of one shape and device, in bfloat16, float16 or float32; or mappings of names to such tensors.
    t: not clamped; for mappings also a function of the tensor's name.
    slerp_normalize: take the direction along the arc and the length linearly between the two lengths.

    Returns new tensors of the promoted dtype, rounded once; t = 0 and t = 1 are copies to the bit. Raises
    ArcmergeError for shapes, devices or names that do not match.
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if unmatched := sorted(a.keys() ^ b.keys()):
            raise ArcmergeError(f"'b' must have the names of 'a', '{unmatched[0]}' is in one of them only")
        return {name: _slerp(a[name], b[name], t(name) if callable(t) else t, slerp_normalize, name) for name in a}
    if isinstance(a, Mapping) or isinstance(b, Mapping) or callable(t):
        raise ArcmergeError(_MISMATCH)
    return _slerp(a, b, t, slerp_normalize, "b")


def _slerp(a: Tensor, b: Tensor, given: float, slerp_normalize: bool, name: str) -> Tensor:
    import torch

    from arcmerge.merging.methods.method import Arguments
    from arcmerge.merging.methods.registry import METHODS
    from arcmerge.merging.recipe.parameters import finite
    from arcmerge.ops import combine, gram

    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        raise ArcmergeError(_MISMATCH)
    if (t := finite(given)) is None:
        raise ArcmergeError(f"'t' must be a finite number, got {given!r:.80}")
    if a.shape != b.shape:
        raise ArcmergeError(f"'{name}' must have the shape of 'a' {tuple(a.shape)}, got {tuple(b.shape)}")
    if a.device != b.device:
        raise ArcmergeError(f"'{name}' must be on the device of 'a' {a.device}, got {b.device}")
    if not a.is_floating_point() and not b.is_floating_point():
        return a.clone()  # a buffer of numbers that cannot be mixed: the base's is kept, as in a merge of checkpoints
    inputs = Arguments(count=2, base=0, shared={"t": t, "slerp_normalize": slerp_normalize})
    method, dtype = METHODS["slerp"], torch.promote_types(a.dtype, b.dtype)
    if (end := method.constant(inputs)) is not None:
        return (a, b)[int(end.values.argmax())].to(dtype, copy=True)
    try:
        coefficients = method.coefficients(gram([a, b]).numpy(force=True), inputs)
        return combine([a, b], coefficients.values.tolist(), out_dtype=dtype)
    except ArcmergeError as error:
        raise ArcmergeError([f"'{name}': {problem}" for problem in error.problems]) from error
