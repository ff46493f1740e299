"""Kernels in CUDA C++: they compile for every architecture, and have the bits of the ops where they can be emulated."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import re
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arcmerge import ops
from arcmerge.cuda.driver import Kernel
from arcmerge.cuda.slerp import (
    L2_SHARE,
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
from arcmerge.kernels.segments import SEGMENT, launches
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
    """Tensors of whole tiles, of parts of one, misaligned, of several segments, empty, parallel and opposite; and t.

    The first tensor is not the only one that several blocks share. Ends have infinities, in a whole tile and behind it.
    """
    generator = torch.Generator().manual_seed(seed)

    def pair(count: int, cosine: float, skip: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        a, noise = torch.randn(2, count + skip, generator=generator)
        b = scale * (cosine * a + math.sqrt(1 - cosine**2) * noise)
        return a.to(BF16)[skip:], b.to(BF16)[skip:]

    found = [pair(2 * SEGMENT + 4096 + 7, 0.4), pair(7, 0.9), pair(0, 0.0), pair(2048, -0.3, scale=30.0)]
    found += [pair(5000, 0.2, skip=1), pair(4100, 1.0), pair(3000, -1.0), pair(2060, 0.99, 4, scale=0.01)]
    found += [pair(SEGMENT + 2049, 0.1), pair(300, 0.5)]
    for tensor in (found[8][0], found[9][0], found[9][1]):
        tensor[17] = tensor[-1] = math.inf
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
        folder: Path = ROOT / "csrc" / "cuda",
        outs: Sequence[torch.Tensor] = (),
    ) -> None:
        self.outs = list(outs) or [torch.full_like(a, math.nan) for a, _ in given]
        a, b = zip(*given, strict=True)
        (table,) = launches([*zip(a, b, self.outs, strict=True)])
        self.arguments: Arguments = prepared(
            table, self.outs, torch.tensor(t, dtype=torch.float64), normalize, cache_bytes
        )
        self.arguments.partials.fill_(math.nan)
        tensors = [value for value in self.arguments if isinstance(value, torch.Tensor)]
        self.driver = nvcc.FakeDriver([*tensors, *self.outs, *a, *b], seed)
        launch(Kernel(self.driver, nvcc.ptx("slerp.cu", target, folder).encode(), "slerp"), self.arguments, blocks, 0)


def formula(a: torch.Tensor, b: torch.Tensor, t: float, normalize: bool) -> torch.Tensor:
    """The coefficients in float32, from products in float64."""
    stacked = torch.stack([a.double(), b.double()])
    gram = (stacked @ stacked.T).numpy()
    given = Parameters(count=2, base=0, shared={"t": t, "slerp_normalize": normalize})
    with np.errstate(all="ignore"):  # lengths of zero, which the formula replaces
        return torch.from_numpy(get("slerp").formula(gram, given)[0].astype(np.float32))


def mixed(a: torch.Tensor, b: torch.Tensor, t: float, coefficients: torch.Tensor) -> torch.Tensor:
    """The result for coefficients; an end is a copy."""
    return a if t == 0 else b if t == 1 else ops.combine([a, b], coefficients)


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
    assert all(f'"{flag}"' in setup for flag in nvcc.FLAGS)


@needs_nvcc
def test_the_proof_has_the_work_of_every_target(tmp_path: Path) -> None:
    """The kernel has changed? `python benchmarks/proof/prove.py predictions` counts its work again."""
    version = subprocess.run([str(nvcc.compiler()), "--version"], check=True, capture_output=True, text=True).stdout
    if "release 13.0" not in version:
        pytest.skip("another nvcc makes other code")
    stored = json.loads((ROOT / "benchmarks" / "results" / "proof.json").read_text())["slerp"]
    assert stored == nvcc.slerp_work(tmp_path)


# ---- execution


@needs_nvcc
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("blocks", "cache_bytes"), [(1, 1 << 30), (3, 1 << 18), (4, 1)])
def test_the_bits_are_those_of_the_ops(blocks: int, cache_bytes: int, normalize: bool) -> None:
    given, t = pairs()
    run = Run(given, t, normalize=normalize, blocks=blocks, cache_bytes=cache_bytes)
    for index, (a, b) in enumerate(given):
        chosen = run.arguments.coefficients[index]
        if bool(a.isfinite().all() and b.isfinite().all()):
            assert torch.equal(chosen, formula(a, b, t[index], normalize)), index
        assert same_values(run.outs[index], mixed(a, b, t[index], chosen)), index
        assert int(run.arguments.nonfinites[index]) == int((~run.outs[index].isfinite()).sum())
    assert run.driver.launches == [(blocks, THREADS, SHARED, 0)]  # no more than are resident


@needs_nvcc
@every_target
def test_every_architecture_has_the_same_bits(target: str) -> None:
    given, t = pairs(2)
    one, other = (Run(given, t, target=name, blocks=3, seed=5) for name in ("sm_80", target))
    assert same_values(one.arguments.partials, other.arguments.partials)
    assert all(map(same_values, one.outs, other.outs))


@needs_nvcc
def test_results_depend_neither_on_the_grid_nor_on_the_order_of_blocks() -> None:
    given, t = pairs(1)
    first = Run(given, t, blocks=1)
    for blocks, seed in ((2, 1), (4, 2), (4, 3)):
        other = Run(given, t, blocks=blocks, seed=seed)
        assert same_values(other.arguments.partials, first.arguments.partials)
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


def wrong(target: str, folder: Path, seed: int) -> bool:
    """Whether the sources in a folder have a fault that shows: in the emulator, in sums, coefficients or outputs."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(6 * SEGMENT + 2049, generator=generator).to(BF16) for _ in range(2))
    near, noise = torch.randn(2, 3000, generator=generator)
    given = [
        (a, b),
        (b[: SEGMENT + 5001].clone(), a[: SEGMENT + 5001].clone()),
        (a[1:5001], b[8:5008]),
        (a[8:5008], b[1:5001]),
        (near.to(BF16), (near + 0.1 * noise).to(BF16)),  # a cosine of 0.995
        (a[4:4004], b[4:4004]),
        (torch.cat([near, near.new_full((1,), math.inf)]).to(BF16), b[:3001].clone()),
    ]
    t = [0.3, 2.5, 0.4, 0.6, 0.25, 0.5, 0.0]
    # The second output starts past an aligned address.
    outs = [torch.empty(len(x) + 1, dtype=BF16)[index == 1 :][: len(x)] for index, (x, _) in enumerate(given)]
    try:
        run = Run(given, t, outs=outs, cache_bytes=1 << 18, target=target, folder=folder, seed=seed)
    except Fault:
        return True
    for index, (x, y) in enumerate(given):
        first, last, _ = run.arguments.runs[index].tolist()
        sums = run.arguments.partials[first:last].sum(0)
        exact = torch.stack([x.double() @ x.double(), x.double() @ y.double(), y.double() @ y.double()])
        chosen, out = run.arguments.coefficients[index], run.outs[index]
        at_end = t[index] in (0, 1)
        if not (
            (at_end or torch.allclose(sums, exact, rtol=1e-12, atol=0.0))
            and (at_end or torch.equal(chosen, formula(x, y, t[index], False)))
            and same_values(out, mixed(x, y, t[index], chosen))
            and int(run.arguments.nonfinites[index]) == int((~out.isfinite()).sum())
        ):
            return True
    return False


