"""Compiled kernels that are run by the emulator, for test_emulator.py.

In a process of its own, because a process that interprets kernels cannot compile them: `python -m emulation.ptx.cases`
prints a JSON object for each case.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arcmerge.kernels.combine import combine
from arcmerge.kernels.gram import gram
from cases import SMALL, Random, disagreement
from emulation.emulator import Execution, emulating
from emulation.ptx.program import Fault, Unsupported

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K, stride_a, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + row * stride_a + k[None, :], mask=(row < M) & (k[None, :] < K), other=0.0)
        b = tl.load(b_ptr + k[:, None] * N + column, mask=(k[:, None] < K) & (column < N), other=0.0)
        total = tl.dot(a, b, total)
    tl.store(out_ptr + row * N + column, total, mask=(row < M) & (column < N))


@triton.jit
def softmax_kernel(x_ptr, out_ptr, stride_x, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + column, mask=column < columns, other=-float("inf"))
    powers = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * columns + column, powers / tl.sum(powers, axis=0), mask=column < columns)


@triton.jit
def sum_kernel(x_ptr, partial_ptr, done_ptr, out_ptr, histogram_ptr, n, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The last block to come adds up what all have left. The histogram is of x modulo 8, by atomics that collide."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < n, other=0)
    tl.atomic_add(histogram_ptr + x % 8, 1.0, mask=offset < n)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(x, axis=0))
    if tl.atomic_add(done_ptr, 1) == BLOCKS - 1:
        block = tl.arange(0, 16)
        tl.store(out_ptr, tl.sum(tl.load(partial_ptr + block, mask=block < BLOCKS, other=0), axis=0))


@triton.jit
def shift_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Promises an alignment that is not there."""
    offset = tl.arange(0, BLOCK)
    x = tl.load(tl.max_contiguous(tl.multiple_of(x_ptr + 1 + offset, 16), 8))
    tl.store(out_ptr + offset, x)


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset, mask=offset < n), mask=offset < n)


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error_ratio(out: Tensor, exact: Tensor) -> float:
    """The largest error over that of rounding the exact values to the dtype."""
    return float((out.double() - exact).abs().max() / (exact.to(out.dtype).double() - exact).abs().max())


def requests(execution: Execution) -> dict[str, Any]:
    counts = execution.counts
    return {
        "load_requests": counts.loads.requests,
        "load_sectors": counts.loads.sectors,
        "load_bytes": counts.loads.bytes,
        "sectors_per_store": counts.stores.sectors_per_request,
        "store_bytes": counts.stores.bytes,
    }


def run_combine(target: str, count: int, dtypes: list[torch.dtype], skipped: int = 0) -> dict[str, Any]:
    inputs = [random(count + skipped, dtype=dtype, seed=seed)[skipped:] for seed, dtype in enumerate(dtypes)]
    if count > 2:
        inputs[0][1] = float("inf")
    coefficients = torch.tensor([[0.3, -1.7, 0.45][: len(inputs)]])
    out, nonfinite = torch.full((count,), float("nan"), dtype=BF16), torch.zeros(1, dtype=torch.int64)
    with emulating(target, reachable=[*inputs, out]) as executions:
        combine([out], [inputs], coefficients, nonfinite)
    expected = inputs[0].float() * coefficients[0, 0]
    for tensor, coefficient in zip(inputs[1:], coefficients[0, 1:], strict=True):
        expected = expected + tensor.float() * coefficient
    same = torch.equal(out, expected.bfloat16())
    return {"equal": same, "nonfinite": int(nonfinite) == (count > 2), **requests(executions[0])}


def run_gram(target: str, count: int, dtypes: list[torch.dtype]) -> dict[str, Any]:
    inputs = [random(count, dtype=dtype, seed=seed) for seed, dtype in enumerate(dtypes)]
    out = torch.full((1, len(inputs), len(inputs)), float("nan"), dtype=torch.float64)
    with emulating(target, reachable=inputs) as executions:
        gram([inputs], out)
    stacked = torch.stack([tensor.double() for tensor in inputs])
    lengths = stacked.norm(dim=1)
    error = (out[0] - stacked @ stacked.T).abs() / (lengths[:, None] * lengths).clamp(min=1e-300)
    return {"error": float(error.max()), "launches": [execution.name for execution in executions]}


