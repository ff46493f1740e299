"""Faults in the kernels' sources, of kinds that plain cases do not show: each is found in the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from triton.runtime.errors import InterpreterError

from cases import SMALL
from cases.corners import CORNERS
from emulation.evidence import interpreted, interpreted_corner
from emulation.planted import planted
from emulation.traffic import Fault

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU")


def small(op: str, name: str, target: str = "sm_80") -> Callable[[], float]:
    (case,) = (case for case in SMALL if (case.op, case.name) == (op, name))
    return lambda: interpreted(case, target).error


def corner(op: str) -> Callable[[], float]:
    (case,) = (case for case in CORNERS if case.op == op)
    return partial(interpreted_corner, case)


LONG = ".to(tl.int64)"
MOVED = "+ moved\n    token = first_token + row // GROUP\n    present = "
PLANTED: dict[str, tuple[Any, ...]] = {
    # 64-bit offsets.
    "attention, cache": ("attention", f"key_value_head){LONG} * slots", "key_value_head) * slots", corner("attention")),
    "attention, rows": ("attention", f"first_token){LONG} * HEADS", "first_token) * HEADS", corner("attention")),
    "decode": ("attention_decode", f"program_id(2){LONG}", "program_id(2)", corner("attention_decode")),
    "norm": ("rmsnorm", f"program_id(0){LONG}", "program_id(0)", corner("rmsnorm")),
    "norms": ("rmsnorm_add_rmsnorm", f"program_id(0){LONG}", "program_id(0)", corner("rmsnorm_add_rmsnorm")),
    "geglu": ("geglu", f"blocks){LONG}", "blocks)", corner("geglu")),
    "rope": ("rope_cache", f"program_id(0){LONG}", "program_id(0)", corner("rope_cache")),
    "head": ("lm_head", f"rows{LONG}[:, None] * D", "rows[:, None] * D", corner("lm_head_argmax")),
    "head, marks": ("lm_head", f"words = rows{LONG}", "words = rows", corner("lm_head_sample")),
    "head, weight": ("lm_head", f"tl.minimum(ids, V - 1){LONG}", "tl.minimum(ids, V - 1)", corner("lm_head_sample")),
    "head, tiles": ("lm_head", f"row{LONG} * tl.cdiv", "row * tl.cdiv", corner("lm_head_sample")),
    "head, reduction": ("lm_head", f"row{LONG} * tiles", "row * tiles", corner("lm_head_logprob")),
    "linear": ("linear", f"row{LONG}[None, :, None] * K", "row[None, :, None] * K", corner("linear")),
    # Tiles that only one architecture takes.
    "tile of sm_90, 128": (
        "attention",
        '"sm_90": Tile(128, 64, 8, 3),',
        '"sm_90": Tile(128, 128, 8, 2),',
        small("attention", "heads of 128, a ring of 192", "sm_90"),
    ),
    "tile of sm_90, 256": (
        "attention",
        '"sm_90": Tile(128, 32, 8, 3),',
        '"sm_90": Tile(128, 128, 8, 2),',
        small("attention", "heads of 256, a ring of 192", "sm_90"),
    ),
    # Windows and diagonals that end where a tile does.
    **{
        f"{what}, heads of {head}": ("attention", right, wrong, small("attention", f"heads of {head}, {name}"))
        for head in (128, 256)
        for name in ["a window of 70, round tiles"]
        for what, right, wrong in [
            ("whole tiles", "(high - window, 0)", "(high - window - 1, 0)"),
            ("first key, early", "(low - window + 1, 0)", "(low - window, 0)"),
            ("first key, late", "(low - window + 1, 0)", "(low - window + 2, 0)"),
            ("diagonal", "(low + 1) // BLOCK_N", "(low + 2) // BLOCK_N"),
        ]
    },
    # Rows of a tile that belong to the next one, where a group does not divide it.
    "rows": (
        "attention",
        f"{MOVED}((token < tokens) & (row < TOKENS * GROUP))",
        f"{MOVED}(token < tokens)",
        small("attention", "3 heads a group, misaligned"),
    ),
    # Words of marks past the last id.
    "marks": (
        "lm_head",
        "mask=(ids < V)[None, :], other=0)",
        "mask=(ids <= V)[None, :], other=0)",
        small("lm_head_sample", "of the greatest, penalised"),
    ),
    # Ids outside of the vocabulary: any, and those for which the last tile has a place.
    "ids": ("lm_head", 'torch.full_like(out, float("nan"))', "torch.zeros_like(out)", small("lm_head_logprob", "odd")),
    "last ids": (
        "lm_head",
        "(wanted < tl.minimum(BLOCK_V, V - tile * BLOCK_V))",
        "(wanted < BLOCK_V)",
        small("lm_head_logprob", "odd"),
    ),
    # A skipped sequence in a cache of one split.
    "skipped": (
        "attention_decode",
        "        if split == 0:\n            nothing",
        "        if split == 1:\n            nothing",
        small("attention_decode", "f32 heads of 16, round a window of 8"),
    ),
    # Ranks of more than 32 bits.
    "ranks": (
        "cuts",
        "tl.minimum(tl.maximum(rank - tl.load(before_ptr + i), 0), 32767)",
        "tl.maximum(rank - tl.load(before_ptr + i), 0)",
        small("consensus_combine", "2 bf16, cuts among equals"),
        "consensus_combine",
    ),
    # Vectors of 16 bytes.
    **{
        f"alignment, {op}": ("segments", "address % 16", "address % 8", small(op, "2 bf16, 8 bytes past"), op)
        for op in ("gram", "combine", "consensus_combine")
    },
    # What programs tell each other.
    "no barrier": (
        "attention_decode",
        "tl.debug_barrier()",
        "pass",
        small("attention_decode", "heads of 256, round splits"),
    ),
    "relaxed": (
        "attention_decode",
        'sem="acq_rel"',
        'sem="relaxed"',
        small("attention_decode", "heads of 256, 8 splits"),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    module, right, wrong, error, *user = PLANTED[name]
    with planted(module, right, right, tmp_path, *user):
        assert error() <= 1
    with planted(module, right, wrong, tmp_path, *user):
        try:
            found = error()
        except (Fault, InterpreterError):
            return
        assert found > 1


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("number", range(len(CORNERS)), ids=[str(each) for each in CORNERS])
def test_the_far_corner_of_a_large_launch_is_right(number: int, target: str) -> None:
    assert interpreted_corner(CORNERS[number], target) <= 1
