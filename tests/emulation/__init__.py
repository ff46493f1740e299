"""Proving Triton kernels on a machine without a GPU.

rounding: the interpreter with the rounding of a GPU. traffic: the bytes that launches move, and whether they may.
compilation: what the compiler makes of the launches, for GPUs that are not there.
"""
