"""Merges of tensors and state dicts in memory: `slerp` and `merge_state_dicts`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from arcmerge.errors import ArcmergeError, first_of
from arcmerge.merging.execution.cpu.native import measured, write
from arcmerge.merging.execution.statistics_pass import added_up, joined
from arcmerge.merging.execution.work_units import cut
from arcmerge.merging.methods import registry
from arcmerge.merging.methods.measure import Counts, Divergences, Gram, Measure, Statistic
from arcmerge.merging.methods.method import Arguments, Method, copy_of
from arcmerge.merging.methods.rule import Array, Coefficients, Rule
from arcmerge.merging.recipe.parameters import REQUIRED, Scalar, finite
from arcmerge.merging.recipe.seed import read_seed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Curve = float | Callable[[str], float]
Value = Scalar | Sequence[Scalar | None]


@overload
def slerp(a: Tensor, b: Tensor, t: float, *, slerp_normalize: bool = False) -> Tensor: ...
@overload
def slerp(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], t: Curve, *, slerp_normalize: bool = False
) -> dict[str, Tensor]: ...
def slerp(
    a: Tensor | Mapping[str, Tensor], b: Tensor | Mapping[str, Tensor], t: Curve, *, slerp_normalize: bool = False
) -> Tensor | dict[str, Tensor]:
    """Interpolate spherically from `a` (t = 0) to `b` (t = 1), as the merge method `slerp` does.

    Args:
        a: a tensor (*) in bfloat16, float16 or float32, or a state dict of such tensors.
        b: a tensor of the same shape and device, or a state dict with the same names.
        t: position between a and b. It is not clamped. For state dicts also a function of the name of the tensor.
        slerp_normalize: interpolate the directions on the arc and the lengths linearly.

    Returns:
        New tensors of the promoted dtype, rounded once. t = 0 and t = 1 copy every bit. On a GPU see the op `slerp`,
        which merges all tensors together: they share an allocation, and the payload of a NaN may change.

    Raises:
        ArcmergeError: for shapes, devices or names that do not match.

    Example:
        >>> merged = arcmerge.slerp(a.state_dict(), b.state_dict(), lambda name: 0.7 if "mlp" in name else 0.3)
        >>> model.load_state_dict(merged)
        <All keys matched successfully>
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if unmatched := sorted(a.keys() ^ b.keys()):
            raise ArcmergeError(f"'b' must have the names of 'a', got {first_of(unmatched)} in one of them only")
        return _slerp(
            {name: _slerp_job(a[name], b[name], t(name) if callable(t) else t, slerp_normalize, name) for name in a}
        )
    if isinstance(a, Mapping) or isinstance(b, Mapping) or callable(t):
        raise _mismatch(a, b, t)
    return _slerp({"b": _slerp_job(a, b, t, slerp_normalize, "b")})["b"]


def merge_state_dicts(
    models: Sequence[Mapping[str, Tensor]],
    method: str,
    *,
    base: Mapping[str, Tensor] | None = None,
    parameters: Mapping[str, Value | Callable[[str], Value]] | None = None,
    random_seed: int | None = None,
) -> dict[str, Tensor]:
    """Merge state dicts by any merge method, one tensor at a time.

    On the CPU the result has the bits of `arcmerge.merge` for checkpoints with these tensors. Unlike that function,
    this one knows nothing about architectures: tensors are matched by name, and a gradient over layers is a function of
    the name. NaN and infinity are not refused.

    Args:
        models: state dicts with the same names, shapes and devices. Tensors of floating point must be in bfloat16,
            float16 or float32; all others are copied from the base, or from the first model if there is none.
        method: name of a merge method, such as "slerp", "linear" or "task_arithmetic".
        base: the base model: one of `models`, or one more state dict.
        parameters: parameters of the method by name. A value is a number or a switch, a sequence with one value for
            each of `models` if the parameter has one for each input (such as `weight`), or a function from the name of
            a tensor to such a value.
        random_seed: seed of methods that draw random numbers. Default: 0.

    Returns:
        A state dict of new tensors of the promoted dtypes, rounded once.

    Raises:
        ArcmergeError: for names, shapes, devices, or parameters that are wrong.

    Example:
        >>> merged = arcmerge.merge_state_dicts(
        ...     [math.state_dict(), code.state_dict()],
        ...     "task_arithmetic",
        ...     base=pretrained.state_dict(),
        ...     parameters={"weight": [1.0, 0.5], "lambda": 0.8},
        ... )
        >>> model.load_state_dict(merged)
        <All keys matched successfully>
    """
    chosen, given, seed = registry.get(method), parameters or {}, read_seed(random_seed, "random_seed")
    base_index = next((index for index, model in enumerate(models) if model is base), None)
    inputs = list(models)
    if base is not None and base_index is None:
        base_index = len(inputs)
        inputs.append(base)
    known = [parameter.name for parameter in chosen.parameters]
    if unknown := [name for name in given if name not in known]:
        raise ArcmergeError(f"'parameters' must be among {', '.join(known) or 'none'}, got {first_of(unknown)}")
    if not models:
        raise ArcmergeError("'models' must have 1 or more state dicts, got 0")
    for model in inputs[1:]:
        if unmatched := sorted(model.keys() ^ inputs[0].keys()):
            raise ArcmergeError(f"'models' must have the same names, got {first_of(unmatched)} in some of them only")
    jobs = {}
    for name in inputs[0]:
        tensors = [model[name] for model in inputs]
        arguments = replace(_arguments(chosen, name, len(models), len(inputs), base_index, given), seed=seed)
        if problems := chosen.check(arguments):
            raise ArcmergeError([f"'{name}': {problem}" for problem in problems])
        jobs[name] = _job(tensors, chosen, arguments, name)
    found = _measured_together(jobs)
    merged = _merged_on_gpus(jobs, found)
    return {name: merged[name] if name in merged else _merge(job, found[name]) for name, job in jobs.items()}


