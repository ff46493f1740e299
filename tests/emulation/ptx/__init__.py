"""An emulator of the PTX that Triton emits for NVIDIA's GPUs.

program: the text, taken apart. machine: registers, predicates, branches, barriers; several blocks of threads go side by
side in one numpy vector, a lane a thread. Instructions are closures over that machine's registers, made once each:
arithmetic (values to values, in formats), warps (shuffles and votes), transfers (loads, stores, atomics, cp.async),
matrix (ldmatrix, mma), warpgroups (wgmma). memory: which addresses exist; owners: who wrote and read them; shared: what
shared memory holds and who wrote it; clocks: the same for warps that meet in parts; barriers: mbarriers, and copies by
tensor maps. schedule: which lanes go next. counts: what ran.

Sources: PTX ISA 8.8 to 9.0, sections 9.7.1 to 9.7.14, https://docs.nvidia.com/cuda/parallel-thread-execution.
"""
