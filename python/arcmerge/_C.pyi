"""The native operations, on raw addresses. csrc/merge.h and csrc/gemma2.h define their results and roundings.

The caller keeps the memory at all addresses alive. Addresses need no alignment, and outputs must not overlap inputs.
The GIL is released while an operation runs. Wrong arguments raise ValueError.

In shapes, k is the number of operands and `vectors` the number of rows or columns.
"""

from collections.abc import Sequence

MAX_THREADS: int

class Operand:
    """One input tensor, row-major. Every value is widened to float32 when it is read.

    Args:
        address: the first element.
        dtype: 0 for bfloat16, 1 for float16, 2 for float32, as DType.native.
        cast: the dtype to which every value is rounded before it is used, -1 for none.
        rows: 0, or the address of uint64 addresses, one for each row of `columns` elements, which replace `address`.
        columns: the number of elements of a row, with `rows`.
    """

    def __init__(self, address: int, dtype: int, cast: int = -1, rows: int = 0, columns: int = 0) -> None: ...

class MappedFile:
    """The first `size` bytes of an open file as a read-only buffer. The file may be closed afterwards.

    Bytes that cannot be read, or that the file has lost, are read as zeros and set `lost`.

    Args:
        file: the file descriptor.
        size: the number of bytes.
    """

    def __init__(self, file: int, size: int) -> None: ...
    @property
    def lost(self) -> bool: ...
    def forget(self, begin: int, end: int) -> None:
        """Unmap the whole pages in [begin, end), in bytes. They are mapped again when they are read."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

def gram(operands: Sequence[Operand], base: Operand | None, first: int, count: int) -> list[float]:
    """The k * k sums of x_i * x_j, or of (x_i - base) * (x_j - base), over elements [first, first + count)."""

def gram_vectors(
    operands: Sequence[Operand], base: Operand | None, rows: int, columns: int, dim: int, out: int
) -> None:
    """`gram` for each row (dim=1) or column (dim=0) of matrices (rows, columns). out: float64 [vectors][k][k]."""

def combine(
    out: int, out_dtype: int, operands: Sequence[Operand], coefficients: Sequence[float], first: int, count: int
) -> int:
    """out[i] = the sum of c_j * x_j[first + i], rounded once. Returns the number of outputs that are not finite."""

def combine_vectors(
    out: int,
    out_dtype: int,
    operands: Sequence[Operand],
    coefficients: int,
    first: int,
    count: int,
    columns: int,
    dim: int,
) -> int:
    """`combine` with coefficients for each row (dim=1) or column (dim=0). coefficients: float32 [vectors][k]."""

def nearswap(out: int, out_dtype: int, a: Operand, b: Operand, t: float, first: int, count: int) -> int:
    """out = w * b + (1 - w) * a with w = clamp(t / max(|b - a|, 1e-6), 0, 1). Returns as `combine`."""

def magmax(
    out: int, out_dtype: int, operands: Sequence[Operand], base: Operand, factor: float, first: int, count: int
) -> int:
    """out = base + factor * d, d the x_i - base of the largest magnitude, the first of equal ones. As `combine`."""

def median(out: int, out_dtype: int, operands: Sequence[Operand], first: int, count: int) -> int:
    """out = the median of all operands, or a / 2 + b / 2 of the two in the middle. Returns as `combine`."""

def copy(out: int, source: int, bytes: int) -> None:
    """Copy bytes, as memcpy."""

def count_nonfinite(operand: Operand, first: int, count: int) -> int:
    """The number of elements that are infinite or NaN after the operand's cast."""

def column_sums(operand: Operand, rows: int, columns: int, out: int) -> None:
    """The sum of every column of a matrix (rows, columns). out: float64 [columns]."""

