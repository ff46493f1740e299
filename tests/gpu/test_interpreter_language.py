"""Triton's language in the corrected interpreter: matrix products, reductions, atomics, descriptors, launches."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from elementwise import interpret

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU"),
    pytest.mark.filterwarnings("error"),
]

BF16, F16, F32, I32 = torch.bfloat16, torch.float16, torch.float32, torch.int32


def random_tensor(*shape: int, dtype: torch.dtype = F32, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Matrix products.


@triton.jit
def _matmul(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + row[:, None] * K + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * N + column[None, :])
    c = tl.dot(a, b, tl.full((M, N), 1.0, tl.float32), input_precision=PRECISION)
    tl.store(c_ptr + row[:, None] * N + column[None, :], c)


def matmul(a: Tensor, b: Tensor, precision: str = "ieee") -> Tensor:
    out = torch.empty(a.shape[0], b.shape[1])
    _matmul[(1,)](a, b, out, M=a.shape[0], N=b.shape[1], K=a.shape[1], PRECISION=precision)
    return out


def sum_bound(a: Tensor, b: Tensor) -> Tensor:
    """A bound of the error of 1 + a @ b if float32 holds the products exactly, for any order of additions."""
    return (a.shape[1] + 1) * 2.0**-24 * (1 + a.double().abs() @ b.double().abs())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_dot_of_halves(dtype: torch.dtype) -> None:
    a, b = random_tensor(32, 256, dtype=dtype), random_tensor(256, 16, dtype=dtype, seed=8)
    assert ((matmul(a, b) - (1 + a.double() @ b.double())).abs() <= sum_bound(a, b)).all()


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "bf16x3"])
def test_dot_of_float32(precision: str) -> None:
    a, b = random_tensor(32, 64), random_tensor(64, 16, seed=8)
    rounding_of_products = 2.0**-24 * (a.double().abs() @ b.double().abs())
    bound = sum_bound(a, b) + rounding_of_products
    assert ((matmul(a, b, precision) - (1 + a.double() @ b.double())).abs() <= bound).all()


def test_dot_of_tf32_reads_nineteen_bits() -> None:
    a, b = random_tensor(32, 64), random_tensor(64, 16, seed=8)
    a[0, :3] = torch.tensor([float("inf"), 1 + 2.0**-11, -1.9999999])
    b[:3, 0] = 1.0
    cut_a, cut_b = ((values.view(I32) & ~0x1FFF).view(F32) for values in (a, b))
    assert cut_a[0, 1] == 1
    assert cut_a[0, 2] == -(2 - 2.0**-10)
    assert torch.equal(matmul(a, b, "tf32"), matmul(cut_a, cut_b))
    assert not torch.equal(matmul(a, b, "tf32"), matmul(a, b))


# Reductions and scans.


@triton.jit
def _sums(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(out_ptr + tl.arange(0, ROWS), tl.sum(x, axis=1))
    tl.store(out_ptr + ROWS + tl.arange(0, COLUMNS), tl.sum(x, axis=0))
    tl.store(out_ptr + ROWS + COLUMNS, tl.sum(x))
    tl.store(out_ptr + ROWS + COLUMNS + 1 + tl.arange(0, ROWS)[:, None], tl.sum(x, axis=1, keep_dims=True))


def test_sums_of_bfloat16() -> None:
    x = torch.randint(-2, 3, (8, 16), generator=torch.Generator().manual_seed(1)).to(BF16)  # sums are exact
    out = torch.empty(8 + 16 + 1 + 8, dtype=BF16)
    _sums[(1,)](x, out, ROWS=8, COLUMNS=16)
    assert torch.equal(out, torch.cat([x.sum(1), x.sum(0), x.sum()[None], x.sum(1)]))


@triton.jit
def _sum(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


def test_sum_of_bfloat16_rounds_at_every_addition() -> None:
    x = torch.tensor([256.0] + [1.0] * 255, dtype=BF16)
    out = torch.empty(1, dtype=BF16)
    _sum[(1,)](x, out, BLOCK=256)
    assert out.item() == 510  # 256 + 1 is 256; 256 + 2 + 4 + ... + 128 is exact. The sum, 511, would round to 512.


@triton.jit
def _extremes(x_ptr, out_ptr, index_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, tl.max(x, axis=0))
    tl.store(out_ptr + 1, tl.min(x, axis=0))
    tl.store(index_ptr, tl.argmax(x, axis=0))
    tl.store(index_ptr + 1, tl.argmin(x, axis=0))


def test_extremes_of_bfloat16() -> None:
    x = random_tensor(256, dtype=BF16)
    out, index = torch.empty(2, dtype=BF16), torch.empty(2, dtype=I32)
    _extremes[(1,)](x, out, index, BLOCK=256)
    assert out.tolist() == [x.max().item(), x.min().item()]
    assert index.tolist() == [x.argmax().item(), x.argmin().item()]


@triton.jit
def running_sum(x):
    return tl.cumsum(x, axis=0)


@triton.jit
def running_sum_from_the_end(x):
    return tl.cumsum(x, axis=0, reverse=True)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_running_sums(dtype: torch.dtype) -> None:
    x = torch.randint(-2, 3, (64,), generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(interpret(running_sum, x), x.cumsum(0))
    assert torch.equal(interpret(running_sum_from_the_end, x), x.flip(0).cumsum(0).flip(0))


@triton.jit
def _merge_moments(count, mean, squares, other_count, other_mean, other_squares):
    """The method of Chan, Golub and LeVeque."""
    total = count + other_count
    difference = other_mean - mean
    mean += difference * other_count / total
    return total, mean, squares + other_squares + difference * difference * count * other_count / total


@triton.jit
def _moments(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    count, mean, squares = tl.reduce((tl.full(x.shape, 1.0, tl.float32), x, tl.zeros_like(x)), 0, _merge_moments)
    tl.store(out_ptr + tl.arange(0, COLUMNS), mean)
    tl.store(out_ptr + COLUMNS + tl.arange(0, COLUMNS), squares / count)


def test_reduce_of_a_tuple() -> None:
    x = random_tensor(64, 8) + 3
    out = torch.empty(2, 8)
    _moments[(1,)](x, out, ROWS=64, COLUMNS=8)
    torch.testing.assert_close(out, torch.stack([x.mean(0), x.var(0, correction=0)]))


@triton.jit
def _compose(gain, offset, next_gain, next_offset):
    return next_gain * gain, next_gain * offset + next_offset


@triton.jit
def recurrence(gains, inputs):
    _, states = tl.associative_scan((gains, inputs), 0, _compose)
    return states


def test_scan_of_a_tuple() -> None:
    gains, inputs = random_tensor(128).abs().clamp(max=0.9), random_tensor(128, seed=8)
    states = [torch.zeros(())]
    for gain, value in zip(gains, inputs, strict=True):
        states.append(gain * states[-1] + value)
    torch.testing.assert_close(interpret(recurrence, gains, inputs), torch.stack(states[1:]))


# Atomics.


@triton.jit
def _add_to(total_ptr, before_ptr, place_ptr, x_ptr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = lane % 4 != 3
    before = tl.atomic_add(total_ptr + tl.load(place_ptr + lane), tl.load(x_ptr + lane), mask=active)
    tl.store(before_ptr + lane, before, mask=active)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, I32], ids=str)
def test_atomic_add(dtype: torch.dtype) -> None:
    place = torch.randint(0, 5, (64,), generator=torch.Generator().manual_seed(2)).to(I32)
    x = torch.randint(1, 4, (64,), generator=torch.Generator().manual_seed(3)).to(dtype)
    totals, before = torch.zeros(5, dtype=dtype), torch.full((64,), -1, dtype=dtype)
    _add_to[(2,)](totals, before, place, x, BLOCK=32)
    expected = torch.zeros(5, dtype=dtype)
    for lane in range(64):
        if lane % 4 == 3:
            assert before[lane] == -1
        else:
            assert before[lane] == expected[place[lane]]
            expected[place[lane]] += x[lane]
    assert torch.equal(totals, expected)


# Descriptors.


@triton.jit
def _copy_tile(source, target, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    target.store([row, column], source.load([row, column]))


@triton.jit
def _copy(x_ptr, out_ptr, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    source = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [ROWS, COLUMNS])
    target = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [ROWS, COLUMNS])
    _copy_tile(source, target, ROWS, COLUMNS)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_descriptors_end_where_tensors_end(dtype: torch.dtype) -> None:
    x = random_tensor(21, 40, dtype=dtype)
    out = torch.full((24, 40), 7, dtype=dtype)
    _copy[(2, 2)](x, out, 21, 40, ROWS=16, COLUMNS=32)
    assert torch.equal(out[:21], x)
    assert (out[21:] == 7).all()
    out[:] = 7
    descriptors = [TensorDescriptor.from_tensor(tensor, [16, 32]) for tensor in (x, out)]
    _copy_tile[(2, 2)](*descriptors, ROWS=16, COLUMNS=32)
    assert torch.equal(out[:21], x)
    assert (out[21:] == 0).all()  # the result of a load past the end


# Launches.


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 64}, num_warps=2)], key=["n"])
@triton.jit
def _tuned(x_ptr, out_ptr, tried_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n) + 1, mask=offsets < n)
    tl.atomic_or(tried_ptr, BLOCK)


def test_autotuned_kernels_try_every_configuration() -> None:
    x, out, tried = random_tensor(100), torch.zeros(100), torch.zeros(1, dtype=I32)
    _tuned[lambda arguments: (triton.cdiv(100, arguments["BLOCK"]),)](x, out, tried, 100)
    assert torch.equal(out, x + 1)
    assert tried.item() == 16 | 64


@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % arguments["BLOCK"] == 0})
@triton.jit
def _guessing(out_ptr, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    tl.store(out_ptr, 1 if EVEN else 2)


def test_heuristics() -> None:
    out = torch.zeros(1, dtype=I32)
    _guessing[(1,)](out, 64, BLOCK=16)
    assert out.item() == 1
    _guessing[(1,)](out, 65, BLOCK=16)
    assert out.item() == 2


@triton.jit
def require_positive(x):
    tl.device_assert(x > 0, "not positive")
    return x


@triton.jit
def times_65536(x):
    return x * 65536


@triton.jit
def random_numbers(x):
    return tl.rand(3, x)


def test_assertions_and_overflow_raise() -> None:
    interpret(require_positive, torch.ones(4))
    with pytest.raises(InterpreterError, match="not positive"):
        interpret(require_positive, torch.tensor([1.0, 0.0]))
    interpret(times_65536, torch.tensor([32767], dtype=I32))
    with pytest.raises(InterpreterError, match="overflow"):
        interpret(times_65536, torch.tensor([32768], dtype=I32))
    assert 0.4 < interpret(random_numbers, torch.arange(1024, dtype=I32), dtype=F32).mean() < 0.6  # wraps on purpose


# Python in kernels.


@triton.jit
def inside_or_zero(x):
    return tl.where((x > -1.0 and x < 1.0) or x == 5.0, x, 0.0)


@triton.jit
def conditional(x):
    if x > 0:
        x += 1
    return x


@triton.jit
def inverted(x):
    return tl.where(not x > 0, x, 0.0)


def test_truth_of_blocks() -> None:
    x = torch.tensor([-3.0, 0.5, 5.0, 2.0])
    assert interpret(inside_or_zero, x).tolist() == [0.0, 0.5, 5.0, 0.0]
    for function in (conditional, inverted):
        with pytest.raises(InterpreterError, match="a block is neither true nor false"):
            interpret(function, x)


@triton.jit
def _count(out_ptr, start_ptr, n, HALF: tl.constexpr):
    steps = 0
    for _ in tl.range(tl.load(start_ptr), n, 2):
        steps += 1
    if HALF is not None and steps > 1 and steps != 2:
        steps = steps // HALF
    while steps > 2:
        steps -= 1
    tl.store(out_ptr, steps)


@pytest.mark.parametrize(("n", "half", "expected"), [(3, 2, 0), (8, 2, 1), (8, None, 2), (7, 2, 2)])
def test_loops_and_conditions_of_scalars(n: int, half: int | None, expected: int) -> None:
    out = torch.zeros(1, dtype=I32)
    _count[(1,)](out, torch.full((1,), 3, dtype=I32), n, HALF=half)
    assert out.item() == expected
