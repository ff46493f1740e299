"""The native operations, on raw addresses; csrc/arcmerge.h says what each computes and where it rounds.

Addresses are of memory that the caller keeps alive; they need no alignment, and outputs must not overlap inputs.
The GIL is released while an operation runs. Wrong arguments raise ValueError.
"""

from collections.abc import Sequence

MAX_OPERANDS: int

class Operand:
    """One input tensor, row-major; every value is widened to float32 when it is read.

    dtype, cast: 0 bfloat16, 1 float16, 2 float32 (DType.native). cast: round every value to this type first; -1 not.
    rows: 0, or the address of one uint64 address for each row of `columns` elements; `address` is then ignored.
    """

    def __init__(self, address: int, dtype: int, cast: int = -1, rows: int = 0, columns: int = 0) -> None: ...

def gram(operands: Sequence[Operand], base: Operand | None, first: int, count: int) -> list[float]:
    """The k * k sums of x_i * x_j, less base each, over elements first to first + count."""

def gram_vectors(
    operands: Sequence[Operand], base: Operand | None, rows: int, columns: int, along: int, out: int
) -> None:
    """The same for each row (along=1) or column (along=0) of (rows, columns). out: float64 [vectors][k][k]."""

def combine(
    out: int, out_dtype: int, operands: Sequence[Operand], coefficients: Sequence[float], first: int, count: int
) -> int:
    """out[i] = sum of c_j * x_j[first + i], rounded once; returns how many outputs are not finite."""

def combine_vectors(
    out: int,
    out_dtype: int,
    operands: Sequence[Operand],
    coefficients: int,
    first: int,
    count: int,
    columns: int,
    along: int,
) -> int:
    """The same with coefficients (address of float32 [vectors][k]) for each row (along=1) or column (along=0)."""

def nearswap(out: int, out_dtype: int, a: Operand, b: Operand, t: float, first: int, count: int) -> int:
    """out = w * b + (1 - w) * a, w = clamp(t / max(|b - a|, 1e-6), 0, 1); returns as combine does."""

def copy(out: int, source: int, bytes: int) -> None:
    """memcpy."""

def count_nonfinite(operand: Operand, first: int, count: int) -> int:
    """How many elements, once cast, are infinite or not a number."""

def column_sums(operand: Operand, rows: int, columns: int, out: int) -> None:
    """The sum of every column. out: float64 [columns]."""

def variants() -> list[str]:
    """What this processor can run of "avx512bf16", "avx512", "avx2", "baseline", best first. All give the same bits."""

def variant() -> str:
    """The one in use: the best, or what ARCMERGE_CPU named when the module was loaded."""

def use_variant(name: str) -> None:
    """Use another one from now on, in all threads."""
