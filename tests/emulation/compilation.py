"""Compile the kernels of launchers for GPUs that are absent, and check the compiled code: the gate.

The launchers themselves are called, on CPU tensors, with a stand-in for the driver that names the target, so that
options that a launcher forgets are missing here too. A process that interprets kernels cannot compile them; see
prover.py.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .dependence import dependent_loads, operand_stretch
from .early_accesses import early_accesses
from .resources import LIMITS

TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

GROUP_INSTRUCTIONS = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


class Driver:
    """The part of a driver that a launch calls before it has a kernel."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._target]

    def get_current_device(self) -> str:
        return self._target

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: str) -> Iterator[list[CompiledKernel]]:
    """Context manager: launches compile for `target` and run nothing; yields a list, to which every kernel is added."""
    kernels: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(function: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        kernels.append(run(function, *arguments, grid=grid, warmup=True, **named))

    triton.runtime.driver.set_active(Driver(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        yield kernels


@dataclass(frozen=True)
class Facts:
    """Facts about the code of one configuration of a kernel for one target.

    Attributes:
        configuration: the constants that the launcher chose.
        stack: bytes a thread.
        spills: instructions that access the stack.
        shared: bytes a block.
        wide_loads, ...: instructions that move 16 bytes or more a thread (or whole tiles) between global memory and
            registers or shared memory; narrow ones move less.
        matrix: matrix instructions of the kind that the target should use, `matrix_instruction`.
        matrix_due: whether the kernel multiplies matrices in a format that these take.
        in_flight: bytes that a block requests from global memory before it waits (NVIDIA).
        dependent_loads, operand_stretch: see dependence.py (NVIDIA).
        fused: float32 multiply-adds that round once.
        float_atomics: atomic operations on floating point.
        early_releases: atomic operations that release stores of the whole block, but wait for those of one wave (AMD).
        dependent: whether the launch may start before earlier kernels have ended (NVIDIA).
        early: what such a kernel does before it waits for them, see early_accesses.py.
    """

    kernel: str
    target: str
    configuration: str
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    matrix: int
    matrix_instruction: str
    matrix_due: bool
    in_flight: int
    dependent_loads: int
    operand_stretch: float
    fused: int
    float_atomics: int
    early_releases: int
    dependent: bool = False
    early: int = 0

    def faults(self) -> list[str]:
        """The reasons why a launcher must not choose this configuration."""
        limit = LIMITS[self.target].shared_block
        verdicts = {
            f"{self.spills} accesses to spilled registers": self.spills > 0,
            f"{self.shared} bytes of shared memory, the limit is {limit}": self.shared > limit,
            "matrices are multiplied without matrix instructions": self.matrix_due and self.matrix == 0,
            f"{self.float_atomics} atomic operations on floating point": self.float_atomics > 0,
            f"{self.early_releases} releases of stores that other waves have not finished": self.early_releases > 0,
            f"{self.early} accesses or ends before the wait for earlier kernels": self.early > 0,
        }
        return [fault for fault, found in verdicts.items() if found]

    def __str__(self) -> str:
        return f"{self.kernel} for {self.target} ({self.configuration})"


def narrowed(kernels: Sequence[Mapping[str, Any]], on_sm_80: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kernels of one call that move 16 bytes at a time in the code for sm_80, but not in that for another target.

    Kernels are given by their facts, as in `as_json`.
    """
    return [
        f"no {kind} of 16 bytes, which sm_80 has"
        for kind in ("loads", "stores")
        if any(kernel[f"wide_{kind}"] for kernel in on_sm_80) and not any(kernel[f"wide_{kind}"] for kernel in kernels)
    ]


def describe(kernel: CompiledKernel, target: str) -> Facts:
    """The facts about a compiled kernel."""
    constants = {
        kernel.src.fn.arg_names[path[0]]: value
        for path, value in kernel.src.constants.items()
        if len(path) == 1 and kernel.src.fn.params[path[0]].is_constexpr
    }
    return Facts(
        kernel=kernel.metadata.name,
        target=target,
        configuration=", ".join(f"{name}={short(value)}" for name, value in constants.items()),
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        shared=kernel.metadata.shared,
        matrix_due=_multiplies_matrices(_products(kernel)),
        **(_nvidia(kernel, target) if target.startswith("sm_") else _amd(kernel.asm["amdgcn"])),
    )


def short(value: Any) -> str:
    # A tuple of dtypes prints as ['bf16', 'bf16'] or similarly.
    return re.sub(r"triton\.language\.|[\"']|constexpr\[(.*?)\]", r"\1", str(value))


def _products(kernel: CompiledKernel) -> list[str]:
    """The products of matrices as the source has them; a kernel in Gluon has no code without layouts."""
    code = kernel.asm["ttir" if "ttir" in kernel.asm else "ttgir"]
    return re.findall(r"(?:tt\.dot(?:_scaled)?|ttng\.warp_group_dot) .*", code)


def _multiplies_matrices(products: Sequence[str]) -> bool:
    # Matrix units take float32 as TF32, if the kernel allows it.
    return any("xf32" not in product.partition(" -> ")[0] or "tf32" in product for product in products)


def _rows_of_products(products: Sequence[str]) -> int:
    found = (re.search(r" -> tensor<(?:\d+x)?(\d+)x\d+x", product) for product in products)
    return max((int(rows[1]) for rows in found if rows), default=0)


def _nvidia(kernel: CompiledKernel, target: str) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    usage = _cuobjdump("--dump-resource-usage", kernel.asm["cubin"])
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    # Instructions of a warp group take 64 rows or more of a product; fewer rows need the instruction of a warp.
    grouped = _rows_of_products(_products(kernel)) >= 64 and kernel.metadata.num_warps >= 4
    instruction = (GROUP_INSTRUCTIONS.get(target) if grouped else None) or "mma.sync"
    return {
        "registers": used["REG"],
        "stack": used["STACK"],
        # Registers are spilled to the stack; without a stack, the slow disassembly is not needed.
        "spills": _count(disassembly(kernel), r"\b(?:LDL|STL)\b") if used["STACK"] else 0,
        **_widths("loads", ptx, r"\bld\.global\S*|\bcp\.async\S*\.shared\S*\.global[^;]*"),
        **_widths("stores", ptx, r"\bst\.global\S*|\bcp\.async\.bulk\S*\.global\S*\.shared\S*"),
        "matrix": _count(ptx, rf"\b{re.escape(instruction)}\b"),
        "matrix_instruction": instruction,
        "in_flight": _in_flight(ptx, kernel.metadata),
        "dependent_loads": dependent_loads(ptx),
        "operand_stretch": operand_stretch(ptx, target),
        "fused": _count(ptx, r"\bfma\.rn\S*\.f32"),
        "float_atomics": _count(ptx, r"\b(?:atom|red)\.\S*\.b?f(?:16|32|64)"),
        "early_releases": 0,  # a release after a barrier is one for the block
        "dependent": kernel.metadata.launch_pdl,
        "early": len(early_accesses(ptx)) if kernel.metadata.launch_pdl else 0,
    }


def _in_flight(ptx: str, metadata: Any) -> int:
    """Copies to shared memory fill all stages but the one in use; loads to registers wait at the end of a block."""
    copied = metadata.shared * (metadata.num_stages - 1) // metadata.num_stages if "cp.async" in ptx else 0
    straight = re.split(r"^\$?\w+:|\bbra\b|\bbar\.sync\b", ptx, flags=re.MULTILINE)
    bytes_of_a_thread = max(
        sum(
            int(count or 1) * int(bits) // 8
            for count, bits in re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b", piece)
        )
        for piece in straight
    )
    return max(copied, bytes_of_a_thread * 32 * metadata.num_warps)


def disassembly(kernel: CompiledKernel) -> str:
    """The SASS of a kernel for NVIDIA."""
    return _cuobjdump("--dump-sass", kernel.asm["cubin"])


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def _amd(assembly: str) -> dict[str, Any]:
    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, f"the assembly has no .{name}"
        return int(found[1])

    return {
        "registers": metadata("vgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        "spills": metadata("vgpr_spill_count") + _count(assembly, r"\bscratch_(?:load|store)"),
        **_widths("loads", assembly, r"\b(?:global|buffer|flat)_load_\S+"),
        **_widths("stores", assembly, r"\b(?:global|buffer|flat)_store_\S+"),
        "matrix": _count(assembly, r"\bv_mfma"),
        "matrix_instruction": "v_mfma",
        "in_flight": 0,
        "dependent_loads": 0,
        "operand_stretch": 1.0,
        "fused": _count(assembly, r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)(?:_mix\w*)?_f(?:16|32)"),
        "float_atomics": _count(assembly, r"_atomic_(?:pk_)?(?:add|min|max)_f"),
        "early_releases": _early_releases(assembly),
    }


def _early_releases(assembly: str) -> int:
    """Atomic operations with a release (buffer_wbl2) after a barrier that a wave can reach with stores on their way.

    Without `s_waitcnt vmcnt(0)` a barrier of gfx942 does not wait for stores to global memory, and that of the release
    covers the wave which releases.
    """
    count, stored, passed = 0, False, False
    for line in map(str.strip, assembly.splitlines()):
        if re.match(r"(?:global|buffer|flat)_store", line):
            stored = True
        elif re.match(r"s_waitcnt\b.*\bvmcnt\(0\)", line):
            stored = False
        elif line.startswith("s_barrier"):
            passed = stored
        elif line.startswith("buffer_wbl2"):
            count, stored, passed = count + passed, False, False
    return count


# Instructions that move 16 bytes or more: in PTX, also asynchronously and by tiles (bulk). In AMD's assembly 8 bytes or
# more: a wave has 64 lanes, so that its request is of 512 bytes, too.
WIDE = re.compile(r"\.v4\.[bfu]32|\.v2\.[bfu]64|\.v8\.|\.v4\.[bfu]64|\.b128|bulk|, (?:16|0x10)\b|dwordx[24]")


def _widths(kind: str, code: str, access: str) -> dict[str, int]:
    accesses = re.findall(access, code)
    wide = sum(1 for each in accesses if WIDE.search(each))
    return {f"wide_{kind}": wide, f"narrow_{kind}": len(accesses) - wide}


def _count(code: str, pattern: str) -> int:
    return len(re.findall(pattern, code))


def as_json(facts: Facts) -> dict[str, Any]:
    """The facts, and the faults that the gate finds."""
    return {**asdict(facts), "faults": facts.faults()}
