"""Integer instructions: function, type of the result and types of the operands, by mnemonic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .formats import Array, dtype_of

Entry = tuple[Callable[..., Array], str, tuple[str, ...]]


def _plain(function: Callable[..., Array]) -> Callable[[list[str], str], Entry]:
    return lambda modifiers, kind: (function, kind, (kind,))


def _width(kind: str) -> int:
    return dtype_of(kind).itemsize * 8


def _mul(modifiers: list[str], kind: str) -> Entry:
    if "wide" in modifiers:
        wide = kind[0] + str(2 * _width(kind))
        return lambda a, b: a.astype(dtype_of(wide)) * b.astype(dtype_of(wide)), wide, (kind, kind)
    if "hi" in modifiers:
        return lambda a, b: _high(a, b, kind), kind, (kind, kind)
    return np.multiply, kind, (kind, kind)


def _high(a: Array, b: Array, kind: str) -> Array:
    # Python's integers, for 64 bits times 64 bits.
    return ((a.astype(object) * b.astype(object)) >> _width(kind)).astype(dtype_of(kind))


def _mad(modifiers: list[str], kind: str) -> Entry:
    multiply, result, _ = _mul(modifiers, kind)
    return lambda a, b, c: multiply(a, b) + c, result, (kind, kind, result)


def _nonzero(divisor: Array) -> Array:
    return np.where(divisor == 0, divisor.dtype.type(1), divisor)


def _quotient(a: Array, b: Array) -> Array:
    """Towards zero; all ones where the divisor is zero, which PTX leaves open."""
    b_ = _nonzero(b)
    return np.where(b == 0, ~np.zeros_like(a), (a - np.fmod(a, b_)) // b_)


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, _nonzero(b)))


def _shl(modifiers: list[str], kind: str) -> Entry:
    last = _width(kind) - 1

    def shift(a: Array, count: Array) -> Array:
        shifted = np.left_shift(a, np.minimum(count, last).astype(a.dtype))
        return np.where(count > last, a.dtype.type(0), shifted)

    return shift, kind, (kind, "u32")


def _shr(modifiers: list[str], kind: str) -> Entry:
    last = _width(kind) - 1

    def shift(a: Array, count: Array) -> Array:
        shifted = np.right_shift(a, np.minimum(count, last).astype(a.dtype))
        # A signed value keeps its sign in every bit after the last shift as well.
        return shifted if kind[0] == "s" else np.where(count > last, a.dtype.type(0), shifted)

    return shift, kind, (kind, "u32")


def _shf(modifiers: list[str], kind: str) -> Entry:
    def shift(low: Array, high: Array, count: Array) -> Array:
        both = high.astype(np.uint64) << 32 | low
        by = np.minimum(count, 32) if "clamp" in modifiers else count & 31
        return (both << by.astype(np.uint64) >> 32 if "l" in modifiers else both >> by.astype(np.uint64)).astype(
            np.uint32
        )

    return shift, kind, ("u32", "u32", "u32")


def _field(count: Array) -> Array:
    return count.astype(np.uint64) & 0xFF


def _mask(length: Array) -> Array:
    """The lowest `length` bits of 64."""
    ones = (np.uint64(1) << np.minimum(length, 63)) - np.uint64(1)
    return np.where(length > 63, ~np.uint64(0), ones)


def _shift_right(values: Array, by: Array) -> Array:
    return np.where(by > 63, np.uint64(0), values >> np.minimum(by, 63))


def _bfe(modifiers: list[str], kind: str) -> Entry:
    bits, signed = _width(kind), kind[0] == "s"

    def extract(a: Array, position: Array, length: Array) -> Array:
        position, length = _field(position), _field(length)
        wide = a.astype(np.int64).view(np.uint64) if signed else a.astype(np.uint64)
        field = _shift_right(wide, position) & _mask(length)
        if signed:
            # The sign is the last bit of the field, or of `a` where the field goes past its end.
            last = np.minimum(position + length - np.uint64(1), bits - 1)
            negative = (_shift_right(wide, last) & np.uint64(1) == 1) & (length > 0)
            taken = np.minimum(length, np.maximum(bits - position.astype(np.int64), 0).astype(np.uint64))
            field = np.where(negative, field | ~_mask(taken), field & _mask(taken))
        return field.astype(dtype_of(kind))

    return extract, kind, (kind, "u32", "u32")


def _bfi(modifiers: list[str], kind: str) -> Entry:
    def insert(field: Array, base: Array, position: Array, length: Array) -> Array:
        position, length = _field(position), _field(length)
        by = np.minimum(position, 63)
        mask = np.where(position > 63, np.uint64(0), _mask(length) << by)
        return ((base & ~mask) | ((field.astype(np.uint64) << by) & mask)).astype(base.dtype)

    return insert, kind, (kind, kind, "u32", "u32")


def _prmt(modifiers: list[str], kind: str) -> Entry:
    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = b.astype(np.uint64) << 32 | a
        result = np.zeros_like(a)
        for i in range(4):
            choice = selector >> (4 * i) & 0xF
            byte = (both >> ((choice & 7) * 8).astype(np.uint64)).astype(np.uint32) & 0xFF
            byte = np.where(choice & 8, (byte >> 7) * np.uint32(0xFF), byte)
            result |= byte << np.uint32(8 * i)
        return result

    return permute, kind, ("u32", "u32", "u32")


def _lop3(modifiers: list[str], kind: str) -> Entry:
    def look_up(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = np.zeros_like(a)
        for i in range(8):
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result |= np.where(table >> i & 1, term, a.dtype.type(0))
        return result

    return look_up, kind, (kind, kind, kind, "u32")


def _bits(a: Array) -> Array:
    """Bits of values, the lowest first: a row a lane."""
    little = np.ascontiguousarray(a).view(np.uint8).reshape(a.size, a.itemsize)
    return np.unpackbits(little, axis=1, bitorder="little")


def _popc(modifiers: list[str], kind: str) -> Entry:
    return lambda a: _bits(a).sum(axis=1, dtype=np.uint32), "u32", (kind,)


def _leading_zeros(a: Array) -> Array:
    reverse = _bits(a)[:, ::-1]
    return np.where(reverse.any(axis=1), reverse.argmax(axis=1), reverse.shape[1]).astype(np.uint32)


def _clz(modifiers: list[str], kind: str) -> Entry:
    return _leading_zeros, "u32", (kind,)


def _bfind(modifiers: list[str], kind: str) -> Entry:
    """Position of the most significant bit, of a negative value of the most significant zero; all ones if none."""

    def find(a: Array) -> Array:
        zeros = _leading_zeros(np.where(a < 0, ~a, a))
        found = zeros if "shiftamt" in modifiers else np.uint32(_width(kind) - 1) - zeros
        return np.where(zeros == _width(kind), np.uint32(0xFFFFFFFF), found)

    return find, "u32", (kind,)


def _brev(modifiers: list[str], kind: str) -> Entry:
    def reverse(a: Array) -> Array:
        return np.packbits(_bits(a)[:, ::-1], axis=1, bitorder="little").view(a.dtype).reshape(-1)

    return reverse, kind, (kind,)


INTEGERS: dict[str, Callable[[list[str], str], Any]] = {
    "add": _plain(np.add),
    "sub": _plain(np.subtract),
    "neg": _plain(np.negative),
    "abs": _plain(np.abs),
    "min": _plain(np.minimum),
    "max": _plain(np.maximum),
    "and": _plain(np.bitwise_and),
    "or": _plain(np.bitwise_or),
    "xor": _plain(np.bitwise_xor),
    "not": _plain(np.invert),
    "div": _plain(_quotient),
    "rem": _plain(_remainder),
    "mul": _mul,
    "mad": _mad,
    "shl": _shl,
    "shr": _shr,
    "shf": _shf,
    "bfe": _bfe,
    "bfi": _bfi,
    "prmt": _prmt,
    "lop3": _lop3,
    "popc": _popc,
    "clz": _clz,
    "bfind": _bfind,
    "brev": _brev,
}
