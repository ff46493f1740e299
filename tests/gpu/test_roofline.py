"""The predicted times: occupancy computed by hand, each resource as the bottleneck in turn, launches and latencies."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod

import pytest

from emulation.ptx.counts import Counts
from emulation.resources import LIMITS, MACHINES, Machine
from emulation.roofline import (
    LATENCY,
    NODE,
    SAMPLES,
    Code,
    Work,
    overlapped,
    predict,
    predict_call,
    resident_blocks,
    roof,
    sampled,
    work,
)

A100, H100 = MACHINES[:2]
CODE = Code(warps=4, registers=32, shared=0, in_flight=8192)
IDLE = Work(blocks=108 * 16, l2_bytes=0, tensor=0, fp32=0, fp64=0, special=0, issue=0, shared=0)
SHORTEST = NODE + LATENCY

every_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "blocks"),
    [
        ("sm_80", 32, 0, 4, 16),  # 64 warps
        ("sm_80", 33, 0, 4, 12),  # 40 registers are allocated: 12 warps of a partition's 16384
        ("sm_80", 255, 0, 8, 1),  # 8192 for a warp: two warps of a partition
        ("sm_80", 168, 0, 4, 3),  # 5376: three warps of a partition
        ("sm_80", 32, 68 << 10, 4, 2),  # 164 KiB for twice 69
        ("sm_80", 32, 163 << 10, 4, 1),
        ("sm_80", 32, (163 << 10) + 1, 4, 0),
        ("sm_80", 32, 0, 1, 32),
        ("sm_86", 32, 0, 1, 16),
        ("sm_89", 32, 0, 1, 24),
        ("sm_89", 32, 0, 4, 12),  # 48 warps
        ("sm_90", 32, 100 << 10, 4, 2),
        ("sm_90", 255, 0, 16, 0),  # 65536 registers would be 128 for a thread
    ],
)
def test_resident_blocks(target: str, registers: int, shared: int, warps: int, blocks: int) -> None:
    assert resident_blocks(LIMITS[target], registers, shared, warps) == blocks


@every_machine
def test_a_copy_gets_what_copies_were_measured_to_get(machine: Machine) -> None:
    code = replace(CODE, in_flight=1 << 20)
    found = predict(machine, code, replace(IDLE, blocks=machine.multiprocessors * 16), 1e10)
    assert found.bound == "dram"
    assert roof(machine, 10**10, 0) / (found.seconds - NODE) == pytest.approx(machine.attained_bandwidth)


def test_few_bytes_under_way_do_not_fill_dram() -> None:
    one_block = replace(IDLE, blocks=1)
    assert predict(A100, CODE, one_block, 8).seconds == pytest.approx(NODE + LATENCY)
    assert predict(A100, CODE, one_block, 8192).seconds == pytest.approx(NODE + LATENCY)
    assert predict(A100, CODE, one_block, 2 * 8192).seconds == pytest.approx(NODE + 2 * LATENCY)
    # Sixteen blocks are resident: more of them in the grid put no more bytes under way.
    full, larger = replace(IDLE, blocks=108 * 16), replace(IDLE, blocks=108 * 64)
    slow = replace(CODE, in_flight=256)
    assert predict(A100, slow, full, 1e9).seconds == predict(A100, slow, larger, 1e9).seconds
    assert predict(A100, slow, full, 1e9).seconds == pytest.approx(NODE + 1e9 * LATENCY / (108 * 16 * 256))
    # Registers keep blocks out: the bytes under way go with them.
    heavy = replace(slow, registers=255)
    assert predict(A100, heavy, full, 1e9).seconds == pytest.approx(NODE + 1e9 * LATENCY / (108 * 2 * 256))


@pytest.mark.parametrize(
    ("resource", "amount", "seconds"),
    [
        ("l2_bytes", 1e9, 1e9 / (108 * 64 * 1.41e9)),
        ("tensor", 312e9, 1e-3 / A100.attained_tensor),
        ("fp32", 1e9, 1e9 / (19.5e12 / 2)),
        ("fp64", 1e9, 1e9 / (9.7e12 / 2)),
        ("special", 1e9, 1e9 / (108 * 16 * 1.41e9)),
        ("issue", 1e9, 1e9 / (108 * 4 * 1.41e9)),
        ("shared", 1e9, 1e9 / (108 * 1.41e9)),
    ],
)
def test_each_resource_can_decide(resource: str, amount: float, seconds: float) -> None:
    found = predict(A100, CODE, replace(IDLE, **{resource: amount}), 1.0)
    assert found.bound == resource.removesuffix("_bytes")
    assert found.seconds - NODE == pytest.approx(seconds, rel=0.01)


def test_the_busiest_multiprocessor_decides() -> None:
    def seconds(blocks: int) -> float:
        return predict(A100, CODE, replace(IDLE, blocks=blocks, issue=1e6 * blocks), 1.0).seconds - NODE

    assert seconds(1) == pytest.approx(seconds(108))
    assert seconds(109) == pytest.approx(2 * seconds(108))
    assert seconds(216) == pytest.approx(2 * seconds(108))


def test_what_does_not_fit_is_not_predicted() -> None:
    with pytest.raises(ValueError, match="does not fit on a A100"):
        predict(A100, replace(CODE, shared=200 << 10), IDLE, 1.0)


def test_launches_of_a_call_add_up() -> None:
    long, short = replace(IDLE, l2_bytes=3e9), replace(IDLE, l2_bytes=1e9)
    seconds, longest = predict_call(A100, [CODE, CODE], [short, long], 4e9)
    assert longest == predict(A100, CODE, long, 3e9)
    assert seconds == longest.seconds + predict(A100, CODE, short, 1e9).seconds


@every_machine
def test_no_launch_is_shorter_than_a_node_and_a_latency(machine: Machine) -> None:
    found = predict(machine, CODE, replace(IDLE, blocks=1), 0.0)
    assert (found.seconds, found.bound) == (pytest.approx(SHORTEST), "launch")


def test_each_access_that_waits_for_another_adds_a_latency() -> None:
    chain = [predict(A100, replace(CODE, dependent_loads=count), IDLE, 8.0) for count in range(6)]
    assert [found.seconds - SHORTEST for found in chain] == pytest.approx([0, 0, *(LATENCY * n for n in range(1, 5))])
    assert [found.bound for found in chain] == ["launch", "launch", "launch", *["latency"] * 3]


def test_one_part_takes_the_sum_and_many_take_the_longest() -> None:
    assert overlapped((3.0, 1.0, 2.0), 1) == pytest.approx(6.0)
    assert overlapped((3.0, 1.0, 2.0), 1000) == pytest.approx(3.0, rel=0.01)
    # Two equal stations: two parts are at different ones in two of three moments (Reiser and Lavenberg).
    assert overlapped((1.0, 1.0), 2) == pytest.approx(1.5)
    assert overlapped((1.0, 1.0), 3) == pytest.approx(4 / 3)
    times = [overlapped((3.0, 1.0, 2.0), parts) for parts in range(1, 20)]
    assert times == sorted(times, reverse=True)
    assert overlapped((0.0, 0.0), 4) == 0.0


def test_a_block_of_groups_does_not_overlap_with_itself() -> None:
    both = replace(IDLE, blocks=132, tensor=1e10, special=1e8)
    alone = replace(CODE, warps=8, shared=150 << 10)  # one block fits
    in_step = predict(H100, replace(alone, by_groups=True), both, 1.0)
    products, scalars = in_step.needs["tensor"], in_step.needs["special"]
    assert in_step.seconds - NODE == pytest.approx(products + scalars)
    # The two groups of a kernel in which they take turns overlap in part, but the clock cannot be beaten.
    in_turns = predict(H100, replace(alone, by_groups=True, parts=2), both, 1.0)
    assert max(products, scalars) < in_turns.seconds - NODE < products + scalars


@pytest.mark.parametrize(("by_groups", "share"), [(False, H100.by_warps), (True, H100.attained_tensor)])
def test_warps_cannot_use_all_of_the_matrix_units_of_hopper(by_groups: bool, share: float) -> None:
    found = predict(H100, replace(CODE, by_groups=by_groups), replace(IDLE, blocks=132, tensor=989.4e9), 1.0)
    assert found.needs["tensor"] == pytest.approx(1e-3 / share)


def test_operands_in_shared_memory_stretch_products() -> None:
    work = replace(IDLE, blocks=132, tensor=989.4e9)
    code = replace(CODE, by_groups=True)
    needs = [
        predict(H100, replace(code, operand_stretch=stretch), work, 1.0).needs["tensor"] for stretch in (1.0, 1.25)
    ]
    assert needs[1] == pytest.approx(1.25 * needs[0])


def test_counts_of_a_sample_stand_for_all_blocks() -> None:
    counts = Counts(shared_wavefronts=7, mma_flops=1000, atomics=9, global_atomics=5)
    counts.loads.sectors, counts.stores.sectors = 60, 4
    counts.instructions.update(
        {
            "fma.rn.f32": 3,
            "add.rn.f32x2": 2,  # two results
            "max.f32": 1,
            "ex2.approx.ftz.f32": 4,
            "div.full.f32": 1,
            "fma.rn.f64": 5,
            "cvt.f64.f32": 1,
            "add.s32": 8,
            "ld.global.v4.b32": 2,
            "setp.lt.f32": 1,
        }
    )
    assert work(counts, ran=2, blocks=6) == Work(
        blocks=6, l2_bytes=3 * 69 * 32, tensor=3000, fp32=3 * 8 * 32, fp64=3 * 6 * 32, special=3 * 5 * 32, issue=3 * 28,
        shared=21,
    )  # fmt: skip


def test_groups_of_warps_need_no_loads_of_fragments() -> None:
    counts = Counts(shared_wavefronts=50, mma_flops=1000)
    name = "ldmatrix.sync.aligned.m8n8"
    counts.instructions.update({f"{name}.x4.shared.b16": 6, f"{name}.x2.trans.shared.b16": 3, "mma.sync.aligned": 9})
    counts.instructions["add.s32"] = 2
    by_warps, by_groups = (work(counts, 1, 1, by_groups=groups) for groups in (False, True))
    assert (by_warps.issue, by_warps.shared) == (20, 50)
    assert by_groups == replace(by_warps, issue=2, shared=50 - 4 * 6 - 2 * 3)


def test_operands_of_groups_are_not_counted_twice() -> None:
    # They stretch the products instead.
    counts = Counts(shared_wavefronts=50, mma_flops=1000)
    counts.count_units(30 * 128)
    assert work(counts, 1, 1).shared == 50


@pytest.mark.parametrize("count", SAMPLES[:2])
def test_samples_stand_for_a_grid(count: int) -> None:
    for grid in product((1, 3, 64, 1000), (1, 8, 256), (1, 2, 40)):
        blocks = sampled(count)(grid)
        assert len(blocks) <= count
        assert all(0 <= place < size for block in blocks for place, size in zip(block, grid, strict=True))
        if prod(grid) <= count:
            assert len(blocks) == prod(grid)
        for axis, size in enumerate(grid):
            if size >= count:
                # As the work of causal attention grows along an axis, so does that of the sample.
                assert sum(block[axis] for block in blocks) / count == pytest.approx((size - 1) / 2, abs=0.6)
                assert len({block[axis] for block in blocks}) == count


@every_machine
def test_published_figures_agree_with_each_other(machine: Machine) -> None:
    # The four tensor units of a multiprocessor multiply and add so many pairs a cycle; boosted clocks differ by use.
    pairs = {"sm_80": 1024, "sm_89": 256, "sm_90": 2048, "sm_100": 4096}[machine.target]
    assert machine.tensor == pytest.approx(2 * pairs * machine.multiprocessors * machine.clock, rel=0.09)
    assert 1.4e9 < machine.clock < 2.6e9
