"""Proving Triton kernels on a machine without a GPU.

interpreter: Triton's interpreter, corrected; intrinsics, reductions and rounding are parts of it. traffic: the bytes
that launches move, and whether they may. compilation: what the compiler makes of the launches, for GPUs that are not
there, and what it must not. emulator: that code executed, by the package ptx. roofline: how long it would take at
best, on the machines of resources. evidence: what a case shows when it is carried out. prover: a process that does
all this without the interpreter.
"""