def _arguments(
    method: Method,
    name: str,
    model_count: int,
    count: int,
    base: int | None,
    given: Mapping[str, Value | Callable[[str], Value]],
) -> Arguments:
    """The arguments of a method for the tensor `name`."""
    shared: dict[str, Any] = {}
    per_input: dict[str, tuple[Any, ...]] = {}
    for parameter in method.parameters:
        value: Any = given.get(parameter.name)
        value = value(name) if callable(value) else value
        if value is None and parameter.default is REQUIRED:
            raise ArcmergeError(f"'{parameter.name}' must have a value for {name}, got none")
        value = parameter.default if value is None else value
        values: list[Any] = [value] * count
        if isinstance(value, Sequence) and not isinstance(value, str):
            if parameter.scope == "shared" or len(value) != model_count:
                rule = "one value" if parameter.scope == "shared" else f"one value for each of {model_count} models"
                raise ArcmergeError(f"'{parameter.name}' must have {rule}, got {len(value)} values")
            values = [*value, *[None] * (count - model_count)]
        converted = [
            None if parameter.scope == "non_base" and index == base else parameter.read(one, parameter.name)
            for index, one in enumerate(values)
        ]
        if parameter.scope == "shared":
            shared[parameter.name] = converted[0]
        else:
            per_input[parameter.name] = tuple(converted)
    return Arguments(count, base, shared, per_input)


@dataclass(frozen=True, eq=False)
class _Job:
    """The merge of the tensors of one name.

    Args:
        tensors: the inputs.
        method: the merge method.
        arguments: its arguments.
        dtype: the dtype of the result.
        constant: the coefficients, if they do not depend on the weights.
    """

    tensors: Sequence[Tensor]
    method: Method
    arguments: Arguments
    dtype: torch.dtype
    constant: Coefficients | None

    @property
    def is_measured(self) -> bool:
        """Whether the rule depends on the weights."""
        return self.dtype.is_floating_point and self.constant is None and self.tensors[0].numel() > 0


def _job(tensors: Sequence[Tensor], method: Method, arguments: Arguments, name: str) -> _Job:
    """The job of the tensors that are called `name`, which are checked."""
    import torch

    from arcmerge.dispatch.checks import require_alike

    for tensor in tensors[1:]:
        if tensor.shape != tensors[0].shape:
            shapes = f"{tuple(tensors[0].shape)} and {tuple(tensor.shape)}"
            raise ArcmergeError(f"'{name}' must have the same shape in all models, got {shapes}")
        if tensor.device != tensors[0].device:
            devices = f"{tensors[0].device} and {tensor.device}"
            raise ArcmergeError(f"'{name}' must be on the same device in all models, got {devices}")
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    constant = method.constant(arguments)
    if method.idempotent and all(tensor is tensors[0] for tensor in tensors):
        constant = copy_of(0, arguments)
    arguments = replace(
        arguments,
        tensor=name,
        rounded=dtype == torch.bfloat16,
        matrix=tensors[0].ndim > 1,
        elements=tensors[0].numel(),
    )
    job = _Job(tensors, method, arguments, dtype, constant)
    if job.is_measured:
        with _named(name):
            require_alike(tensors)
    return job


