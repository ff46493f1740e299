"""The rule of kernels/dependent_launch.py, checked on PTX: nothing is read or written before the wait."""

from __future__ import annotations

from .ptx.program import Instruction, Program, parse

# What touches memory. Parameters, shared memory and tensor memory belong to a block alone.
_MEMORY = {"ld", "ldu", "st", "atom", "red", "cp", "tensormap", "multimem"}
_OWN = {"param", "shared", "shared::cta"}


def early_accesses(ptx: str) -> list[str]:
    """The instructions by which a kernel that starts before earlier ones have ended breaks the rule.

    They are accesses to global memory on a way that does not lead past the wait, and branches and returns that lead
    around it. So if there are none, every thread comes to the wait before it touches memory, and before it ends.
    """
    program = parse(ptx)
    wait = next((n for n, each in enumerate(program.instructions) if _waits(each)), len(program.instructions))
    return [each.text for each in program.instructions[:wait] if _touches(each) or _leaves(each, program, wait)]


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
