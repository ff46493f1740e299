"""The rule of kernels/dependent_launch.py, checked on PTX: nothing is read or written before the wait."""

from __future__ import annotations

from .ptx.program import Instruction, Program, parse

# What touches memory. Parameters, shared memory and tensor memory belong to a block alone.
_MEMORY = {"ld", "ldu", "st", "atom", "red", "cp", "tensormap", "multimem"}
_OWN = {"param", "shared", "shared::cta"}


def early_accesses(ptx: str) -> list[str]:
    """The instructions by which a kernel that starts before earlier ones have ended breaks the rule.

    They are accesses to global memory on a way that does not lead past the wait, and branches and returns that lead
    around it. So if there are none, every thread comes to the wait before it touches memory, and before it ends; or to
    a barrier, where it waits for threads that have come to the wait: thus start the warps of a specialised kernel.
    """
    program = parse(ptx)
    wait = next((n for n, each in enumerate(program.instructions) if _waits(each)), len(program.instructions))
    before = program.instructions[:wait]
    joined = not any(map(_is_barrier, before))  # else the threads at the wait may have left the barrier behind
    return [
        each.text
        for each in before
        if _touches(each) or (_leaves(each, program, wait) and not (joined and _comes_to_barrier(each, program)))
    ]


def _is_barrier(instruction: Instruction) -> bool:
    return instruction.parts[0] in ("bar", "barrier") and "sync" in instruction.parts


def _comes_to_barrier(branch: Instruction, program: Program) -> bool:
    """Whether a branch leads to a barrier before any access to memory, condition or end."""
    place = program.labels.get(str(branch.operands[0])) if branch.parts[0] == "bra" else None
    for _ in program.instructions:
        if place is None or place >= len(program.instructions):
            return False
        instruction = program.instructions[place]
        if _is_barrier(instruction):
            return instruction.predicate is None
        jumps = instruction.parts[0] == "bra" and instruction.predicate is None
        if _touches(instruction) or (not jumps and instruction.parts[0] in ("bra", "brx", "ret", "exit", "trap")):
            return False
        place = program.labels.get(str(instruction.operands[0])) if jumps else place + 1
    return False


def _waits(instruction: Instruction) -> bool:
    return instruction.parts[:2] == ("griddepcontrol", "wait") and instruction.predicate is None


def _touches(instruction: Instruction) -> bool:
    parts = instruction.parts
    return parts[0] in _MEMORY and "prefetch" not in parts and not _OWN & {*parts[1:3]}


def _leaves(instruction: Instruction, program: Program, wait: int) -> bool:
    """Whether control may pass from before the wait to after it, or end."""
    if instruction.parts[0] in ("bra", "brx"):
        target = program.labels.get(str(instruction.operands[0]))
        return target is None or target > wait
    return instruction.parts[0] in ("ret", "exit", "trap")
