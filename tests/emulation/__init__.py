"""Proving Triton kernels on a machine without a GPU.

interpreter: Triton's interpreter, corrected; intrinsics, reductions and rounding are parts of it. traffic: the bytes
that launches move, and whether they may.
compilation: what the compiler makes of the launches, for GPUs that are not there.
"""
