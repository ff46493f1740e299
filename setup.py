"""Builds arcmerge._C: plain C++17 without torch.

Compiled for the oldest processor of its kind; csrc/cpu/simd/variant.cpp picks faster code at run time.
"""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# Every variant must give the same bits, so products and sums may neither fuse nor be reordered (no -ffast-math).
# Ignoring errno and floating-point exceptions is what lets compilers vectorise comparisons and conversions.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"]

ParallelCompile(default=0).install()  # a process for each processor

setup(
    ext_modules=[
        Pybind11Extension(
            "arcmerge._C",
            sorted([*glob("csrc/*.cpp"), *glob("csrc/cpu/*/*.cpp")]),
            include_dirs=["csrc"],
            depends=glob("csrc/**/*.h", recursive=True),
            cxx_std=17,
            extra_compile_args=FLAGS,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