RELEASE = "void release() { __syncthreads(); }"


@needs_nvcc
@pytest.mark.parametrize(
    ("file", "old", "new", "target"),
    [
        ("ring.cuh", '"n"(STAGES - 2)', '"n"(STAGES - 1)', "sm_80"),  # a tile is read before it has arrived
        ("ring.cuh", '"r"(phases >> stage & 1)', '"r"(0)', "sm_90a"),
        ("ring.cuh", '"r"(2 * TILE_BYTES)\n', '"r"(TILE_BYTES)\n', "sm_90a"),
        ("ring.cuh", RELEASE, "void release() {}", "sm_90a"),  # a copy overtakes the threads that read
        ("ring.cuh", "start + (STAGES - 1) * TILE", "start + STAGES * TILE", "sm_90a"),
        ("slerp.cu", "red.release.gpu", "red.relaxed.gpu", "sm_80"),  # sums are not visible behind the barrier
        ("slerp.cu", "ld.acquire.gpu", "ld.relaxed.gpu", "sm_80"),
        ("slerp.cu", "times * gridDim.x", "times * gridDim.x - 1", "sm_80"),
        ("slerp.cu", "grid_barrier(arrived, batch + 1)", "grid_barrier(arrived, 1)", "sm_80"),
        ("slerp.cu", "    found += nonfinite(v);\n", "", "sm_80"),
        ("slerp.cu", "(bits & 0x7f80u) == 0x7f80u", "(bits & 0x7fffu) > 0x7f80u", "sm_80"),
        ("ring.cuh", "addresses % 16 == 0", "addresses % 8 == 0", "sm_80"),
        ("ring.cuh", 'asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");', "", "sm_90a"),
        ("ring.cuh", "    }\n    __syncthreads();\n  }\n#else", "    }\n  }\n#else", "sm_90a"),
        ("slerp.cu", "cvt.rn.bf16x2", "cvt.rz.bf16x2", "sm_80"),
        ("slerp.cu", "segment.a | segment.b | segment.out", "segment.a | segment.b", "sm_80"),
        ("slerp.cu", "segment.a | segment.b, segment.count", "segment.a, segment.count", "sm_80"),
        ("slerp.cu", "return __dadd_rn(sum, error)", "return sum", "sm_80"),
        ("coefficients.cuh", "STRAIGHT_ABOVE = 0.9995", "STRAIGHT_ABOVE = 0.99", "sm_80"),
        ("coefficients.cuh", "quarter & 2 ? -result : result", "result", "sm_80"),
    ],
)
def test_faults_show(file: str, old: str, new: str, target: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc" / "cuda", tmp_path, dirs_exist_ok=True)
    text = (tmp_path / file).read_text()
    assert text.count(old) == 1
    (tmp_path / file).write_text(text.replace(old, new))
    assert any(wrong(target, tmp_path, seed) for seed in range(4))


@needs_nvcc
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_without_a_fault_nothing_shows(target: str) -> None:
    assert not wrong(target, ROOT / "csrc" / "cuda", seed=0)


# ---- the launcher


def test_a_batch_holds_whole_tensors_and_half_of_the_cache() -> None:
    assert batches_of([SEGMENT], 1) == [0, 1]
    assert batches_of([SEGMENT, SEGMENT + 1, 0, 5], 1) == [0, 1, 3, 5]  # an empty one fills nothing
    assert batches_of([SEGMENT] * 4, 8 * 2 * SEGMENT) == [0, 2, 4]


def test_traffic_falls_where_inputs_stay_in_the_cache() -> None:
    elements = GEMMA_2[0].elements()
    assert (len(elements), sum(elements)) == (288, 2_614_341_888)
    assert traffic(elements, 0) == pytest.approx(10.0)
    assert traffic([1000], 1 << 20) == pytest.approx(6.0)
    # Predicted for a model of 2.6B, with L2 caches of 50 and 126 MB.
    assert traffic(elements, 50_000_000) == pytest.approx(8.7, abs=0.05)
    assert traffic(elements, 126_000_000) == pytest.approx(7.5, abs=0.05)


def test_traffic_is_that_of_a_cache_that_keeps_what_was_used_last() -> None:
    elements = [SEGMENT * count for count in (3, 1, 40, 2, 2, 25, 7)]
    for cache_bytes in (1, 10 * 4 * SEGMENT, 60 * 4 * SEGMENT, 1000 * 4 * SEGMENT):
        kept: OrderedDict[int, None] = OrderedDict()
        moved, room = 0, L2_SHARE * cache_bytes // (4 * SEGMENT)
        starts = batches_of(elements, cache_bytes)
        for start, end in itertools.pairwise(starts):
            for segment in [*range(start, end), *reversed(range(start, end))]:
                moved += 4 if segment not in kept else 0
                kept[segment] = None
                kept.move_to_end(segment)
                while len(kept) > room:
                    kept.popitem(last=False)
        assert traffic(elements, cache_bytes) == pytest.approx(2 + moved * SEGMENT / sum(elements)), cache_bytes


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
