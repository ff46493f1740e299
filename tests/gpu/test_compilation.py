"""The compile gate: clean code passes for every target, and each planted fault is named.

Run as a script, in a process that does not interpret, this file compiles its kernels and prints the result.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from arcmerge.kernels import dependent_launch
from emulation.compilation import TARGETS, Facts, as_json, compiling_for, describe, disassembly, narrowed
from paths import PYTHONPATH

BF16 = torch.bfloat16


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    row, column, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        a = tl.load(a_ptr + row[:, None] * k + start + depth[None, :])
        b = tl.load(b_ptr + column[None, :] * k + start + depth[:, None])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(out_ptr + row[:, None] * N + column[None, :], total.to(out_ptr.dtype.element_ty))


@triton.jit
def _axpy(x_ptr, y_ptr, factor, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(y_ptr + offsets) + factor * tl.load(x_ptr + offsets))


@triton.jit
def _add_atomically(x_ptr, sum_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(sum_ptr + tl.arange(0, BLOCK) % 4, tl.load(x_ptr + tl.arange(0, BLOCK)))


@triton.jit
def _publish(x_ptr, out_ptr, count_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets))
    tl.debug_barrier()
    tl.atomic_add(count_ptr, 1, sem="acq_rel")


@triton.jit
def _add_dependently(x_ptr, y_ptr, n, END: tl.constexpr, EARLY: tl.constexpr, WAIT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dependent_launch.prefetch(x_ptr + offsets)
    if EARLY:
        x = tl.load(x_ptr + offsets)
    if END is not None and n == END:
        return
    if WAIT:
        dependent_launch.wait()
    if not EARLY:
        x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x + tl.load(y_ptr + offsets))


def product(
    m: int, n: int, k: int, warps: int, stages: int, dtype: torch.dtype = BF16, precision: str = "tf32"
) -> None:
    tensor = torch.empty(1 << 16, dtype=dtype)
    _product[(1,)](tensor, tensor, tensor, 1024, m, n, k, precision, num_warps=warps, num_stages=stages)


def axpy(skip: int, fused: bool) -> None:
    tensor = torch.empty(4096)
    _axpy[(1,)](tensor[skip:], tensor, 0.5, 1024, enable_fp_fusion=fused)


def add_dependently(end: int | None = None, early: bool = False, wait: bool = True) -> None:
    tensor = torch.empty(4096)
    _add_dependently[(1,)](tensor, tensor, 4, end, early, wait, 1024, **dependent_launch.options(tensor.device))


def combine() -> None:
    from arcmerge.kernels.combine import combine

    tensor = torch.empty(4096, dtype=BF16)
    combine([tensor], [[tensor, tensor]], torch.empty(1, 2), torch.zeros(1, dtype=torch.int64))


def publish() -> None:
    _publish[(1,)](torch.empty(1024), torch.empty(1024), torch.zeros(1, dtype=torch.int32), 1024)


def add_atomically(dtype: torch.dtype) -> None:
    _add_atomically[(1,)](torch.empty(128, dtype=dtype), torch.empty(4, dtype=dtype), 128)


PLANTED = {
    "clean": lambda: product(64, 64, 64, 4, 2),
    "16 rows": lambda: product(16, 64, 64, 4, 2),
    "in float32": lambda: product(32, 32, 32, 4, 2, torch.float32, "ieee"),
    "in TF32": lambda: product(64, 64, 32, 4, 2, torch.float32),
    "too large a tile": lambda: product(256, 128, 32, 4, 2),
    "too many stages": lambda: product(64, 64, 128, 4, 5),
    "aligned": lambda: axpy(0, fused=False),
    "misaligned": lambda: axpy(1, fused=False),
    "fused": lambda: axpy(0, fused=True),
    "combine": combine,
    "float atomics": lambda: add_atomically(torch.float32),
    "integer atomics": lambda: add_atomically(torch.int32),
    "counted after a barrier": publish,
    "dependent": add_dependently,
    "dependent, a load before the wait": lambda: add_dependently(early=True),
    "dependent, an end before the wait": lambda: add_dependently(end=0),
    "dependent, no wait": lambda: add_dependently(wait=False),
}


# Such a tile takes ptxas seconds.
SPILLING = ("sm_80", "sm_90")


def compile_planted() -> None:
    for target in TARGETS:
        for name, launch in PLANTED.items():
            if name == "too large a tile" and target not in SPILLING:
                continue
            with compiling_for(target) as kernels:
                launch()
            record = as_json(describe(kernels[0], target))
            if target in ("sm_80", "sm_90") and name in ("fused", "aligned", "combine"):
                record["fused_in_sass"] = len(re.findall(r"\bFFMA", disassembly(kernels[0])))
            print(json.dumps({"planted": name, **record}))


def compile_for_growing_caches() -> None:
    """Prints how many kernels the launches for caches of other numbers of slots compile, on one target."""
    from arcmerge.kernels.attention import attention
    from arcmerge.kernels.attention_decode import attention_decode, scratch

    query, lengths = torch.empty(1, 4, 64, dtype=BF16), torch.empty(2, dtype=torch.int32)
    qkv, angles = torch.empty(1, 8 * 64, dtype=BF16), torch.empty(4096, 64)
    options: dict[str, Any] = {"scale": 1.0, "softcap": 0.0, "window": 0}
    caches = [torch.empty(1, 2, slots, 64, dtype=BF16) for slots in (1, 16, 127, 128, 1040, 4096)]
    with compiling_for("sm_80") as decoding:
        for cache in caches:
            out = torch.empty(1, 4 * 64, dtype=BF16)
            attention_decode(
                out, *scratch(cache, 4), qkv, cache, cache, lengths[1:].clone(), angles, heads=4, **options
            )
    with compiling_for("sm_80") as reading:
        for cache in caches:
            attention(torch.empty_like(query), query, cache, cache, lengths, lengths, max_seqlen_q=1, **options)
    counts = [len({kernel.hash for kernel in kernels}) for kernels in (decoding, reading)]
    print(json.dumps({"planted": "caches that grow", "target": "sm_80", "kernels": counts}))


@pytest.fixture(scope="module")
def planted() -> dict[tuple[str, str], dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = PYTHONPATH
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    records = map(json.loads, run.stdout.splitlines())
    return {(record["planted"], record["target"]): record for record in records}


every_target = pytest.mark.parametrize("target", TARGETS)


@every_target
def test_clean_code_passes(target: str, planted: dict[tuple[str, str], dict[str, Any]]) -> None:
    for name in ("clean", "in float32", "in TF32", "aligned", "combine", "integer atomics"):
        assert planted[name, target]["faults"] == [], name
    facts = planted["clean", target]
    assert facts["matrix_due"]
    assert 32 <= facts["registers"] <= 128
    assert facts["stack"] == 0
    assert "M=64, N=64, K=64" in facts["configuration"]


@pytest.mark.parametrize("target", SPILLING)
def test_a_tile_too_large_for_registers_spills(target: str, planted: dict[tuple[str, str], dict[str, Any]]) -> None:
    facts = planted["too large a tile", target]
    assert facts["spills"] > 100
    assert facts["stack"] > 100
    assert facts["faults"] == [f"{facts['spills']} accesses to spilled registers"]


@every_target
def test_shared_memory_over_the_limit_is_named(target: str, planted: dict[tuple[str, str], dict[str, Any]]) -> None:
    facts = planted["too many stages", target]
    limit = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}.get(target, 101376)
    named = [fault for fault in facts["faults"] if "shared memory" in fault]
    # Buffers of 32 KiB for four stages or five.
    assert facts["shared"] >= 4 * 32 << 10
    assert bool(named) == (target not in ("sm_80", "sm_90", "sm_100"))
    assert named == ([f"{facts['shared']} bytes of shared memory, the limit is {limit}"] if named else [])


@every_target
def test_scalar_accesses_are_told_from_wide_ones(target: str, planted: dict[tuple[str, str], dict[str, Any]]) -> None:
    aligned, misaligned = planted["aligned", target], planted["misaligned", target]
    assert (aligned["wide_loads"], aligned["wide_stores"]) > (0, 0)
    assert (aligned["narrow_loads"], aligned["narrow_stores"]) == (0, 0)
    if target != "gfx942":  # which loads 16 bytes from any address
        assert misaligned["narrow_loads"] > 0
    scalar = {**misaligned, "wide_loads": 0, "wide_stores": 0}
    assert narrowed([aligned], [aligned]) == []
    assert narrowed([misaligned, aligned], [aligned]) == []
    assert narrowed([scalar], [aligned]) == [f"no {kind} of 16 bytes, which sm_80 has" for kind in ("loads", "stores")]


@every_target
def test_missing_matrix_instructions_are_named(target: str, planted: dict[tuple[str, str], dict[str, Any]]) -> None:
    names = [field.name for field in fields(Facts)]
    for name in ("clean", "16 rows", "in TF32"):
        facts = Facts(**{field: planted[name, target][field] for field in names})
        assert facts.matrix > 0
        assert "matrices are multiplied without matrix instructions" in replace(facts, matrix=0).faults()
    # Nothing of that is due for float32 that must stay float32.
    assert not planted["in float32", target]["matrix_due"]
    # Tiles of 64 rows are for groups of warps where there are such instructions, smaller ones are not.
    of_groups = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
    of_warps = "v_mfma" if target == "gfx942" else "mma.sync"
    assert planted["clean", target]["matrix_instruction"] == of_groups.get(target, of_warps)
    assert planted["16 rows", target]["matrix_instruction"] == of_warps


@every_target
def test_atomics_on_floating_point_are_named(target: str, planted: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert re.search("atomic operations on floating point", " ".join(planted["float atomics", target]["faults"]))


@every_target
def test_accesses_of_a_dependent_kernel_before_its_wait_are_named(
    target: str, planted: dict[tuple[str, str], dict[str, Any]]
) -> None:
    clean, *others = (planted[name, target] for name in PLANTED if name.startswith("dependent"))
    supported = target in ("sm_90", "sm_100", "sm_120")
    assert [each["dependent"] for each in (clean, *others)] == [supported] * 4
    assert clean["faults"] == []
    for record in others:
        faults = [f"{record['early']} accesses or ends before the wait for earlier kernels"] if supported else []
        assert record["faults"] == faults
        assert bool(record["early"]) == supported


def test_combine_rounds_every_product_in_the_instructions_of_the_machine(
    planted: dict[tuple[str, str], dict[str, Any]],
) -> None:
    for target in ("sm_80", "sm_90"):
        assert planted["combine", target]["fused_in_sass"] == 0
        assert planted["aligned", target]["fused_in_sass"] == 0
        assert planted["fused", target]["fused_in_sass"] > 0
        assert planted["combine", target]["fused"] == 0


@every_target
def test_a_count_that_overtakes_stores_is_named(target: str, planted: dict[tuple[str, str], dict[str, Any]]) -> None:
    found = re.search("1 releases of stores", " ".join(planted["counted after a barrier", target]["faults"]))
    assert (found is not None) == (target == "gfx942")


def test_a_cache_that_grows_compiles_attention_once(planted: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert planted["caches that grow", "sm_80"]["kernels"] == [1, 1]


if __name__ == "__main__":
    compile_planted()
    compile_for_growing_caches()
