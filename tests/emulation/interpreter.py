"""Triton's interpreter (3.6 to 3.9), corrected to compute as a GPU does.

`install()` replaces, for the life of the process, the methods that CORRECTIONS lists. Kernels then compute in bfloat16
as a GPU does, tensor cores read TF32, functions of libdevice and inline PTX work (see intrinsics.py), as do autotuned
kernels, `tl.device_assert` and the check for overflow of int32 are on, and reductions by a custom function take a
logarithmic count of calls instead of one an element.

Differences that remain: the order of sums, the last bits of exp, log, sin and similar functions, and that programs run
one after another.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock_interpreter
from numpy.typing import NDArray
from triton._C.libtriton import interpreter as memory
from triton._C.libtriton import ir
from triton.language.extra import libdevice as neutral_libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import (
    ASTTransformer,
    FunctionRewriter,
    GridExecutor,
    InterpreterBuilder,
    InterpreterOptions,
    ReduceOps,
    ScanOps,
    TensorHandle,
    _get_np_dtype,
)

from . import reductions
from .intrinsics import INLINE_ASM, LIBDEVICE, Function
from .rounding import cut_to_bfloat16, cut_to_tf32, multiply_add, round_to_bfloat16, widen


@cache
def install() -> None:
    """Correct the interpreter of this process. TRITON_INTERPRET was 1 when triton was imported."""
    for owner, names, replacement in CORRECTIONS:
        for name in names:
            if hasattr(owner, name):  # create_fneg and create_approx_divf are new after 3.6
                setattr(owner, name, _bound(replacement, getattr(owner, name)))
    InterpreterBuilder.get_bf16 = lambda builder, value: _handle([value], tl.bfloat16)  # missing in 3.6
    Autotuner.do_bench = property(lambda tuner: _run_once)
    FunctionRewriter.ast_transformer = _Rewriting()
    vars(stock_interpreter).update(_boolean=_boolean, _condition=_condition)  # where rewritten kernels find them
    stock_interpreter.interpreter_builder.options = InterpreterOptions(
        debug=True, allowed_dot_input_precisions=("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")
    )
    for name, function in vars(cuda_libdevice).items():
        if tl.core.is_builtin(function):
            interpreted = _interpreted(function)
            setattr(cuda_libdevice, name, interpreted)
            setattr(neutral_libdevice, name, interpreted)


def _bound(replacement: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **named: replacement(stock, *arguments, **named)


# Values: arrays of bfloat16 hold its codes.


def _is_bfloat16(operand: Any) -> bool:
    return isinstance(operand, TensorHandle) and operand.dtype.scalar == tl.bfloat16


def _values(handle: TensorHandle) -> NDArray[Any]:
    return widen(handle.data) if _is_bfloat16(handle) else handle.data


def _handle(values: Any, dtype: tl.dtype) -> TensorHandle:
    """An operand of type `dtype` from values of any type, rounded once."""
    values = np.asarray(values)
    if dtype.scalar != tl.bfloat16:
        return TensorHandle(values.astype(_get_np_dtype(dtype), copy=False), dtype.scalar)
    if values.dtype != np.float64:
        values = values.astype(np.float32)
    return TensorHandle(round_to_bfloat16(values), tl.bfloat16)


# Arithmetic.


def _cast(stock: Any, builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    if source.dtype.scalar == target.scalar == tl.bfloat16:
        return source
    if tl.bfloat16 in (source.dtype.scalar, target.scalar):
        return _handle(_values(source), target)
    return stock(builder, source, target)


def _cast_rounding(
    stock: Any, builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype, rounding: Any
) -> TensorHandle:
    match source.dtype.scalar, target.scalar:
        case tl.float32, tl.bfloat16 if rounding == ir.ROUNDING_MODE.RTZ:
            return TensorHandle(cut_to_bfloat16(source.data), tl.bfloat16)
        case (tl.float32, tl.bfloat16) | (tl.bfloat16, tl.float32):
            return builder.cast_impl(source, target)
    return stock(builder, source, target, rounding)


def _through_float32(stock: Any, builder: InterpreterBuilder, *operands: Any) -> TensorHandle:
    """bfloat16 arithmetic in float32. As 24 bits are more than 2 * 8 + 2, rounding twice equals rounding once."""
    if not any(map(_is_bfloat16, operands)):
        return stock(builder, *operands)
    result = stock(builder, *(_handle(_values(each), tl.float32) if _is_bfloat16(each) else each for each in operands))
    if result.data.dtype == np.bool_:
        return TensorHandle(result.data, tl.int1)
    return _handle(result.data, tl.bfloat16)


def _maximum_of_numbers(
    stock: Any, builder: InterpreterBuilder, left: TensorHandle, right: TensorHandle
) -> TensorHandle:
    return _handle(np.fmax(_values(left), _values(right)), left.dtype)


def _minimum_of_numbers(
    stock: Any, builder: InterpreterBuilder, left: TensorHandle, right: TensorHandle
) -> TensorHandle:
    return _handle(np.fmin(_values(left), _values(right)), left.dtype)


def _fused(stock: Any, builder: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    if z.dtype.scalar == tl.float64:
        return stock(builder, x, y, z)
    return _handle(multiply_add(_values(x), _values(y), _values(z)), z.dtype)


def _dot(
    stock: Any,
    builder: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    c: TensorHandle,
    precision: Any,
    *rest: Any,
) -> TensorHandle:
    """a @ b + c; the products are summed in float64 and rounded to float32 once, then c is added.

    BLAS in float32 would have an order of sums that depends on the row and on the processor.

    Triton passes float32 to tensor cores unchanged (no cvt.tf32 in the PTX for sm_80, sm_90 and sm_100), and these read
    the upper 19 bits. tf32x3 and bf16x3 are computed in float32, whose accuracy they approach.
    """
    if not {a.dtype.scalar, b.dtype.scalar} <= {tl.bfloat16, tl.float16, tl.float32}:
        return stock(builder, a, b, c, precision, *rest)
    left, right = (_values(operand).astype(np.float32, copy=False) for operand in (a, b))
    if tl.float32 in (a.dtype.scalar, b.dtype.scalar) and precision == ir.INPUT_PRECISION.TF32:
        left, right = cut_to_tf32(left), cut_to_tf32(right)
    product = np.matmul(left.astype(np.float64), right.astype(np.float64))
    return _handle(product.astype(np.float32) + _values(c), c.dtype)


def _atomic(
    stock: Any,
    builder: InterpreterBuilder,
    kind: Any,
    pointers: TensorHandle,
    values: TensorHandle,
    mask: TensorHandle,
    *rest: Any,
) -> TensorHandle:
    if not _is_bfloat16(values):
        return stock(builder, kind, pointers, values, mask, *rest)
    if kind != ir.ATOMIC_OP.FADD:
        raise NotImplementedError(f"atomics of bfloat16 other than addition: {kind}")
    addresses, addends, active = (
        array.ravel() for array in np.broadcast_arrays(pointers.data, widen(values.data), mask.data)
    )
    before = np.zeros(addresses.shape, np.uint16)
    lanes = np.flatnonzero(active)
    while lanes.size:  # each iteration handles the first of the lanes left at each address
        first = np.unique(addresses[lanes], return_index=True)[1]
        turn = lanes[first]
        where, all_on = np.ascontiguousarray(addresses[turn]), np.ones(turn.shape, bool)
        before[turn] = memory.load(where, all_on, np.zeros(turn.shape, np.uint16), np.dtype(np.uint16))
        memory.store(where, round_to_bfloat16(widen(before[turn]) + addends[turn]), all_on)
        lanes = np.delete(lanes, first)
    return TensorHandle(before.reshape(pointers.data.shape), tl.bfloat16)


# Functions that numpy computes.


def _extern(
    stock: Any, builder: Any, library: str, path: str, symbol: str, operands: Sequence[Any], result: Any, pure: bool
) -> TensorHandle:
    return _computed(_known(LIBDEVICE, "LIBDEVICE", symbol), operands, result.scalar)


def _inline_asm(
    stock: Any, builder: Any, assembly: str, constraints: str, operands: Sequence[Any], results: Any, *rest: Any
) -> Any:
    function = _known(INLINE_ASM, "INLINE_ASM", " ".join(assembly.split()))

    class Results:
        def get_result(self, number: int) -> TensorHandle:
            assert number == 0, "no entry of INLINE_ASM has more than one result"
            return _computed(function, operands, results[0].scalar)

    return Results()


def _known(table: dict[str, Function], name: str, key: str) -> Function:
    if key not in table:
        raise NotImplementedError(f"the interpreter does not know {key!r}: add it to {name} in emulation/intrinsics.py")
    return table[key]


def _computed(function: Function, operands: Sequence[TensorHandle], result: tl.dtype) -> TensorHandle:
    return _handle(function(*(_values(operand).astype(np.float64) for operand in operands)), result)


def _interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of libdevice in the interpreter; Triton's own dispatch by dtype ends in _extern."""
    return lambda *arguments: function(*arguments, _semantic=stock_interpreter.interpreter_semantic)


