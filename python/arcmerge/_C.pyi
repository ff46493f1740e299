"""The native operations, on raw addresses; csrc/merge.h and csrc/gemma2.h say what each computes, where it rounds.

Addresses are of memory that the caller keeps alive; they need no alignment, and outputs must not overlap inputs.
The GIL is released while an operation runs. Wrong arguments raise ValueError.
"""

from collections.abc import Sequence

MAX_OPERANDS: int
MAX_THREADS: int

class Operand:
    """One input tensor, row-major; every value is widened to float32 when it is read.

    dtype, cast: 0 bfloat16, 1 float16, 2 float32 (DType.native). cast: round every value to this type first; -1 not.
    rows: 0, or the address of one uint64 address for each row of `columns` elements; `address` is then ignored.
    """

    def __init__(self, address: int, dtype: int, cast: int = -1, rows: int = 0, columns: int = 0) -> None: ...

class MappedFile:
    """The first `size` bytes of an open file as a read-only buffer; the file may be closed.

    What cannot be read, or is gone from the file, reads as zeros and sets `lost`.
    """

    def __init__(self, file: int, size: int) -> None: ...
    @property
    def lost(self) -> bool: ...
    def forget(self, begin: int, end: int) -> None:
        """Unmap the whole pages between two bytes; they are mapped again when they are read."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

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
    """What this processor can run of "avx512bf16", "avx512", "avx2", "baseline", best first.

    All give the same bits, matrix products excepted.
    """

def variant() -> str:
    """The one in use: the best, or what ARCMERGE_CPU named when the module was loaded."""

def use_variant(name: str) -> None:
    """Use another one from now on, in all threads."""

def threads() -> int:
    """How many threads work on each operation below: at first one for each CPU that the process may run on."""

def quota_threads(root: str = "") -> int: ...
def set_threads(threads: int) -> None:
    """Use another number from now on, 1 to 1024. It changes no result."""

def read(address: int, count: int) -> None:
    """Read `count` bytes with all threads and do nothing with them: for comparing speeds."""

class Recording:
    """Calls of the operations below, down to attention_decode, to be made again with the same arguments.

    names: of the operations, in order. begin, end: the calls that this thread makes in between are added. What their
    addresses point at must live as long as they are replayed.
    """

    def __init__(self) -> None: ...
    @property
    def names(self) -> list[str]: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def replay(self) -> None:
        """Make the calls again, in order."""

def linear(out: int, x: int, count: int, length: int, weights: Sequence[tuple[int, int]], dtype: int) -> None:
    """out[count][sum of rows] = x[count][length] times every row of the weights, each (address, rows).

    dtype, of all of them: 0 bfloat16, 2 float32, here and below.
    """

def linear_geglu(out: int, x: int, count: int, length: int, gate: int, up: int, rows: int, dtype: int) -> None:
    """out[count][rows] = gelu(x times gate) * (x times up), rounded once."""

def geglu(
    out: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    rows: int,
    columns: int,
    dtype: int,
    stepwise: bool,
) -> None:
    """out[rows][columns] = gelu(gate) * up; strides, in elements, are from row to row."""

def rmsnorm(out: int, x: int, x_dtype: int, weight: int, dtype: int, rows: int, columns: int, eps: float) -> None:
    """out = x / sqrt(mean(x^2) + eps) * (1 + weight) for every row. dtype: of out and weight."""

def rmsnorm_add_rmsnorm(
    total: int,
    normed: int,
    branch: int,
    residual: int,
    residual_dtype: int,
    post_weight: int,
    pre_weight: int,
    dtype: int,
    rows: int,
    columns: int,
    eps: float,
) -> None:
    """total = residual + rmsnorm(branch, post_weight), normed = rmsnorm(total, pre_weight).

    residual_dtype: of residual and total, to which all between the norms is rounded. dtype: of the others.
    """

class Cache:
    """Keys and values, each [sequences][heads][slots][head_dim]; position p of a sequence lies in slot p % slots."""

    def __init__(
        self, key: int, value: int, sequences: int, heads: int, slots: int, head_dim: int, dtype: int
    ) -> None: ...

def rope_cache(
    out: int,
    query: tuple[int, int],
    heads: int,
    key: tuple[int, int],
    value: tuple[int, int],
    count: int,
    table: int,
    table_dtype: int,
    positions: int,
    sequences: int,
    cache: Cache,
) -> None:
    """out[count][heads][head_dim] = rotated query; rotated key and value go to the cache.

    query, key, value: an address and the bytes from row to row. positions, sequences: int64.
    """

def attention(
    out: int,
    query: int,
    heads: int,
    cache: Cache,
    query_start: int,
    lengths: int,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    """out[tokens][heads][head_dim], of the same query. query_start, lengths: int32."""

def attention_decode(
    out: int,
    qkv: int,
    heads: int,
    table: int,
    table_dtype: int,
    lengths: int,
    cache: Cache,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    """out[sequences][heads][head_dim] of a new token each, after rope_cache of its part of qkv. lengths: int32."""

HEAD_TILE: int

class Head:
    """Logits of x[count][length] and weight[ids][length], capped; softcap 0: not."""

    def __init__(
        self,
        x: int,
        weight: int,
        count: int,
        ids: int,
        length: int,
        dtype: int,
        softcap: float,
    ) -> None: ...

def lm_head_logprob(out: int, best: int, head: Head, ids: int) -> None:
    """best, int64: the id of the greatest logit. Unless `ids` is 0 also out, float32: the log of the softmax there."""

def head_scores(out: int, maxima: int, head: Head, seen: int, penalty: float, temperature: float) -> None:
    """out[count][ids], float32: logits, penalised if `seen` is not 0, divided by the temperature.

    maxima, unless 0: float32 [count][tiles of HEAD_TILE ids], the greatest scores.
    """

def head_draw(out: int, scores: int, count: int, ids: int, seed: int, steps: int) -> None:
    """out[count], int64: the id of the greatest score + noise of the seed and steps[count], int64."""
