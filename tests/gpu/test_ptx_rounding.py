"""The emulator of PTX: every rounding of arithmetic and of conversions, against exact fractions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from emulation.ptx.formats import Array, decode
from ptx_programs import bits, evaluate


def nasty_floats() -> Array:
    """Pairs of these have ties, cancellations, subnormals, and results that overflow."""
    generator = np.random.default_rng(1)
    significands = generator.choice([0, 1, 2, 0x400000, 0x7FFFFF, 0x000800, 0x7FF800, 0x000801], 2048)
    exponents = generator.choice([0, 1, 2, 103, 104, 126, 127, 128, 139, 150, 151, 253, 254], 2048)
    signs = generator.integers(0, 2, 2048)
    codes = signs << 31 | exponents << 23 | significands
    return codes.astype(np.uint32).view(np.float32)


def rounded(exact: Fraction, mode: str, precision: int, smallest: int, largest: Fraction) -> Fraction | float:
    """`exact` to `precision` bits, none below 2^smallest, in the direction of `mode`."""
    if exact == 0:
        return exact
    bits_before_point = exact.numerator.bit_length() - exact.denominator.bit_length()
    bits_before_point += abs(exact) >= Fraction(2) ** bits_before_point
    exponent = max(bits_before_point - precision, smallest)
    unit = Fraction(2) ** exponent
    whole, rest = divmod(exact / unit, 1)
    up = {"rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1), "rm": False, "rp": rest > 0}
    up["rz"] = exact < 0 and rest > 0
    result = (whole + up[mode]) * unit
    if abs(result) <= largest:
        return result
    toward_zero = mode == "rz" or (mode == "rm" and exact > 0) or (mode == "rp" and exact < 0)
    sign = 1 if exact > 0 else -1
    return sign * largest if toward_zero else sign * float("inf")


LARGEST = Fraction(float(np.finfo(np.float32).max))
FORMULAS: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", FORMULAS)
def test_float32_arithmetic_rounds_exactly(name: str, mode: str) -> None:
    values = nasty_floats()
    operands = [np.roll(values, shift) for shift in (0, 7, 40)][: 3 if name == "fma" else 2]
    arguments = ", ".join(f"${i + 1}" for i in range(len(operands)))
    found = evaluate(f"{name}.{mode}.f32 $0, {arguments}", "f32", ["f32"] * len(operands), *operands)
    for result, *numbers in zip(found.tolist(), *(operand.tolist() for operand in operands), strict=True):
        exact = FORMULAS[name](*map(Fraction, numbers))
        assert result == rounded(exact, mode, 24, -149, LARGEST), (numbers, result)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "sub", "fma"])
def test_mixed_arithmetic_rounds_exactly(name: str, mode: str, kind: str) -> None:
    """Halves and a float32 as the last operand. Its exponents are near those of the halves, so that digits are lost."""
    codes = np.random.default_rng(2).integers(0, 1 << 16, (2, 512))
    halves = [decode(row.astype(np.uint16), kind) for row in codes]
    values = nasty_floats()[:512]
    count = 2 if name == "fma" else 1
    finite = np.isfinite(halves[0]) & np.isfinite(halves[1])
    operands = [row[finite].astype(np.uint16) for row in codes[:count]] + [values[finite]]
    arguments = ", ".join(f"${i + 1}" for i in range(count + 1))
    found = evaluate(f"{name}.{mode}.f32.{kind} $0, {arguments}", "f32", ["b16"] * count + ["f32"], *operands)
    columns = [*(row[finite].tolist() for row in halves[:count]), operands[-1].tolist()]
    for result, *numbers in zip(found.tolist(), *columns, strict=True):
        exact = FORMULAS[name](*map(Fraction, numbers))
        assert result == rounded(exact, mode, 24, -149, LARGEST), (numbers, result)


def test_fused_float64_rounds_once() -> None:
    a, b, c = 1 + 2.0**-52, 1 - 2.0**-52, -1.0
    assert evaluate("fma.rn.f64 $0, $1, $2, $3", "f64", ["f64"] * 3, a, b, c)[0] == -(2.0**-104)


def test_bfloat16_conversions_of_every_code_and_of_ties() -> None:
    codes = np.arange(1 << 16, dtype=np.uint32)
    # Every bfloat16, and the values just below, at and above the middle to the next one.
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (codes << 16 | low).astype(np.uint32).view(np.float32)
        expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
        expected = np.where(np.isnan(values), 0x7FFF, expected)
        for start in range(0, 1 << 16, 1 << 12):
            part = slice(start, start + (1 << 12))
            found = evaluate("cvt.rn.bf16.f32 $0, $1", "b16", ["f32"], values[part])
            np.testing.assert_array_equal(found, expected[part])


@pytest.mark.parametrize(("kind", "precision", "smallest", "largest"), [("f16", 11, -24, 65504), ("bf16", 8, -133, 0)])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_conversions_to_halves(kind: str, precision: int, smallest: int, largest: int, mode: str) -> None:
    limit = Fraction(largest) if largest else Fraction(float(bits(0x7F7F0000)[0]))
    values = np.concatenate([nasty_floats(), np.float32([1e-7, -1e-7, 65519, 65520, -65536, 3e-8, 2.9e-8])])
    codes = evaluate(f"cvt.{mode}.{kind}.f32 $0, $1", "b16", ["f32"], values)
    back = codes.view(np.float16).astype(float) if kind == "f16" else (codes.astype(np.uint32) << 16).view(np.float32)
    for value, result in zip(values.tolist(), back.tolist(), strict=True):
        assert result == rounded(Fraction(value), mode, precision, smallest, limit), (value, result)
