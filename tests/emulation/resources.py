"""Resources of GPUs: limits of compiled kernels, and peaks from which a roofline is predicted.

Sources. Limits, and results a clock cycle of a multiprocessor: NVIDIA, CUDA C++ Programming Guide 13, "Technical
Specifications per Compute Capability" and "Throughput of Native Arithmetic Instructions"; AMD, "CDNA 3 Instruction Set
Architecture" and the ROCm documentation, "Accelerator and GPU hardware specifications". Peaks: what NVIDIA publishes
for the boost clock, for dense matrices of bfloat16 accumulated in float32: "A100 Tensor Core GPU" data sheet (80 GB,
SXM), "H100 Tensor Core GPU Architecture" white paper (SXM5), "H200 Tensor Core GPU" data sheet (SXM: the H100's chip
with other memory), "Ada GPU Architecture" white paper (RTX 4090, appendix A), "HGX B200" data sheet, an eighth of a
board (its figures with sparsity are halved; it does not name the multiprocessors, of which drivers report 148).

What kernels attain of these peaks, as measured by others. Matrices: the fastest product of bfloat16 in a table of
PyTorch's matmul over many shapes, https://github.com/stas00/ml-engineering, compute/accelerator ("MAMF", which we could
not read again to verify it; the H200 is said to be the same as the H100). A GPU lowers its clock when all matrix units
are busy, to stay within its power, so that the peaks at the boost clock cannot be sustained. DRAM: 3.0 TB/s on an H100,
the rate of the reductions of QuACK, https://github.com/Dao-AILab/quack; 921 GB/s of reads on an RTX 4090,
https://github.com/xytpai/nvbench. A machine of which we found no figure takes the lowest share of the others, and the
H200 that of the H100. Multiplication by warps: arXiv:2402.13499 measures that `mma.sync` attains 62.9% of the peak of
an H100; a multiprocessor of a B200 is assumed to execute as many of these a cycle, which is half of that share.
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
        bandwidth: of DRAM, bytes a second. memory: its bytes; cache: those of L2.
        tensor: operations a second on matrices of bfloat16.
        fp32: operations a second, two for a multiply-add.
        *_lanes: results a clock cycle of a multiprocessor.
        attained_bandwidth, attained_tensor: shares of these two peaks that kernels were measured to attain.
        by_warps: the share of `tensor` that `mma.sync` attains; the rest needs instructions of groups of warps.
    """

    name: str
    target: str
    multiprocessors: int
    bandwidth: float
    tensor: float
    fp32: float
    fp32_lanes: int
    fp64_lanes: int
    memory: float
    cache: float
    attained_bandwidth: float
    attained_tensor: float
    by_warps: float = 1.0
    special_lanes: int = 16

    @property
    def clock(self) -> float:
        """The clock rate in Hz at which the float32 units have their peak."""
        return self.fp32 / (2 * self.fp32_lanes * self.multiprocessors)

    @property
    def limits(self) -> Limits:
        return LIMITS[self.target]


_A100, _H100, _B200 = 271.2 / 312, 794.5 / 989.4, 1745 / 2250
_DRAM = 3.0 / 3.35

MACHINES = (
    Machine("A100", "sm_80", 108, 2.039e12, 312e12, 19.5e12, 64, 32, 80e9, 40e6, _DRAM, _A100),
    Machine("H100", "sm_90", 132, 3.35e12, 989.4e12, 66.9e12, 128, 64, 80e9, 50e6, _DRAM, _H100, 0.629),
    Machine("H200", "sm_90", 132, 4.8e12, 989.4e12, 66.9e12, 128, 64, 141e9, 50e6, _DRAM, _H100, 0.629),
    Machine("RTX 4090", "sm_89", 128, 1.008e12, 165.2e12, 82.6e12, 128, 2, 24e9, 72e6, 921 / 1008, _B200),
    Machine("B200", "sm_100", 148, 7.7e12, 2250e12, 75e12, 128, 64, 180e9, 126e6, _DRAM, _B200, 0.629 / 2),
)
