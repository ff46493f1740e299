"""Kernels that others have measured, and what the model predicts for them: the error of the model.

The work of these kernels is counted from what their sources say of tiles, warps and stages, not from compiled code.
Every figure has its source, its GPU and its shape, and says whether we have read it there. None of them was measured by
this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from .dependence import BYTES_A_CYCLE, OPERATIONS_A_CYCLE
from .resources import MACHINES, Machine
from .roofline import Code, Work, predict


@dataclass(frozen=True)
class Source:
    """Where a figure is published.

    Attributes:
        place: the publication, and the table or figure in it.
        read: how we know the figure: one of READINGS.
        remark: what the source does not say.
    """

    place: str
    read: str
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.read}{self.remark and f' ({self.remark})'}"


QUOTED, PLOT, REPORTED, UNVERIFIED = "quoted", "numbers of a plot", "as others report it", "not verified"
READINGS = (QUOTED, PLOT, REPORTED, UNVERIFIED)

FA3 = Source("arXiv:2407.08608, forward speed on an H100 SXM5", PLOT, "the slower of two plots is taken as causal")
FA2 = Source("arXiv:2307.08691, abstract", QUOTED, "up to 73% of the peak, of a size of heads that is not named")
TRITON = Source("pytorch/benchmark #2391, table", QUOTED, "the mask is not named; not causal by its other column")
MAMF = Source("stas00/ml-engineering, compute/accelerator, table of MAMF", UNVERIFIED)
FLASHINFER = Source(
    "vllm-project/flash-attention #63, first table, column FlashInfer",
    QUOTED,
    "keys may be in L2; heads are those of Qwen 32B on two GPUs; the GPU is taken to be an H100",
)
HAZY = Source("Hazy Research, Look Ma, No Bubbles, 2025-05-27", QUOTED, "at most half of the bandwidth")
QUACK = Source("Guo, Zadouri, Dao: Getting Memory-bound Kernels to Speed-of-Light, 2025-07-10", REPORTED, "softmax")
NCCL = Source("NVIDIA/nccl #1264, p2pBandwidthLatencyTest, P2P disabled, GPU 5 to itself", QUOTED)
SAMPLES = Source("NVIDIA/cuda-samples #392, p2pBandwidthLatencyTest, GPU 0 to itself", QUOTED)
NVBENCH = Source("xytpai/nvbench, README, global_memory_bandwidth, float 4", QUOTED)

A100, H100, _, RTX_4090, B200 = MACHINES


@dataclass(frozen=True)
class Published:
    """A kernel that others measured.

    Attributes:
        amount: of work, in units of which `measured` is the rate; 0 if `measured` is a time in microseconds.
        sets_cap: the model takes a constant from this figure, so that the error says little.
    """

    kernel: str
    machine: Machine
    shape: str
    measured: float
    unit: str
    source: Source
    seconds: Callable[[Machine], float]
    amount: float = 0.0
    sets_cap: bool = False

    @property
    def predicted(self) -> float:
        """In the unit of `measured`."""
        seconds = self.seconds(self.machine)
        return self.amount / seconds if self.amount else seconds * 1e6

    @property
    def error(self) -> float:
        """The predicted speed over the measured one, less 1: positive if the model is too fast."""
        ratio = self.predicted / self.measured
        return (ratio if self.amount else 1 / ratio) - 1


@dataclass(frozen=True)
class Flash:
    """A flash attention: rows of queries and keys of a tile, and its code. read_by_warps: each warp loads all keys."""

    rows: int
    keys: int
    code: Code
    read_by_warps: bool


def attention(
    name: str,
    kernel: Flash,
    machine: Machine,
    head_dim: int,
    tokens: int,
    causal: bool,
    measured: float,
    source: Source,
) -> Published:
    """Heads of 2048 elements in all, and sequences of 16,384 tokens in all, as in the papers."""
    heads, sequences = 2048 // head_dim, max(16384 // tokens, 1)
    blocks_of_rows = math.ceil(tokens / kernel.rows)
    tiles = (
        heads
        * sequences
        * sum(
            math.ceil(min((block + 1) * kernel.rows, tokens) / kernel.keys if causal else tokens / kernel.keys)
            for block in range(blocks_of_rows)
        )
    )
    scores, outputs, keys = kernel.rows * kernel.keys, kernel.rows * head_dim, kernel.keys * head_dim
    # A score is scaled, compared and added, and the output rescaled; two scores are packed by one conversion.
    scalars = 3 * scores + outputs
    readers = kernel.code.warps if kernel.read_by_warps else 0
    fragments = (2 * keys * readers + outputs * bool(readers)) * 2 / BYTES_A_CYCLE
    products = 4 * scores * head_dim / 4096 if kernel.read_by_warps else 0  # instructions of 16 by 8 by 16
    work = Work(
        blocks=heads * sequences * blocks_of_rows,
        l2_bytes=tiles * 2 * keys * 2.0,
        tensor=tiles * 4.0 * scores * head_dim,
        fp32=tiles * scalars,
        fp64=0,
        special=tiles * scores,
        issue=tiles * ((1.5 * scores + scalars) / 32 + products + fragments / 4),
        shared=tiles * (2 * keys * 2 / BYTES_A_CYCLE + fragments),
    )
    moved = 4 * 2048 * sequences * tokens * 2
    visible = tokens * tokens * sequences * heads / (2 if causal else 1)
    stretch = 1.0 if kernel.read_by_warps else _stretch(kernel, head_dim)
    code = replace(kernel.code, operand_stretch=stretch)
    return Published(
        name,
        machine,
        f"heads of {head_dim}, {tokens} tokens, {'causal' if causal else 'not causal'}",
        measured,
        "TFLOP/s",
        source,
        lambda machine: predict(machine, code, work, moved).seconds,
        4 * visible * head_dim / 1e12,
    )


def _stretch(kernel: Flash, head_dim: int) -> float:
    """The products of queries and keys read both from shared memory, those with values only the values."""
    scores, outputs = (2 * 64 * columns * 16 / OPERATIONS_A_CYCLE["sm_90"] for columns in (kernel.keys, head_dim))
    reads = 2 * 16 * (64 + kernel.keys) / BYTES_A_CYCLE, 2 * 16 * head_dim / BYTES_A_CYCLE
    # As many products for scores as for outputs.
    return (max(scores, reads[0]) / scores + max(outputs, reads[1]) / outputs) / 2


def product(machine: Machine, shape: tuple[int, int, int], tile: tuple[int, int], measured: float) -> Published:
    """A product of matrices by cuBLAS, with the tile that fits the shape best."""
    rows, columns, depth = shape
    blocks = math.ceil(rows / tile[0]) * math.ceil(columns / tile[1])
    operations = 2.0 * rows * columns * depth
    loaded = blocks * sum(tile) * depth * 2.0
    work = Work(blocks, loaded, operations, 0, 0, 0, 0, loaded / BYTES_A_CYCLE)
    code = Code(8, 168, 160 << 10, 64 << 10, 1, 1.0, machine is not A100, parts=2)
    moved = 2 * (rows * depth + columns * depth + rows * columns)
    return Published(
        "cuBLAS product",
        machine,
        " x ".join(map(str, shape)),
        measured,
        "TFLOP/s",
        MAMF,
        lambda machine: predict(machine, code, work, moved).seconds,
        operations / 1e12,
        sets_cap=True,
    )


def stream(name: str, machine: Machine, measured: float, source: Source, sets_cap: bool = False) -> Published:
    """Two gigabytes that are read or written, 16 bytes a thread."""
    moved = 2e9
    work = Work(1 << 16, moved, 0, 0, 0, 0, moved / 512 * 4, 0)
    code = Code(8, 32, 0, 16 << 10)
    return Published(
        name, machine, "large", measured, "TB/s", source, lambda machine: predict(machine, code, work, moved).seconds,
        moved / 1e12, sets_cap,
    )  # fmt: skip


def decode(tokens: int, measured: float) -> Published:
    """FlashInfer, one sequence, 20 heads of queries and 4 of keys, of 128: a kernel over splits and one that adds them.

    The first reads its part of the plan, the pages' places, the pages, then keys and values; the second two levels.
    """
    moved = tokens * 4 * 128 * 2 * 2
    splits = Code(4, 128, 48 << 10, 32 << 10, dependent_loads=4)
    work = Work(132 * 2, moved, 0, 0, 0, 0, moved / 512 * 8, moved / BYTES_A_CYCLE)
    adding = Code(4, 64, 4096, 4096, dependent_loads=2)
    small = Work(20, 20 * 66 * 512, 0, 0, 0, 0, 20 * 1000, 0)
    return Published(
        "FlashInfer decode",
        H100,
        f"1 x {tokens} tokens, 20 / 4 heads of 128",
        measured,
        "us",
        FLASHINFER,
        lambda machine: predict(machine, splits, work, moved).seconds + predict(machine, adding, small, 1e5).seconds,
    )


def step() -> Published:
    """A token of Llama-3.2-1B in bfloat16, in some hundred kernels, each of which reads what the one before wrote."""
    moved = 2.47e9
    code = Code(4, 64, 32 << 10, 24 << 10, dependent_loads=2)
    work = Work(132 * 6, moved / 100, 0, 0, 0, 0, moved / 100 / 512 * 8, 0)
    return Published(
        "vLLM, SGLang: decode",
        H100,
        "Llama-3.2-1B, batch 1, 100 kernels",
        moved / (0.5 * H100.bandwidth) * 1e6,
        "us",
        HAZY,
        lambda machine: 100 * predict(machine, code, work, moved / 100).seconds,
    )


# Tiles: FlashAttention 2, flash_fwd_launch_template.h; FlashAttention 3, hopper/tile_size.h, two groups of warps that
# compute in turns, and one that loads.
FA2_128 = Flash(128, 64, Code(4, 255, 64 << 10, 32 << 10), True)
FA2_256 = Flash(64, 64, Code(4, 255, 96 << 10, 64 << 10), True)
FA3_128 = Flash(128, 176, Code(12, 168, 212 << 10, 90 << 10, by_groups=True, parts=2), False)
FA3_128_CAUSAL = Flash(128, 128, Code(12, 168, 160 << 10, 64 << 10, by_groups=True, parts=2), False)
FA3_256 = Flash(128, 80, Code(12, 168, 224 << 10, 80 << 10, by_groups=True, parts=2), False)
TUTORIAL = Flash(128, 64, Code(8, 200, 128 << 10, 64 << 10, by_groups=True), False)

PUBLISHED = (
    *(
        attention("FlashAttention 3", FA3_256, H100, 256, tokens, causal, measured, FA3)
        for tokens, causal, measured in ((2048, True, 537), (8192, True, 628), (16384, True, 642), (16384, False, 756))
    ),
    attention("FlashAttention 3", FA3_128_CAUSAL, H100, 128, 8192, True, 602, FA3),
    attention("FlashAttention 3", FA3_128, H100, 128, 16384, False, 648, FA3),
    attention("FlashAttention 2", FA2_256, H100, 256, 8192, True, 297, FA3),
    attention("FlashAttention 2", FA2_128, H100, 128, 8192, True, 333, FA3),
    attention("FlashAttention 2", FA2_128, H100, 128, 16384, False, 370, FA3),
    attention("FlashAttention 2", FA2_128, A100, 128, 16384, False, 0.73 * 312, FA2),
    attention("Triton's tutorial", TUTORIAL, H100, 128, 8192, False, 470.7, TRITON),
    product(A100, (1024, 10240, 5120), (256, 128), 271.2),
    product(H100, (2048, 2048, 13312), (128, 256), 794.5),
    product(B200, (1792, 16128, 3072), (256, 256), 1745),
    stream("memory-bound reduction", H100, 3.0, QUACK, sets_cap=True),
    stream("reads of memory", RTX_4090, 0.921, NVBENCH, sets_cap=True),
    stream("device copy", H100, 2.515, NCCL),
    stream("device copy", H100, 2.959, SAMPLES),
    *(decode(tokens, measured) for tokens, measured in ((1024, 12.3), (4096, 15.9), (16384, 25.1))),
    step(),
)

# The fastest causal attention that was published for heads of 256 and 128, TFLOP/s, at any length. On an A100
# FlashAttention 2 (not causal, which is faster), on an H100 FlashAttention 3 as above, on a B200 FlashAttention 4: for
# heads of 256 Dao-AILab/flash-attention #2432, as others report it, for 128 the first post of #2280, quoted. An H200
# has the chip of an H100. We found no figure for the RTX 4090.
FASTEST_CAUSAL = {
    ("A100", 256): 0.73 * 312,
    ("A100", 128): 0.73 * 312,
    ("H100", 256): 642.0,
    ("H100", 128): 616.0,
    ("H200", 256): 642.0,
    ("H200", 128): 616.0,
    ("B200", 256): 1059.0,
    ("B200", 128): 1418.0,
}