def run_matmul(target: str, dtype: torch.dtype = BF16, **options: Any) -> dict[str, Any]:
    # Rows whose length is a multiple of 16 elements are copied asynchronously.
    m, n, k = 72, 96, 112
    a, b, out = random(m, k, dtype=dtype), random(k, n, dtype=dtype, seed=1), torch.full((m, n), float("nan"))
    with emulating(target, **options) as executions:
        blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
        matmul_kernel[(2, 2)](a, b, out, m, n, k, a.stride(0), **blocks, num_warps=4, num_stages=3)
    counts = executions[0].counts
    written = ~out.isnan()
    error = (out - a.double() @ b.double()).abs() / (a.double().abs() @ b.double().abs())
    return {
        "error": float(error[written].max()),
        "written": int(written.sum()),
        "blocks": executions[0].blocks,
        "mma_flops": counts.mma_flops,
        "bank_conflicts": counts.bank_conflicts,
        "shared": counts.shared_wavefronts,
        "barriers": counts.barriers,
    }


def run_softmax(target: str = "sm_80", x: Tensor | None = None, **options: Any) -> dict[str, Any]:
    x = random(5, 401) if x is None else x
    out = torch.full(x.shape, float("nan"))
    with emulating(target, **options):
        softmax_kernel[(len(x),)](x, out, x.stride(0), x.shape[1], BLOCK=512, num_warps=4)
    return {"ratio": error_ratio(out, x.double().softmax(-1))}