# Python in kernels.


class _Rewriting(ASTTransformer):
    def visit_Module(self, node: ast.Module) -> ast.AST:
        return self.generic_visit(_TruthOfBlocks().visit(node))


class _TruthOfBlocks(ast.NodeTransformer):
    """`a and b` of blocks is elementwise in a compiled kernel, and `if block` none; in Python they are `b` and true."""

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        method = "logical_and" if isinstance(node.op, ast.And) else "logical_or"
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        return _call("_boolean", ast.Constant(method), *(ast.Lambda(nothing, value) for value in node.values))

    def visit_condition(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        node.test = _call("_condition", node.test)
        return node

    visit_If = visit_While = visit_IfExp = visit_condition

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not):
            node.operand = _call("_condition", node.operand)
        return node


def _call(function: str, *arguments: ast.expr) -> ast.expr:
    return ast.copy_location(ast.Call(ast.Name(function, ast.Load()), list(arguments), keywords=[]), arguments[-1])


def _condition(value: Any) -> Any:
    if isinstance(value, tl.tensor) and value.type.is_block() and value.numel > 1:
        raise TypeError("a block is neither true nor false: a kernel with it as a condition does not compile")
    return value


def _boolean(method: str, *operands: Callable[[], Any]) -> Any:
    """`and` and `or`: constants short-circuit the evaluation, as in the compiler; tensors do not."""
    tensors: list[tl.tensor] = []
    for operand in operands:
        value = operand()
        if isinstance(value, tl.tensor):
            tensors.append(value)
        elif bool(value) == (method == "logical_or"):
            return value
    if not tensors:
        return value
    result = tensors[0]
    for tensor in tensors[1:]:
        result = getattr(result, method)(tensor)
    return result