class Selection:
    """What selects elements by magnitude and at random: see arcmerge.ops.selection.

    Args:
        cuts: for each operand (upper code, upper rank, lower code, lower rank).
        keys: for each operand the key of its random numbers, an int64 or a uint64.
        probabilities: for each operand that of the smallest and of the largest element of each row.
        columns: the length of a row; of a vector or a scalar, the number of its elements.
        joint: whether magnitudes are the variance over the operands.
        rounded: whether magnitudes are rounded to bfloat16.
        row_scales: 0, or the address of float32, one for each row of the whole tensors.
        masks: for each operand the address of bits of all elements of the tensor, 32 bytes for each 256 of them, or 0.
            l1_norms sets those of elements that random numbers keep, from a multiple of 256 elements on; the others
            read them in place of drawing numbers. Empty for none.
    """

    def __init__(
        self,
        cuts: Sequence[tuple[int, int, int, int]],
        keys: Sequence[int],
        probabilities: Sequence[tuple[float, float]],
        columns: int,
        joint: bool = False,
        rounded: bool = False,
        row_scales: int = 0,
        masks: Sequence[int] = (),
    ) -> None: ...

class Consensus:
    """How selected elements make a result: see arcmerge.ops.consensus_combine.

    Args:
        factors: for each operand (vote, value, share, alone), rounded to float32.
        election: 0 for none, 1 for the sum of votes, 2 for their count.
        zero_is_negative: whether a sum of votes that is 0 elects the negative sign.
        floor: the smallest sum of shares, rounded to float32; 0 for any.
        inverse: whether differences are divided by their probabilities.
    """

    def __init__(
        self,
        factors: Sequence[tuple[float, float, float, float]],
        election: int = 0,
        zero_is_negative: bool = False,
        floor: float = 0.0,
        inverse: bool = False,
    ) -> None: ...

def magnitude_histogram(
    out: int, operands: Sequence[Operand], base: Operand, selection: Selection, first: int, count: int
) -> None:
    """Add the counts of elements [first, first + count) to out: int64 [k][2 if rounded else 4][32768].

    The planes are those of arcmerge.ops.magnitude_histogram. Cuts are ignored.
    """

def magnitude_histogram_within(
    out: int,
    operands: Sequence[Operand],
    base: Operand,
    selection: Selection,
    prefixes: Sequence[Sequence[int]],
    first: int,
    count: int,
) -> None:
    """Add the counts by the lower 16 bits of codes to out: int64 [k][P][65536]. prefixes: [k][P]."""

def l1_norms(
    out: int, operands: Sequence[Operand], base: Operand, selection: Selection, first: int, count: int
) -> None:
    """Add the sums of the magnitudes of elements [first, first + count) to out: int64 [k][2][256].

    [0] is of elements that random numbers drop, [1] of those that they keep. Each sum is that of n[e] *
    2^(max(e, 1) - 150) over e < 255; n[255] is not 0 if a magnitude is not finite. Cuts are ignored.
    """

def consensus_combine(
    out: int,
    out_dtype: int,
    operands: Sequence[Operand],
    base: Operand,
    selection: Selection,
    consensus: Consensus,
    before: Sequence[tuple[int, int]],
    first: int,
    count: int,
) -> int:
    """out[e] = base + what its selected and agreeing differences add. Returns as `combine`.

    before: for each operand how many elements before `first` have the upper and the lower code of its cut.
    """

def consensus_sums(
    operands: Sequence[Operand],
    base: Operand,
    selection: Selection,
    consensus: Consensus,
    before: Sequence[tuple[int, int]],
    first: int,
    count: int,
) -> tuple[list[float], list[int], list[int], int]:
    """What consensus_combine adds up in elements [first, first + count).

    For each operand the sum of squares of its selected differences, how many elements it changes alone, and how many
    with others; and how many more elements have a positive sum of votes than a negative one.
    """

def row_divergences(out: int, x: Operand, base: Operand, columns: int, first_row: int, rows: int) -> None:
    """out: float32 [rows], the divergence KL(softmax(x) || softmax(base)) of each row; NaN for rows with NaN or inf."""

