"""Builds arcmerge._C: plain C++17 without torch. Where nvcc is installed, compiles csrc/cuda to PTX, too.

Compiled for the oldest processor of its kind; csrc/cpu/simd/variant.cpp picks faster code at run time.
"""

import os
import shutil
import subprocess
from glob import glob
from pathlib import Path
from runpy import run_path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# Every variant must give the same bits, so products and sums may neither fuse nor be reordered (no -ffast-math).
# Ignoring errno and floating-point exceptions is what lets compilers vectorise comparisons and conversions.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"]

# Read from the file, because the package cannot be imported before it is built.
TARGETS = run_path("python/arcmerge/cuda/targets.py")["TARGETS"]
# Products and sums may not fuse here either.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-ptx"]


class Build(build_ext):
    """Builds the extension, and where nvcc is installed compiles csrc/cuda to PTX in the same package."""

    def run(self):
        super().run()
        nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
        if nvcc is None:
            self.warn("nvcc must be on PATH or named by NVCC, got none; this package is without kernels in CUDA C++")
            return
        package = Path(self.get_ext_fullpath("arcmerge._C")).parent
        for target in TARGETS:
            for source in map(Path, glob("csrc/cuda/*.cu")):
                out = package / "cuda" / f"{source.stem}.{target}.ptx"
                out.parent.mkdir(parents=True, exist_ok=True)
                architecture = target.replace("sm_", "compute_")
                command = [nvcc, *NVCC_FLAGS, f"-arch={architecture}", source, "-o", out]
                # A compiler may be too old for a target, which the package then lacks.
                if subprocess.run(command).returncode:
                    out.unlink(missing_ok=True)
                    self.warn(f"{out.name} must be compiled for GPUs of {target}, got an error of {nvcc}; update nvcc")


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
    cmdclass={"build_ext": Build},
)