def _tensor_in_python(stock: Any, tensor: type, scope: Any) -> None:
    stock(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _launch(stock: Any, executor: GridExecutor, *arguments: Any, **named: Any) -> None:
    _patched.clear()
    with np.errstate(all="ignore"):  # a GPU does not warn of overflow and NaN
        stock(executor, *arguments, **named)


_patched: set[str] = set()


def _patch_language(stock: Any, function: Callable[..., Any]) -> Any:
    languages = _languages(function)
    if languages <= _patched:
        return stock_interpreter._LangPatchScope()
    _patched.update(languages)
    return stock(function)


@cache
def _languages(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(each.__name__ for each in function.__globals__.values() if each is tl or each is tl.core)


def _run_once(launch: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
    """Replaces a benchmark: every configuration runs, and the first is chosen."""
    launch()
    return [1.0] * len(quantiles)


_FLOAT_OPERATIONS = (
    *("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_precise_divf", "create_approx_divf"),
    *("create_frem", "create_fneg", "create_minimumf", "create_maximumf", "create_clampf"),
    *(f"create_fcmp{order}{kind}" for order in "OU" for kind in ("LT", "GT", "LE", "GE", "EQ", "NE")),
)

# Owner, its methods, and what replaces them, which gets the stock method first. The comments tell what stock does.
CORRECTIONS: list[tuple[Any, Sequence[str], Callable[..., Any]]] = [
    # Cuts float32 to bfloat16, garbles subnormal bfloat16 values, converts integers and codes of bfloat16 as they are.
    (InterpreterBuilder, ["cast_impl"], _cast),
    (InterpreterBuilder, ["create_fp_to_fp"], _cast_rounding),
    # Computes with codes of bfloat16 as if they were integers.
    (InterpreterBuilder, _FLOAT_OPERATIONS, _through_float32),
    # Codes again; in 3.6, NaN wins over numbers.
    (InterpreterBuilder, ["create_maxnumf"], _maximum_of_numbers),
    (InterpreterBuilder, ["create_minnumf"], _minimum_of_numbers),
    # Codes again; in 3.6, float32 is rounded twice.
    (InterpreterBuilder, ["create_fma"], _fused),
    # Codes again; TF32 is full float32; ten times slower, because numpy's matmul with a dtype does not call BLAS.
    (InterpreterBuilder, ["create_dot"], _dot),
    # Refuse: bfloat16, libdevice, inline PTX.
    (InterpreterBuilder, ["create_atomic_rmw"], _atomic),
    (InterpreterBuilder, ["create_extern_elementwise"], _extern),
    (InterpreterBuilder, ["create_inline_asm"], _inline_asm),
    # Codes again; the function is called once an element.
    (ReduceOps, ["apply_impl"], reductions.reduce),
    (ReduceOps, ["generic_reduce"], reductions.generic_reduce),
    (ScanOps, ["cumsum", "cumprod"], reductions.cumulate),
    (ScanOps, ["generic_scan"], reductions.generic_scan),
    # Fails where a tensor bounds a loop, in 3.6 with numpy 2.4.
    (stock_interpreter, ["_patch_lang_tensor"], _tensor_in_python),
    # Patches the language anew for every call of a device function: 1 ms, 60 % of the time.
    (stock_interpreter, ["_patch_lang"], _patch_language),
    # Warns where a GPU computes NaN or infinity.
    (GridExecutor, ["__call__"], _launch),
]