def variants() -> list[str]:
    """Those of "avx512bf16", "avx512", "avx2" and "baseline" that this processor can run, best first.

    All give the same bits, except for matrix products and the softmax of a network.
    """

def variant() -> str:
    """The variant in use: by default the best, or ARCMERGE_CPU of the environment when the module was loaded."""

def use_variant(name: str) -> None:
    """Use another variant from now on, in all threads."""

def threads() -> int:
    """The number of threads that work on each operation below; see arcmerge.get_num_threads."""

def quota_threads(root: str = "") -> int:
    """The number of threads that the CPU quota of the control group allows. root: a prefix of file paths, for tests."""

def set_threads(threads: int) -> None:
    """Use another number of threads from now on, from 1 to MAX_THREADS. It changes no result."""

def read(address: int, count: int) -> None:
    """Read `count` bytes with all threads and drop them, to measure the bandwidth of memory."""

class Recording:
    """Calls of the operations below, up to attention_decode, that can be repeated with the same arguments.

    The memory at their addresses must stay alive as long as they are replayed.
    """

    def __init__(self) -> None: ...
    @property
    def names(self) -> list[str]:
        """The operations, in order."""

    def begin(self) -> None:
        """Add the calls that this thread makes from now on."""

    def end(self) -> None:
        """Stop adding calls."""

    def replay(self) -> None:
        """Repeat the calls, in order."""

def linear(out: int, x: int, count: int, length: int, weights: Sequence[tuple[int, int]], dtype: int) -> None:
    """out[count][sum of rows] = the products of x[count][length] with every row of the weights, each (address, rows).

    dtype: of all tensors, 0 for bfloat16 or 2 for float32, here and below.
    """

def linear_geglu(out: int, x: int, count: int, length: int, gate: int, up: int, rows: int, dtype: int) -> None:
    """out[count][rows] = gelu(x gate^T) * (x up^T), rounded once. gate, up: [rows][length]."""

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
    """out[rows][columns] = gelu(gate) * up.

    gate_stride, up_stride: the number of elements from one row to the next. stepwise: round the gelu to dtype.
    """

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

    residual_dtype: of residual and total; all values between the norms are rounded to it. dtype: of all others.
    """

class KvCache:
    """Keys and values, each [sequences][heads][slots][head_dim]. Position p of a sequence is in slot p % slots."""

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
    cache: KvCache,
) -> None:
    """out[count][heads][head_dim] = the rotated query. The rotated key and the value are written to the cache.

    query, key, value: an address and the number of bytes from one row to the next. positions, sequences: int64 [count].
    """

def attention(
    out: int,
    query: int,
    heads: int,
    cache: KvCache,
    query_start: int,
    lengths: int,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    """out[tokens][heads][head_dim]. query: as out. query_start: int32 [sequences + 1]. lengths: int32 [sequences]."""

def attention_decode(
    out: int,
    qkv: int,
    heads: int,
    table: int,
    table_dtype: int,
    lengths: int,
    cache: KvCache,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    """out[sequences][heads][head_dim] of one new token each: rope_cache, then attention. lengths: int32 [sequences]."""

LM_HEAD_TILE: int

class LmHead:
    """The logits of x[count][length] and weight[ids][length]. softcap: their cap, 0 for none."""

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

def lm_head_logprob(out: int, best: int, head: LmHead, ids: int) -> None:
    """best, int64 [count]: the ids of the largest logits. out, float32 [count]: logprobs of ids, unless ids is 0."""

def lm_head_scores(out: int, maxima: int, head: LmHead, seen: int, penalty: float, temperature: float) -> None:
    """out[count][ids], float32: the logits, penalized unless `seen` is 0, and divided by the temperature.

    maxima: 0, or float32 [count][tiles of LM_HEAD_TILE ids], the largest score of each tile.
    """

def lm_head_draw(out: int, scores: int, count: int, ids: int, seed: int, steps: int) -> None:
    """out[count], int64: the ids with the largest score + noise, which follows from seed and steps, int64 [count]."""
