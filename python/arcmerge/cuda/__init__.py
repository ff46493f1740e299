"""Kernels in CUDA C++, from csrc/cuda: kept as PTX, and loaded through the driver."""