def _measured_together(jobs: Mapping[str, _Job]) -> dict[str, list[Statistic]]:
    """What the first measures of each tensor find, as long as tensors are measured together."""
    found: dict[str, list[Statistic]] = {name: [] for name in jobs}
    waiting = {name: job for name, job in jobs.items() if job.is_measured}
    while waiting:
        measures = {name: job.method.measure(found[name], job.arguments) for name, job in waiting.items()}
        statistics = {
            name: _measured(waiting[name], measure)
            for name, measure in measures.items()
            if measure is not None and measure.together is not None
        }
        for name, total in added_up(statistics).items():
            found[name].append(total)
        waiting = {name: waiting[name] for name in statistics}
    return found


def _merge(job: _Job, found: Sequence[Statistic] = ()) -> Tensor:
    """Merge tensors, with the arithmetic and the bits of a merge of checkpoints, from what measures have found."""
    import torch

    from arcmerge.dispatch.native import native_dtype, operand
    from arcmerge.ops import combine

    tensors, arguments, dtype = job.tensors, job.arguments, job.dtype
    if not dtype.is_floating_point:
        return tensors[arguments.base or 0].clone()
    if job.constant is not None:
        tensors, values = _used(job, job.constant)
        if values.tolist() == [1.0]:
            return tensors[0].to(dtype, copy=True)
        return combine(tensors, values.tolist(), out_dtype=dtype)
    if not tensors[0].numel():
        return torch.empty_like(tensors[0], dtype=dtype)
    rule = _rule(job, found)
    if not isinstance(rule, Coefficients):
        on_cpu = [tensor.cpu().contiguous() for tensor in tensors]
        out = torch.empty(tensors[0].shape, dtype=dtype)
        operands, base = [operand(tensor) for tensor in on_cpu], arguments.base or 0
        write(rule, out.data_ptr(), native_dtype(dtype), operands, base, _row(out), 0, out.numel())
        return out.to(tensors[0].device)
    if rule.values.ndim == 1:
        return combine(tensors, rule.values.tolist(), out_dtype=dtype)
    matrices = _matrices(tensors, dim := job.method.dim(arguments))
    return combine(matrices, torch.from_numpy(rule.values), dim=dim, out_dtype=dtype).reshape(tensors[0].shape)


def _used(job: _Job, constant: Coefficients) -> tuple[Sequence[Tensor], Array]:
    """The inputs and coefficients of a constant. Where one is zero, the values of its input have no effect."""
    kept = np.flatnonzero(constant.values) if constant.values.any() else np.array([0])
    return [job.tensors[index] for index in kept], constant.values[kept]


def _merged_on_gpus(jobs: Mapping[str, _Job], found: Mapping[str, list[Statistic]]) -> dict[str, Tensor]:
    """The tensors on GPUs that are weighted sums. Gram matrices of all tensors on GPUs are added to `found`."""
    from arcmerge.tensors_on_gpu import by_gpu, can_sum, grams, weighted_sums

    merged: dict[str, Tensor] = {}
    for names in by_gpu({name: job.tensors for name, job in jobs.items()}).values():
        whole = {}
        for name in names:
            measure = jobs[name].method.measure(found[name], jobs[name].arguments) if jobs[name].is_measured else None
            if isinstance(measure, Gram) and measure.dim is None:
                whole[name] = measure
        groups = {name: (jobs[name].tensors, jobs[name].arguments.base or 0, whole[name].centered) for name in whole}
        for name, gram in grams(groups).items():
            found[name].append(Statistic(whole[name], gram))
        parts = {}
        for name in names:
            rule = _rule(jobs[name], found[name]) if name in whole else jobs[name].constant
            if isinstance(rule, Coefficients) and can_sum(rule.values):
                inputs = (jobs[name].tensors, rule.values) if name in whole else _used(jobs[name], rule)
                parts[name] = *inputs, jobs[name].dtype
        merged |= weighted_sums(parts)
    return merged


def _matrices(tensors: Sequence[Tensor], dim: int | None) -> list[Tensor]:
    """Tensors as matrices, whose vectors of dimension `dim` have a Gram matrix each."""
    rows = tensors[0].shape[: 1 if dim == 0 else -1].numel()
    return [tensor.reshape(rows, -1) for tensor in tensors]