def run_sum(target: str) -> dict[str, Any]:
    x = torch.arange(1000, dtype=torch.int32) * 7
    blocks = 8
    partial_sums, done = torch.zeros(blocks, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out, histogram = torch.zeros(1, dtype=torch.int32), torch.zeros(8)
    with emulating(target) as executions:
        sum_kernel[(blocks,)](x, partial_sums, done, out, histogram, 1000, BLOCK=128, BLOCKS=blocks)
    return {
        "equal": int(out) == int(x.sum()) and histogram.tolist() == [125.0] * 8,
        "atomics": executions[0].counts.atomics,
    }


def run_shift() -> dict[str, Any]:
    x = random(1024 + 64, dtype=BF16)
    with emulating("sm_80"):
        shift_kernel[(1,)](x, torch.empty(1024, dtype=BF16), BLOCK=1024)
    return {}


def run_copy(out_size: int) -> dict[str, Any]:
    """Ends where another tensor begins."""
    room = torch.ones(1024)
    with emulating("sm_80"):
        copy_kernel[(2,)](room[:200].fill_(2), room[200 : 200 + out_size], 200, BLOCK=128)
    return {"equal": bool((room == 2).sum() == 200 + out_size)}


def run_combine_past_the_end(short: int) -> dict[str, Any]:
    inputs = [random(3000, dtype=BF16) for _ in range(2)]
    out = torch.empty(3000, dtype=BF16)
    with emulating("sm_80", reachable=[inputs[0], inputs[1][: 3000 - short], out]):
        combine([out], [inputs], torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
    return {}


def run_decode(target: str, **options: Any) -> dict[str, Any]:
    """Attention of one token, whose splits meet in the last block of a head."""
    case = next(case for case in SMALL if case.op == "attention_decode")
    call = case.build(Random())
    truths = call.expected()
    with emulating(target, **options):
        call.launch()
    return {"error": max(disagreement(call.outputs[name], truth) for name, truth in truths.items())}


def unordered(text: str) -> str:
    """The splits that are done are counted without an order."""
    assert "gpu.acq_rel" in text
    return text.replace("gpu.acq_rel", "gpu.relaxed")


def unmet(text: str) -> str:
    """The threads of a block do not meet between their stores and the count, neither by the kernel nor by Triton."""
    before, count, after = text.partition("atom.global")
    for _ in range(2):
        before, _, rest = before.rpartition("bar.sync")
        before += rest.partition(";")[2]
    return before + count + after


def without(pattern: str, which: int | None = None) -> Callable[[str], str]:
    """An edit that removes instructions: all, or one of them."""

    def edit(text: str) -> str:
        found = list(re.finditer(pattern, text))
        assert found, f"nothing to remove: {pattern}"
        for match in reversed(found if which is None else found[which : which + 1]):
            text = text[: match.start()] + text[match.end() :]
        return text

    return edit


def one_too_many(text: str) -> str:
    """The mask `column < columns` becomes `column <= columns`."""
    assert "setp.lt.s32" in text
    return text.replace("setp.lt.s32", "setp.le.s32")


def cases() -> dict[str, Callable[[], dict[str, Any]]]:
    pair = [BF16, BF16]
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for target in TARGETS:
        for count in (0, 1, 7, 2061, 16393):
            found[f"combine {count} {target}"] = partial(run_combine, target, count, pair)
            found[f"gram {count} {target}"] = partial(run_gram, target, count, pair)
        found[f"combine misaligned {target}"] = partial(run_combine, target, 2061, pair, 3)
        found[f"combine mixed {target}"] = partial(run_combine, target, 4100, [F32, F16, BF16])
        found[f"gram mixed {target}"] = partial(run_gram, target, 4100, [F32, F16, BF16])
        found[f"softmax {target}"] = partial(run_softmax, target)
        found[f"sum {target}"] = partial(run_sum, target)
    for target in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"):
        for dtype in (BF16, F16, F32):
            found[f"matmul {str(dtype)[6:]} {target}"] = partial(run_matmul, target, dtype)
    strided = random(5, 512)[:, :401]
    wait, barrier = r"cp\.async\.wait_group[^;]*;", r"bar\.sync[^;]*;"
    found |= {
        "matmul, one block": partial(run_matmul, "sm_80", ctas=lambda grid: [(1, 0, 0)]),
        "softmax of strided rows": partial(run_softmax, x=strided),
        "fault: gap": partial(run_softmax, x=strided, edit=one_too_many),
        "fault: mask": partial(run_softmax, edit=one_too_many),
        "fault: misaligned": run_shift,
        "fault: one element of another tensor": partial(run_copy, 199),
        "copy to the end": partial(run_copy, 200),
        "fault: table, one element short": partial(run_combine_past_the_end, 1),
        "table, none short": partial(run_combine_past_the_end, 0),
        "fault: no waits": partial(run_matmul, "sm_80", edit=without(wait)),
        "fault: first wait": partial(run_matmul, "sm_80", edit=without(wait, 0)),
        "fault: no barriers, softmax": partial(run_softmax, edit=without(barrier)),
        "fault: no barriers, matmul": partial(run_matmul, "sm_80", edit=without(barrier)),
        "fault: first barrier": partial(run_softmax, edit=without(barrier, 0)),
        "fault: no wait for products": partial(run_matmul, "sm_90", edit=without(r"wgmma\.wait_group[^;]*;")),
        "fault: no fence of products": partial(run_matmul, "sm_90", edit=without(r"wgmma\.fence[^;]*;")),
        "fault: no fence of proxies": partial(run_matmul, "sm_90", edit=without(r"fence\.proxy\.async[^;]*;")),
        "fault: no barriers, products": partial(run_matmul, "sm_90", edit=without(barrier)),
        "decode, seed 1": partial(run_decode, "sm_80", seed=1),
        "decode, seed 2": partial(run_decode, "sm_80", seed=2),
        "fault: count without an order": partial(run_decode, "sm_80", edit=unordered),
        "fault: count without a barrier": partial(run_decode, "sm_80", edit=unmet),
        "unsupported: tcgen05": partial(run_matmul, "sm_100"),
    }
    return found


def main() -> None:
    for name, case in cases().items():
        start = time.perf_counter()
        try:
            facts = case()
        except (Fault, Unsupported) as problem:
            facts = {"problem": f"{type(problem).__name__}: {problem}"}
        print(json.dumps({"case": name, "seconds": round(time.perf_counter() - start, 3), **facts}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
