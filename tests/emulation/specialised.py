"""Attention for sm_90 with faults in its source or in its compiled code, for test_attention_hopper.py.

In a process of its own, as ptx/cases.py: `python -m emulation.specialised` prints a JSON object for each fault.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from cases import Random, disagreement
from cases.attention import build
from emulation.emulator import emulating
from emulation.planted import KERNELS, loaded
from emulation.ptx.cases import without
from emulation.ptx.program import Fault

MODULE = "attention_hopper"
# Five tiles of keys for two stages; rows and keys that end within a tile; the last tokens of two sequences.
PLAIN: dict[str, Any] = {"sequences": ((3, 70), (66, 300)), "heads": (2, 1), "head_dim": 128, "slots": 320}
RING: dict[str, Any] = {"sequences": ((40, 600), (3, 200)), "heads": (2, 1), "head_dim": 128, "slots": 192}
RING |= {"window": 100, "loud": 2.0}


def attend(arguments: dict[str, Any], edit: Callable[[str], str] | None = None) -> dict[str, Any]:
    """The kernel and the error of a call."""
    call = build(Random(), **arguments)
    truths = call.expected()
    with emulating("sm_90", edit=edit) as executions:
        call.launch()
    return {
        "kernel": executions[0].name,
        "error": max(disagreement(call.outputs[name], truth) for name, truth in truths.items()),
    }


@contextmanager
def _planted(right: str, wrong: str) -> Iterator[None]:
    source = (KERNELS / f"{MODULE}.py").read_text()
    assert source.count(right) >= 1, f"{MODULE}.py has no {right!r}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{MODULE}.py")
        file.write_text(source.replace(right, wrong))
        with mock.patch.dict(sys.modules, {f"arcmerge.kernels.{MODULE}": loaded(MODULE, file)}):
            yield


def changed(pattern: str, which: int, change: Callable[[int], int]) -> Callable[[str], str]:
    """An edit of the last number of one of the instructions that match."""

    def edit(text: str) -> str:
        found = list(re.finditer(rf"({pattern}[^;]*, )(\d+);", text))[which]
        return f"{text[: found.start()]}{found[1]}{change(int(found[2]))};{text[found.end() :]}"

    return edit


WAIT, FENCE, ARRIVAL = r"waitLoop:[^}]*", r"fence\.proxy\.async[^;]*;", r"@%p\d+ mbarrier\.arrive\.shared[^;]*;"
COMPILED: dict[str, Callable[[str], str]] = {
    **{f"no wait at an mbarrier, {place}": without(WAIT, place) for place in (0, 1, 2, 3, 6, 8)},
    **{f"no fence of proxies, {place}": without(FENCE, place) for place in range(4)},
    **{f"no arrival, {place}": without(ARRIVAL, place) for place in (0, 2)},
    "no wait for products": without(r"wgmma\.wait_group[^;]*;", 2),
    "one arrival too many": changed(r"mbarrier\.init", 2, lambda count: count + 1),
    "one warpgroup frees a stage": changed(r"mbarrier\.init", 2, lambda count: count - 1),
    "half of the bytes announced": changed("expect_tx", 1, lambda size: size // 2),
    "no barrier before the products": without(r"bar\.sync[^;]*;", 0),
    "no barrier of the warps that free a stage": without(r"bar\.sync[^;]*;", 2),
    "no barrier after the unseen values": without(r"bar\.sync[^;]*;", 15),
}
SOURCE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "unseen values stay": ("inside = ((position >= first) & (position < high))", "inside = (position >= 0)", PLAIN),
    "a ring without an end": ("begin % slots", "begin", RING),
    "tiles that leave the ring": ("slots % 128 == 0", "slots > 0", RING),
    "stages are free at first, but not so later": ("number // STAGES & 1 ^ 1", "1", PLAIN),
    "sums do not decay": ("total * decay + ", "total + ", PLAIN),
    "values do not decay": ("weighted = weighted * gl", "weighted = weighted + 0.0 * gl", PLAIN),
    "the window has a key too many": ("> position[:, None] - window)", ">= position[:, None] - window)", RING),
    "tiles before the window's end are whole": ("(begin < whole) | ", "", RING),
    "every sequence has the keys of the first": ("head = sequence * ", "head = 0 * ", PLAIN),
}


def main() -> None:
    faults: list[tuple[str, Any, Callable[[], dict[str, Any]]]] = [
        ("right", nullcontext(), partial(attend, PLAIN)),
        ("misaligned", nullcontext(), partial(attend, {**PLAIN, "skip": 4})),
        *((name, nullcontext(), partial(attend, PLAIN, edit)) for name, edit in COMPILED.items()),
        *((name, _planted(right, wrong), partial(attend, call)) for name, (right, wrong, call) in SOURCE.items()),
    ]
    for name, surroundings, run in faults:
        with surroundings:
            try:
                facts = run()
            except Fault as fault:
                facts = {"fault": str(fault)}
        print(json.dumps({"name": name, **facts}), flush=True)


if __name__ == "__main__":
    main()
