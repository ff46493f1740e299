"""Checks of Triton kernels on a machine without a GPU; README.md lists the files."""
