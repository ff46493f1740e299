"""Kernels in CUDA C++: they compile for every architecture, and have the bits of the ops where they can be emulated."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arcmerge import ops
from arcmerge.cuda.driver import Kernel
from arcmerge.cuda.slerp import (
    SHARED,
    TARGETS,
    THREADS,
    Arguments,
    batches_of,
    launch,
    prepared,
    ptx_of,
    target_of,
    traffic,
)
from arcmerge.errors import ArcmergeError
from arcmerge.kernels.segments import SEGMENT
from arcmerge.merging.methods.method import Arguments as Parameters
from arcmerge.merging.methods.registry import get
from cases.gemma import GEMMA_2
from emulation import nvcc
from emulation.evidence import same_values
from emulation.ptx.program import Fault
from emulation.resources import LIMITS
from paths import ROOT

needs_nvcc = pytest.mark.skipif(nvcc.compiler() is None, reason="nvcc is not installed")
every_target = pytest.mark.parametrize("target", TARGETS)
BF16 = torch.bfloat16

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def pairs(seed: int = 0) -> tuple[Pairs, list[float]]:
    """Tensors of whole tiles, of parts of one, misaligned, of several segments, empty, parallel and opposite; and t."""
    generator = torch.Generator().manual_seed(seed)

    def pair(count: int, cosine: float, skip: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        a, noise = torch.randn(2, count + skip, generator=generator)
        b = scale * (cosine * a + math.sqrt(1 - cosine**2) * noise)
        return a.to(BF16)[skip:], b.to(BF16)[skip:]

    found = [pair(2 * SEGMENT + 4096 + 7, 0.4), pair(7, 0.9), pair(0, 0.0), pair(2048, -0.3, scale=30.0)]
    found += [pair(5000, 0.2, skip=1), pair(4100, 1.0), pair(3000, -1.0), pair(2056, 0.99, scale=0.01)]
    found += [pair(SEGMENT, 0.1), pair(300, 0.5)]
    found[-1][0][17] = math.inf
    zero = torch.zeros(2100, dtype=BF16)
    return [*found, (zero, found[3][0][:1].expand(2100).contiguous()), (found[8][1], found[8][0])], [
        0.3, 0.7, 0.5, 1.3, -0.2, 0.25, 0.4, 0.6, 0.0, 1.0, 0.5, 0.123456789,
    ]  # fmt: skip


class Run:
    """One launch in the emulator: its outputs and arguments."""

    def __init__(
        self,
        given: Pairs,
        t: list[float],
        *,
        normalize: bool = False,
        blocks: int = 4,
        cache_bytes: int = 1 << 20,
        target: str = "sm_80",
        seed: int = 0,
        edit: Callable[[str], str] = lambda code: code,
    ) -> None:
        self.outs = [torch.full_like(a, math.nan) for a, _ in given]
        a, b = zip(*given, strict=True)
        self.arguments: Arguments = prepared(
            self.outs, a, b, torch.tensor(t, dtype=torch.float64), normalize, cache_bytes
        )
        self.arguments.partials.fill_(math.nan)
        tensors = [value for value in self.arguments if isinstance(value, torch.Tensor)]
        self.driver = nvcc.FakeDriver([*tensors, *self.outs, *a, *b], seed)
        launch(Kernel(self.driver, edit(nvcc.ptx("slerp.cu", target)).encode(), "slerp"), self.arguments, blocks, 0)


def formula(a: torch.Tensor, b: torch.Tensor, t: float, normalize: bool) -> torch.Tensor:
    """The coefficients in float32, from products in float64."""
    stacked = torch.stack([a.double(), b.double()])
    gram = (stacked @ stacked.T).numpy()
    given = Parameters(count=2, base=0, shared={"t": t, "slerp_normalize": normalize})
    with np.errstate(all="ignore"):  # lengths of zero, which the formula replaces
        return torch.from_numpy(get("slerp").formula(gram, given).values.astype(np.float32))


# ---- compilation


@needs_nvcc
@every_target
def test_nothing_spills_and_three_blocks_fit(target: str, tmp_path: Path) -> None:
    found = nvcc.usage(nvcc.ptx("slerp.cu", target), target, tmp_path)
    assert (found["stack"], found["spills"]) == (0, 0)
    limits = LIMITS[target.rstrip("a")]
    assert 3 * THREADS * found["registers"] <= 65536
    assert limits.shared_multiprocessor >= 3 * (SHARED + 1024)


@needs_nvcc
@every_target
def test_inputs_are_copied_in_bulk_where_the_architecture_can(target: str) -> None:
    code = nvcc.ptx("slerp.cu", target)
    bulk, single = code.count("cp.async.bulk.shared"), code.count("cp.async.cg.shared.global")
    assert (bulk > 0, single > 0) == ((False, True) if target == "sm_80" else (True, False))
    assert "fma.rn.f32" not in code  # products and sums are rounded by themselves
    assert "st.global.cs.v4" in code


@needs_nvcc
def test_sizes_in_python_are_those_of_the_kernel() -> None:
    ring = (ROOT / "csrc" / "cuda" / "ring.cuh").read_text()
    threads, stages = (int(re.search(rf"{name} = (\d+);", ring)[1]) for name in ("THREADS", "STAGES"))  # type: ignore[index]
    assert (threads, SHARED) == (THREADS, stages * (2 * 16 * threads + 8) + 3 * 8 * threads // 32 + 8)
    setup = (ROOT / "setup.py").read_text()
    assert f"TARGETS = {TARGETS}".replace("'", '"') in setup
    assert all(f'"{flag}"' in setup for flag in nvcc.FLAGS)


# ---- execution


@needs_nvcc
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("blocks", "cache_bytes"), [(1, 1 << 30), (3, 1 << 18), (4, 1)])
def test_the_bits_are_those_of_the_ops(blocks: int, cache_bytes: int, normalize: bool) -> None:
    given, t = pairs()
    run = Run(given, t, normalize=normalize, blocks=blocks, cache_bytes=cache_bytes)
    for index, (a, b) in enumerate(given):
        chosen = run.arguments.coefficients[index]
        if bool(a.isfinite().all()):
            assert torch.equal(chosen, formula(a, b, t[index], normalize)), index
        expected = a if t[index] == 0 else b if t[index] == 1 else ops.combine([a, b], chosen)
        assert same_values(run.outs[index], expected), index
        assert int(run.arguments.nonfinites[index]) == int((~run.outs[index].isfinite()).sum())


@needs_nvcc
def test_results_depend_neither_on_the_grid_nor_on_the_order_of_blocks() -> None:
    given, t = pairs(1)
    first = Run(given, t, blocks=1)
    for blocks, seed in ((2, 1), (4, 2), (4, 3)):
        other = Run(given, t, blocks=blocks, seed=seed)
        assert torch.equal(other.arguments.partials, first.arguments.partials)
        assert all(map(same_values, other.outs, first.outs))


@needs_nvcc
def test_bytes_are_requested_sixteen_at_a_time() -> None:
    a, b = torch.randn(2, 4 * SEGMENT).to(BF16)
    run = Run([(a, b)], [0.3])
    counts = run.driver.counts
    # Both inputs twice, the output once; every warp reads the row of a segment.
    assert counts.loads.sectors * 32 == pytest.approx(8 * a.numel(), rel=0.05)
    assert counts.stores.bytes == pytest.approx(2 * a.numel(), rel=0.01)
    assert run.driver.launches == [(4, THREADS, SHARED, 0)]


# ---- planted faults


@needs_nvcc
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cp.async.wait_group 2", "cp.async.wait_group 3"),  # a tile is read before it has arrived
        ("red.release.gpu", "red.relaxed.gpu"),  # sums are not visible behind the barrier
        ("ld.acquire.gpu", "ld.relaxed.gpu"),
        ("cvt.rn.bf16x2", "cvt.rz.bf16x2"),
    ],
)
def test_faults_show(old: str, new: str) -> None:
    a, b = torch.randn(2, 3 * SEGMENT).to(BF16)
    given = [(a, b), (b[:5000], a[:5000])]

    def edit(code: str) -> str:
        assert old in code
        return code.replace(old, new)

    try:
        run = Run(given, [0.3, 0.6], edit=edit)
    except Fault:
        return
    wrong = [
        not same_values(out, ops.combine([a, b], formula(a, b, t, False)))
        for out, (a, b), t in zip(run.outs, given, (0.3, 0.6), strict=True)
    ]
    assert any(wrong)


# ---- the launcher


def test_a_batch_holds_whole_tensors_and_half_of_the_cache() -> None:
    assert batches_of([SEGMENT], 1) == [0, 1]
    assert batches_of([SEGMENT, SEGMENT + 1, 0, 5], 1) == [0, 1, 3, 5]  # an empty one fills nothing
    assert batches_of([SEGMENT] * 4, 8 * 2 * SEGMENT) == [0, 2, 4]


def test_traffic_falls_where_inputs_stay_in_the_cache() -> None:
    shape = GEMMA_2[0]
    hidden, inner = shape.hidden_size, shape.intermediate_size
    heads, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    layer = [heads * hidden, keys * hidden, keys * hidden, heads * hidden, *[inner * hidden] * 3, *[hidden] * 4]
    elements = [shape.vocabulary * hidden, *layer * shape.layers, hidden]
    assert traffic(elements, 0) == pytest.approx(10.0)
    assert traffic([1000], 1 << 20) == pytest.approx(6.0)
    # Predicted for a model of 2.6B, with L2 caches of 50 and 126 MB.
    assert traffic(elements, 50_000_000) == pytest.approx(8.7, abs=0.05)
    assert traffic(elements, 126_000_000) == pytest.approx(7.5, abs=0.05)


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((10, 3), "sm_80"),
     ((11, 0), "sm_80"), ((12, 0), "sm_120"), ((12, 1), "sm_120")],
)  # fmt: skip
def test_a_device_gets_code_that_it_can_run(capability: tuple[int, int], target: str) -> None:
    assert target_of(capability) == target


def test_a_package_without_ptx_says_so() -> None:
    with pytest.raises(ArcmergeError, match=r"'slerp\.sm_77\.ptx' must be in the package"):
        ptx_of("sm_77")


@needs_nvcc
def test_errors_of_the_driver_are_told() -> None:
    driver: Any = nvcc.FakeDriver([torch.zeros(1)])
    with pytest.raises(ArcmergeError, match=r"'cuModuleGetFunction' must succeed.*error 500, named symbol not found"):
        Kernel(driver, nvcc.ptx("slerp.cu", "sm_80").encode(), "other")
    assert Kernel(driver, nvcc.ptx("slerp.cu", "sm_80").encode(), "slerp").resident_blocks(THREADS, SHARED) == 3
    assert ctypes.sizeof(ctypes.c_void_p) == 8
