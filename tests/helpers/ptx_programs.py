"""Small programs of PTX, and single instructions, for the tests of the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from emulation.ptx.barriers import TensorMap
from emulation.ptx.counts import Counts
from emulation.ptx.formats import Array, dtype_of
from emulation.ptx.machine import Machine
from emulation.ptx.memory import GlobalMemory
from emulation.ptx.program import parse

REGISTERS = """
    .reg .pred %p<8>; .reg .b16 %h<32>; .reg .b32 %r<32>; .reg .b64 %d<32>;
"""


def run(
    body: str,
    *arrays: Array,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    seed: int = 0,
    tensor_map: TensorMap | None = None,
) -> Counts:
    """Run statements with the addresses of `arrays` in %d0, %d1, ... and the index of the thread in %r0.

    tensor_map: has the address `map`.
    """
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(arrays)))
    parameters += ", .param .align 64 .b8 map[128]" if tensor_map else ""
    loads = "".join(f"ld.param.b64 %d{i}, [p{i}];\n" for i in range(len(arrays)))
    program = parse(
        f".visible .entry test({parameters})\n.reqntid {threads}\n{{{REGISTERS}{loads}mov.u32 %r0, %tid.x;{body}ret;}}"
    )
    tensors = [torch.from_numpy(array) for array in arrays]
    addresses = {f"p{i}": np.uint64(tensor.data_ptr()) for i, tensor in enumerate(tensors)}
    counts = Counts()
    memory = GlobalMemory((f"array {i}", tensor) for i, tensor in enumerate(tensors))
    maps = {"map": tensor_map} if tensor_map else {}
    runner = Machine(program, (blocks, 1, 1), addresses, memory, shared, counts, blocks, seed=seed, maps=maps)
    runner.run([(x, 0, 0) for x in range(blocks)])
    return counts


def register(kind: str, number: int) -> str:
    return f"%{ {1: 'h', 2: 'h', 4: 'r', 8: 'd'}[dtype_of(kind).itemsize] }{number}"


def evaluate(instruction: str, result: str, kinds: Sequence[str], *operands: Any) -> Array:
    """The results of an instruction, whose operands $1, $2, ... come from memory and whose result $0 goes there."""
    columns = [np.atleast_1d(np.asarray(o)).astype(dtype_of(k)) for o, k in zip(operands, kinds, strict=True)]
    size = max(map(len, columns))
    threads = -(-size // 32) * 32
    columns = [np.resize(column, threads) for column in columns]
    out = np.zeros(threads, dtype_of(result))
    body = ""
    for i, (kind, column) in enumerate(zip(kinds, columns, strict=True)):
        body += f"mad.wide.u32 %d20, %r0, {column.itemsize}, %d{i};"
        body += f"ld.global.b{8 * column.itemsize} {register(kind, i + 8)}, [%d20];"
        instruction = instruction.replace(f"${i + 1}", register(kind, i + 8))
    body += instruction.replace("$0", register(result, 31)) + ";"
    body += f"mad.wide.u32 %d20, %r0, {out.itemsize}, %d{len(columns)};"
    body += f"st.global.b{8 * out.itemsize} [%d20], {register(result, 31)};"
    run(body, *columns, out, threads=threads)
    return out[:size]


def bits(*codes: int) -> Array:
    return np.array(codes, np.uint32).view(np.float32)
