"""What PTX says about the time of a kernel besides counts: loads that wait for each other, operands in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# Operations on bfloat16 of a multiprocessor in a clock cycle: "H100 Tensor Core GPU Architecture" white paper; HGX B200
# data sheet. A pass over shared memory serves 128 bytes a cycle.
OPERATIONS_A_CYCLE = {"sm_90": 4096, "sm_100": 8192}
BYTES_A_CYCLE = 128

_REGISTER = re.compile(r"%[a-z]+\d+")
_LABEL = re.compile(r"^\$?[\w.]+:$")
_WRITES_NOTHING = ("st.", "red.", "bra", "bar.", "barrier.", "cp.async", "ret", "exit", "fence", "membar", "wgmma.wait")
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.\w+\.\w+\s*\{[^}]*\},\s*([{%])")
_TCGEN05 = re.compile(r"tcgen05\.mma\.\S+\s*\[[^\]]*\],\s*([\[%])[^,]*,\s*%\w+,\s*(%?\w+)")


class Statement(NamedTuple):
    """guard: the predicate, or "". opcode: "" for a label, whose name is `rest`."""

    guard: str
    opcode: str
    rest: str


def statements(ptx: str) -> Iterator[Statement]:
    """The instructions and labels of PTX, in their order."""
    ptx = re.sub(r"//[^\n]*|^\s*\.(?:loc|file|pragma|section)\b[^\n]*", "", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"^(\s*\$?[\w.]+:)(?!:)", r"\1;", ptx, flags=re.MULTILINE)
    for statement in re.split(r";", ptx):
        text = " ".join(statement.split()).lstrip("{} ")
        if _LABEL.match(text):
            yield Statement("", "", text[:-1])
        elif found := re.match(r"(?:@!?(%\w+) )?([a-z][\w.:]*)(?: (.*))?$", text):
            yield Statement(found[1] or "", found[2], found[3] or "")


class _State(NamedTuple):
    """Depths at a place of the program: of the branches and barriers before it, of shared memory, of copies to shared
    memory that no one has waited for, and of stores to global memory."""

    control: int = 0
    shared: int = 0
    copied: int = 0
    stored: int = 0

    def joined(self, other: _State | None) -> _State:
        return self if other is None else _State(*map(max, self, other))


def dependent_loads(ptx: str) -> int:
    """The longest chain of accesses to global memory in which each waits for the one before.

    An access waits for the values in its address, and for the branches and barriers before it. Values pass through
    registers and through shared memory. An atomic operation with a release waits for the stores before it. A loop
    counts once, and its copies to shared memory start when the loop does: later ones are bounded by the bytes in
    flight.
    """
    code = list(statements(ptx))
    loops = _loops(code)
    starts = {loop.start: _State() for loop in loops}
    waiting: dict[str, _State] = {}  # the states in which branches go to a label
    depth: dict[str, int] = {}
    state: _State | None = _State()
    longest = 0
    for place, (guard, opcode, rest) in enumerate(code):
        if not opcode:
            joined = waiting.pop(rest, None)
            state = joined if state is None else state.joined(joined)
            starts[place] = state or _State()
            continue
        if state is None:  # after a branch that is always taken
            continue
        parts = opcode.split(".")
        registers = _REGISTER.findall(rest)
        split = 0 if opcode.startswith(_WRITES_NOTHING) else _results(rest)
        results, sources = registers[:split], [guard, *registers[split:]]
        here = max(depth.get(source, 0) for source in sources)
        if parts[0] in ("ld", "atom") and "global" in parts:
            releases = parts[0] == "atom" and ("acq_rel" in parts or "release" in parts)
            here = max(here, state.control, state.stored if releases else 0) + 1
        elif opcode.startswith("cp.async") and "global" in opcode:
            entered = [starts[loop.start].control for loop in loops if place in loop]
            state = state._replace(copied=max(state.copied, max(here, min(entered, default=state.control)) + 1))
        elif opcode.startswith("cp.async.wait") or "try_wait" in opcode:
            state = state._replace(shared=max(state.shared, state.copied))
        elif parts[0] in ("st", "red") and "global" in parts:
            state = state._replace(stored=max(state.stored, here + 1, state.control + 1))
        elif parts[0] == "st" and "shared" in opcode:
            state = state._replace(shared=max(state.shared, here))
        elif "shared" in opcode or parts[0] in ("wgmma", "tcgen05"):
            here = max(here, state.shared)
        elif parts[0] in ("bar", "barrier"):
            state = state._replace(control=max(state.control, state.shared))
        elif parts[0] == "bra":
            state = state._replace(control=max(state.control, here))
        for result in results:
            # A register is written again in a loop or under a guard: then either value may be read.
            depth[result] = max(here, depth.get(result, 0))
        longest = max(longest, here, state.copied)
        if parts[0] == "bra":
            waiting[rest] = state.joined(waiting.get(rest))
            state = state if guard else None
    return longest


def _loops(code: list[Statement]) -> list[range]:
    """The places of a loop: from a label to a branch back to it."""
    labels = {rest: place for place, (_, opcode, rest) in enumerate(code) if not opcode}
    return [
        range(labels[rest], place)
        for place, (_, opcode, rest) in enumerate(code)
        if opcode.startswith("bra") and labels.get(rest, place) < place
    ]


def _results(rest: str) -> int:
    """How many registers at the start of the operands are written."""
    group = re.match(r"\{([^}]*)\}", rest)
    return len(_REGISTER.findall(group[1] if group else rest.partition(",")[0]))


def operand_stretch(ptx: str, target: str) -> float:
    """How much longer the matrix instructions of groups of warps take because they read operands from shared memory.

    Such an instruction multiplies a tile A of 64 (wgmma) or M (tcgen05) rows, from shared memory or not, with a tile B
    from shared memory. It takes the longer of the cycles of the products and those of the bytes of A and B.
    Instructions in loops stand for all, where there are loops. 1.0 if there is no such instruction.
    """
    products = passes = 0.0
    for rows, columns, depth, reads_a in _group_products(ptx):
        cycles = 2 * rows * columns * depth / OPERATIONS_A_CYCLE[target]
        products += cycles
        passes += max(cycles, 2 * depth * (columns + rows * reads_a) / BYTES_A_CYCLE)
    return passes / products if products else 1.0


def _group_products(ptx: str) -> list[tuple[int, int, int, bool]]:
    """(rows, columns, depth, whether A is in shared memory) of each instruction; only of those in loops if any are."""
    code = list(statements(ptx))
    loops = _loops(code)
    constants = {
        found[1]: int(found[2])
        for _, opcode, rest in code
        if opcode == "mov.b32" and (found := re.fullmatch(r"(%\w+), (\d+)", rest))
    }
    found = []
    for place, (_, opcode, rest) in enumerate(code):
        text = f"{opcode} {rest}"
        if match := _WGMMA.match(text):
            product = 64, int(match[1]), int(match[2]), match[3] == "%"
        elif match := _TCGEN05.match(text):
            # The instruction descriptor has N / 8 in bits 17 to 22 and M / 16 in bits 24 to 28; bfloat16 has K = 16.
            descriptor = constants[match[2]] if match[2] in constants else int(match[2])
            product = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8, 16, match[1] == "%"
        else:
            continue
        found.append((any(place in loop for loop in loops), product))
    inside = [product for looped, product in found if looped]
    return inside or [product for _, product in found]
