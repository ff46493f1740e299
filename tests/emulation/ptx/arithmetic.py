"""Instructions that take values and give one value, each lane for itself.

    operation(("add", "rn", "f32")) -> Operation(function, "f32", ("f32", "f32"))

Approximations (ex2.approx, div.full, ...) are computed exactly and rounded to nearest: a GPU may differ in the last
bits.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache, partial, reduce
from typing import NamedTuple

import numpy as np

from .formats import PACKED, Array, canonical, decode, dtype_of, encode, flush, fused, is_float, round_tf32
from .integers import INTEGERS
from .program import Unsupported

Function = Callable[..., Array]

# Any other modifier changes what is computed in ways that are not here.
_INTEGER_MODIFIERS = {"lo", "hi", "wide", "l", "r", "wrap", "clamp", "shiftamt"}
_FLOAT_MODIFIERS = {"rn", "rz", "rm", "rp", "ftz", "sat", "relu", "NaN", "approx", "full"}


class Operation(NamedTuple):
    """function: arrays of the operands' types to one of the result's. operands: their types; the last one repeats."""

    function: Function
    result: str
    operands: tuple[str, ...]


@cache
def operation(parts: tuple[str, ...]) -> Operation | None:
    """What an instruction computes, or None where it is not of this kind."""
    mnemonic, *modifiers, kind = parts if len(parts) > 1 else (*parts, "")
    if mnemonic in SPECIAL:
        return SPECIAL[mnemonic](modifiers, kind)
    if kind in PACKED:
        single = operation((mnemonic, *modifiers, PACKED[kind]))
        return single and Operation(_lifted(single.function, kind), kind, (kind,))
    if mnemonic in _MIXED and kind in ("f16", "bf16") and modifiers[-1:] == ["f32"]:
        return _mixed(mnemonic, modifiers, kind)
    if is_float(kind) and (mnemonic in FLOATS or mnemonic in APPROXIMATIONS or mnemonic == "fma"):
        _require_known(parts, modifiers, _FLOAT_MODIFIERS)
        return Operation(_float_function(mnemonic, modifiers, kind), kind, (kind,))
    if mnemonic in INTEGERS and not is_float(kind):
        _require_known(parts, modifiers, _INTEGER_MODIFIERS)
        return Operation(*INTEGERS[mnemonic](modifiers, kind))
    return None


def _require_known(parts: tuple[str, ...], modifiers: list[str], known: set[str]) -> None:
    unknown = set(modifiers) - known
    if unknown:
        raise Unsupported(f"{'.'.join(parts)}: .{' .'.join(sorted(unknown))}")


def _lifted(function: Function, kind: str) -> Function:
    single = dtype_of(PACKED[kind])
    return lambda *operands: function(*(operand.view(single) for operand in operands)).view(dtype_of(kind))


# Floats.


def _extremum(pick: Function, negative_zero_first: bool) -> Function:
    def extremum(a: Array, b: Array) -> Array:
        result = pick(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            result = np.where(zeros, np.where(np.signbit(a) == negative_zero_first, a, b), result)
        return result

    return extremum


def _numbers(modifiers: list[str], pick: Function, propagate: Function, negative_zero_first: bool) -> Function:
    pair = _extremum(propagate if "NaN" in modifiers else pick, negative_zero_first)
    return lambda *operands: reduce(pair, operands)  # of three from sm_100


FLOATS: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "div": np.divide,
    "sqrt": np.sqrt,
    "min": np.fmin,
    "max": np.fmax,
}
# A product or a sum of two as a * b + c: what rounds in other directions than to nearest goes through `fused`.
_AS_FUSED: dict[str, Function] = {
    "add": lambda a, b: fused(a, np.ones_like(a), b),
    "sub": lambda a, b: fused(a, np.ones_like(a), -b),
    "mul": lambda a, b: a * b,
    "fma": fused,
}
# How many of the operands may be halves where the last one and the result are float32 (PTX ISA 8.6, sm_100).
_MIXED = {"add": 1, "sub": 1, "fma": 2}
APPROXIMATIONS: dict[str, Function] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: np.reciprocal(np.sqrt(x)),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def _float_function(mnemonic: str, modifiers: list[str], kind: str) -> Function:
    mode = next((modifier for modifier in modifiers if modifier in ("rz", "rm", "rp")), "rn")
    function = FLOATS.get(mnemonic) or APPROXIMATIONS.get(mnemonic)
    if mnemonic in ("min", "max"):
        propagate = np.minimum if mnemonic == "min" else np.maximum
        function = _numbers(modifiers, FLOATS[mnemonic], propagate, mnemonic == "min")
    if mnemonic == "fma" and kind == "f64":
        function = _fused_float64
    elif mnemonic in _AS_FUSED and (mnemonic == "fma" or mode != "rn") and kind != "f64":
        function = _AS_FUSED[mnemonic]
    elif mode != "rn" and kind == "f64":
        raise Unsupported(f"{mnemonic}.{mode}.f64")
    assert function is not None
    exact = kind in ("f16", "bf16") or mode != "rn" or mnemonic == "fma" or mnemonic in APPROXIMATIONS
    if exact and kind != "f64":
        function = _through_float64(function, kind, mode)
    elif mnemonic not in ("neg", "abs"):
        function = partial(_with_canonical_nan, function)
    if "ftz" in modifiers and kind == "f32":
        function = partial(_flushed, function)
    if "sat" in modifiers or "relu" in modifiers:
        function = partial(_limited, function, kind, "sat" in modifiers)
    return function


def _mixed(mnemonic: str, modifiers: list[str], kind: str) -> Operation:
    """add.f32.bf16 and the like: halves become float32, which is exact, and all else is done in float32."""
    single = operation((mnemonic, *modifiers))
    assert single is not None

    def function(*operands: Array) -> Array:
        *halves, last = operands
        return single.function(*(decode(half, kind).astype(np.float32) for half in halves), last)

    return Operation(function, "f32", (kind,) * _MIXED[mnemonic] + ("f32",))


def _through_float64(function: Function, kind: str, mode: str) -> Function:
    """For one operation of + - * / sqrt the rounding to float64 in between changes nothing: 53 >= 2 * 24 + 2."""
    return lambda *operands: encode(function(*(decode(operand, kind) for operand in operands)), kind, mode)


def _with_canonical_nan(function: Function, *operands: Array) -> Array:
    return canonical(function(*operands))


def _flushed(function: Function, *operands: Array) -> Array:
    return flush(function(*map(flush, operands)))


def _limited(function: Function, kind: str, saturate: bool, *operands: Array) -> Array:
    """.sat clips to [0, 1], and NaN to 0; .relu clips to what is not negative, and keeps NaN."""
    values = decode(function(*operands), kind)
    if saturate:
        return encode(np.clip(np.where(np.isnan(values), 0, values), 0, 1), kind)
    return encode(np.where(values < 0, 0, values) + 0.0, kind)


def _fused_float64(a: Array, b: Array, c: Array) -> Array:
    def one(x: float, y: float, z: float) -> float:
        plain = x * y + z
        if not all(map(np.isfinite, (x, y, z))) or x * y == 0:
            return plain
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        try:
            return float(exact) if exact else plain
        except OverflowError:
            return plain

    # Lanes that do not execute mostly hold equal values. Bits are compared, because zeros differ in their signs.
    lanes = np.stack([a, b, c], axis=1)
    _, first, index = np.unique(lanes.view("V24").ravel(), return_index=True, return_inverse=True)
    return np.array([one(*values) for values in lanes[first].tolist()])[index]


# Comparisons, selections, conversions.

_COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINATIONS: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _setp(modifiers: list[str], kind: str) -> Operation:
    if kind in PACKED:  # of the lower halves; `counterpart` is that of the upper ones
        single = _setp(modifiers, PACKED[kind]).function
        return Operation(lambda a, b: single(a.astype(np.uint16), b.astype(np.uint16)), "pred", (kind, kind))
    name, *rest = modifiers
    combine = next((_COMBINATIONS[word] for word in rest if word in _COMBINATIONS), None)

    def compare(a: Array, b: Array) -> Array:
        if kind in ("f16", "bf16"):
            a, b = decode(a, kind), decode(b, kind)
        if "ftz" in rest:
            a, b = flush(a), flush(b)
        if not is_float(kind):
            return _COMPARISONS[_UNSIGNED_NAMES.get(name, name)](a, b)
        unordered = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        ordered = _COMPARISONS[name[:2]](a, b)
        return ordered | unordered if len(name) == 3 else ordered & ~unordered

    if combine is None:
        return Operation(compare, "pred", (kind, kind))
    return Operation(lambda a, b, other: combine(compare(a, b), other), "pred", (kind, kind, "pred"))


def counterpart(parts: tuple[str, ...]) -> Function:
    """What `setp` stores in q of p|q: the negation of p or, of two packed values, the comparison of the upper ones."""
    *others, kind = parts
    known = operation((*others, PACKED.get(kind, kind)))
    assert known is not None
    if kind in PACKED:
        return lambda a, b: known.function((a >> 16).astype(np.uint16), (b >> 16).astype(np.uint16))
    return lambda a, b: ~known.function(a, b)


def _selp(modifiers: list[str], kind: str) -> Operation:
    return Operation(lambda a, b, condition: np.where(condition, a, b), kind, (kind, kind, "pred"))


def _copysign(modifiers: list[str], kind: str) -> Operation:
    return Operation(lambda sign, magnitude: np.copysign(magnitude, sign), kind, (kind, kind))


def _move(modifiers: list[str], kind: str) -> Operation:
    return Operation(lambda value: value, kind, (kind,))


_TO_INTEGRAL: dict[str, Function] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _cvt(modifiers: list[str], source: str) -> Operation:
    *modifiers, target = modifiers
    mode = next((modifier for modifier in modifiers if modifier in ("rz", "rm", "rp", "rna")), "rn")
    integral = next((_TO_INTEGRAL[modifier] for modifier in modifiers if modifier in _TO_INTEGRAL), None)
    if target in PACKED and source == "f32":
        single = operation(("cvt", *modifiers, PACKED[target], source))
        assert single is not None

        def pack(high: Array, low: Array) -> Array:
            return single.function(low).astype(np.uint32) | single.function(high).astype(np.uint32) << 16

        return Operation(pack, target, (source, source))
    if target == "tf32":
        return Operation(partial(round_tf32, mode=mode), "tf32", ("f32",))
    if is_float(target) and not is_float(source):
        if mode != "rn" or target in ("f16", "bf16"):
            return Operation(lambda values: encode(values.astype(np.float64), target, mode), target, (source,))
        return Operation(lambda values: values.astype(dtype_of(target)), target, (source,))
    if is_float(target):

        def convert(values: Array) -> Array:
            exact = decode(flush(values) if "ftz" in modifiers and source == "f32" else values, source)
            result = encode(integral(exact) if integral else exact, target, mode)
            return flush(result) if "ftz" in modifiers and target == "f32" else result

        limits = {"sat", "relu"} & set(modifiers)
        return Operation(partial(_limited, convert, target, "sat" in limits) if limits else convert, target, (source,))
    result = dtype_of(target)
    low, high = np.iinfo(result).min, np.iinfo(result).max
    if is_float(source):

        def truncate(values: Array) -> Array:
            exact = (integral or np.trunc)(decode(values, source))
            inside = (exact > float(low)) & (exact < float(high))
            # NaN becomes zero; what is too large is clipped.
            clipped = np.where(exact >= float(high), high, np.where(exact <= float(low), low, 0)).astype(result)
            return np.where(inside, np.where(inside, exact, 0).astype(result), clipped)

        return Operation(truncate, target, (source,))
    if "sat" in modifiers:
        return Operation(lambda values: _clip_integers(values, low, high).astype(result), target, (source,))
    return Operation(lambda values: values.astype(result), target, (source,))


def _clip_integers(values: Array, low: int, high: int) -> Array:
    limits = np.iinfo(values.dtype)
    return np.clip(values, max(low, int(limits.min)), min(high, int(limits.max)))


SPECIAL: dict[str, Callable[[list[str], str], Operation]] = {
    "setp": _setp,
    "selp": _selp,
    "copysign": _copysign,
    "mov": _move,
    "cvta": _move,
    "cvt": _cvt,
}