def _rule(job: _Job, found: Sequence[Statistic]) -> Rule:
    """The rule of a tensor, from what some measures have found and those that the method takes after them."""
    found = list(found)
    with _named(job.arguments.tensor):
        while (measure := job.method.measure(found, job.arguments)) is not None:
            found.append(_measured(job, measure))
        return job.method.rule(found, job.arguments)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of the block name a tensor."""
    try:
        yield
    except ArcmergeError as error:
        raise ArcmergeError([f"'{name}': {problem}" for problem in error.problems]) from error


def _measured(job: _Job, measure: Measure) -> Statistic:
    """What a measure finds, summed over the same pieces as in a merge of checkpoints."""
    from arcmerge.dispatch.native import operand
    from arcmerge.ops import gram

    tensors, base_index, row = list(job.tensors), job.arguments.base or 0, _row(job.tensors[0])
    if isinstance(measure, Gram):
        base = tensors.pop(base_index) if measure.centered else None
        if measure.dim is not None:
            base = None if base is None else _matrices([base], measure.dim)[0]
            grams = gram(_matrices(tensors, measure.dim), base=base, dim=measure.dim)
            return Statistic(measure, grams.numpy(force=True))
        flat, base = [vector.reshape(-1) for vector in tensors], None if base is None else base.reshape(-1)
        pieces = [slice(piece.first, piece.first + piece.count) for piece in cut(0, len(flat[0]))]
        shares = [
            gram([vector[piece] for vector in flat], base=None if base is None else base[piece]).numpy(force=True)
            for piece in pieces
        ]
        return joined(measure, shares)
    on_cpu = [tensor.cpu().contiguous() for tensor in tensors]
    operands = [operand(tensor) for tensor in on_cpu]
    found = {
        piece.first: measured(measure, operands, base_index, row, piece.first, piece.count)
        for piece in cut(0, tensors[0].numel(), row if isinstance(measure, Divergences) else 1)
    }
    counts = {first: share for first, share in found.items() if isinstance(share, Counts)}
    if not counts:
        return joined(measure, [share for share in found.values() if not isinstance(share, Counts)])
    return Statistic(measure, functools.reduce(operator.add, counts.values()), counts)


def _row(tensor: Tensor) -> int:
    """The number of elements of a row: of the last dim of a matrix, all of a vector."""
    return tensor.shape[-1] if tensor.ndim > 1 else max(tensor.numel(), 1)


def _slerp_job(a: Tensor, b: Tensor, t: float, slerp_normalize: bool, name: str) -> _Job:
    import torch

    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        raise _mismatch(a, b, t)
    if (number := finite(t)) is None:
        raise ArcmergeError(f"'t' must be a finite number, got {t!r:.80}")
    if a.shape != b.shape:
        raise ArcmergeError(f"'{name}' must have the shape of 'a' {tuple(a.shape)}, got {tuple(b.shape)}")
    if a.device != b.device:
        raise ArcmergeError(f"'{name}' must be on the device of 'a' {a.device}, got {b.device}")
    shared = {"t": number, "slerp_normalize": slerp_normalize}
    return _job([a, b], registry.get("slerp"), Arguments(count=2, base=0, shared=shared), name)


def _slerp(jobs: Mapping[str, _Job]) -> dict[str, Tensor]:
    """Merge the tensors of each GPU together, all others one by one."""
    from arcmerge.ops import slerp as op
    from arcmerge.tensors_on_gpu import by_gpu

    merged: dict[str, Tensor] = {}
    for names in by_gpu({name: job.tensors for name, job in jobs.items()}).values():
        chosen = [jobs[name] for name in names]
        a, b = ([job.tensors[side] for job in chosen] for side in (0, 1))
        # Copies are ends: t is 0 or 1, or a and b are the same tensor.
        t = [job.arguments.shared["t"] if job.constant is None else float(job.constant.values[1]) for job in chosen]
        outs = op(a, b, t, normalize=chosen[0].arguments.shared["slerp_normalize"])
        merged |= zip(names, outs, strict=True)
    return {name: merged[name] if name in merged else _merge(job) for name, job in jobs.items()}


def _mismatch(a: object, b: object, t: object) -> ArcmergeError:
    kinds = ", ".join(type(value).__name__ for value in (a, b, t))
    return ArcmergeError(
        f"'a' and 'b' must both be tensors, with a number for t, or both be mappings of tensors, got {kinds}"
    )
