"""Resources of GPUs: limits of compiled kernels, and peaks from which a roofline is predicted.

Sources. Limits, and results a clock cycle of a multiprocessor: NVIDIA, CUDA C++ Programming Guide 13, "Technical
Specifications per Compute Capability" and "Throughput of Native Arithmetic Instructions"; AMD, "CDNA 3 Instruction Set
Architecture" and the ROCm documentation, "Accelerator and GPU hardware specifications". Peaks: what NVIDIA publishes
for the boost clock, for dense matrices of bfloat16 accumulated in float32: "A100 Tensor Core GPU" data sheet (80 GB,
SXM), "H100 Tensor Core GPU Architecture" white paper (SXM5), "H200 Tensor Core GPU" data sheet (SXM: the H100's chip
with other memory), "Ada GPU Architecture" white paper (RTX 4090, appendix A), "HGX B200" data sheet, an eighth of a
board (its figures with sparsity are halved; it does not name the multiprocessors, of which drivers report 148).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a multiprocessor and of a block on it. shared: bytes; warps, blocks: resident at a time."""

    shared_block: int
    shared_multiprocessor: int
    warps: int
    blocks: int


LIMITS = {
    "sm_80": Limits(163 << 10, 164 << 10, 64, 32),
    "sm_86": Limits(99 << 10, 100 << 10, 48, 16),
    "sm_89": Limits(99 << 10, 100 << 10, 48, 24),
    "sm_90": Limits(227 << 10, 228 << 10, 64, 32),
    "sm_100": Limits(227 << 10, 228 << 10, 64, 32),
    "sm_120": Limits(99 << 10, 100 << 10, 48, 24),
    "gfx942": Limits(64 << 10, 64 << 10, 32, 32),
}


@dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
        bandwidth: of DRAM, bytes a second.
        tensor: operations a second on matrices of bfloat16.
        fp32: operations a second, two for a multiply-add.
        *_lanes: results a clock cycle of a multiprocessor.
    """

    name: str
    target: str
    multiprocessors: int
    bandwidth: float
    tensor: float
    fp32: float
    fp32_lanes: int
    fp64_lanes: int
    special_lanes: int = 16

    @property
    def clock(self) -> float:
        """The clock rate in Hz at which the float32 units have their peak."""
        return self.fp32 / (2 * self.fp32_lanes * self.multiprocessors)

    @property
    def limits(self) -> Limits:
        return LIMITS[self.target]


MACHINES = (
    Machine("A100", "sm_80", 108, 2.039e12, 312e12, 19.5e12, 64, 32),
    Machine("H100", "sm_90", 132, 3.35e12, 989.4e12, 66.9e12, 128, 64),
    Machine("H200", "sm_90", 132, 4.8e12, 989.4e12, 66.9e12, 128, 64),
    Machine("RTX 4090", "sm_89", 128, 1.008e12, 165.2e12, 82.6e12, 128, 2),
    Machine("B200", "sm_100", 148, 7.7e12, 2250e12, 75e12, 128, 64),
)
