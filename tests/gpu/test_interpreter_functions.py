"""Functions of libdevice and inline assembly in the corrected interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.errors import InterpreterError

from elementwise import interpret

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU"),
    pytest.mark.filterwarnings("error"),
]

I32 = torch.int32


@triton.jit
def neutral_tanh(x):
    return libdevice.tanh(x)


@triton.jit
def cuda_tanh(x):
    return tl.extra.cuda.libdevice.tanh(x)


@triton.jit
def assembly_tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def assembly_exp2(x):
    assembly: tl.constexpr = "ex2.approx.ftz.f32  $0, $1;"
    return tl.inline_asm_elementwise(assembly, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def erf(x):
    return libdevice.erf(x)


@triton.jit
def exp(x):
    return libdevice.exp(x)


@triton.jit
def exp2(x):
    return libdevice.exp2(x)


@triton.jit
def log(x):
    return libdevice.log(x)


@triton.jit
def log2(x):
    return libdevice.log2(x)


@triton.jit
def rsqrt(x):
    return libdevice.rsqrt(x)


@triton.jit
def sin(x):
    return libdevice.sin(x)


@triton.jit
def cos(x):
    return libdevice.cos(x)


@triton.jit
def floor(x):
    return libdevice.floor(x)


@triton.jit
def cube(x):
    return libdevice.pow(x, 3.0)


FUNCTIONS = {
    **{function.__name__: (function, getattr(torch, function.__name__)) for function in (erf, exp, exp2, log, log2)},
    **{function.__name__: (function, getattr(torch, function.__name__)) for function in (rsqrt, sin, cos, floor)},
    "cube": (cube, lambda x: x**3),
    "tanh": (neutral_tanh, torch.tanh),
    "cuda tanh": (cuda_tanh, torch.tanh),
    "tanh.approx": (assembly_tanh, torch.tanh),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_libdevice_and_inline_assembly(name: str) -> None:
    function, expected = FUNCTIONS[name]
    x = torch.cat([torch.linspace(-5, 5, 200), torch.tensor([0.0, float("inf"), float("-inf"), float("nan"), 1e-40])])
    torch.testing.assert_close(
        interpret(function, x), expected(x.double()).float(), rtol=2.0**-23, atol=0, equal_nan=True
    )


def test_ftz_flushes_subnormal_numbers() -> None:
    x = torch.tensor([1e-40, -126.0, -127.0, -10.0, float("-inf"), 200.0])
    assert interpret(assembly_exp2, x).tolist() == [1.0, 2.0**-126, 0.0, 2.0**-10, 0.0, float("inf")]


@triton.jit
def libdevice_fma(x, y, z):
    return libdevice.fma(x, y, z)


@triton.jit
def classes(x):
    return libdevice.isnan(x).to(tl.int32) + 2 * libdevice.isinf(x).to(tl.int32)


def test_other_functions_of_libdevice() -> None:
    operands = (torch.tensor([value]) for value in (1 + 2.0**-12, 1 + 2.0**-12, -(1 + 2.0**-11)))
    assert interpret(libdevice_fma, *operands).item() == 2.0**-24
    x = torch.tensor([1.0, float("nan"), float("inf"), float("-inf")])
    assert interpret(classes, x, dtype=I32).tolist() == [0, 1, 2, 2]


@triton.jit
def unknown_assembly(x):
    return tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def unknown_function(x):
    return libdevice.j0(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (unknown_assembly, "sin.approx.f32 .* add it to INLINE_ASM"),
        (unknown_function, "__nv_j0f.* add it to LIBDEVICE"),
    ],
    ids=["assembly", "libdevice"],
)
def test_unknown_functions_say_where_to_add_them(function: Any, message: str) -> None:
    with pytest.raises(InterpreterError, match=message):
        interpret(function, torch.ones(4))
