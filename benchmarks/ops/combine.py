"""combine of a bf16 pair into bf16, the second half of a merge: 6 bytes an element, on one thread.

The reference is the definition in numpy: two products and a sum in float32, rounded once. All must equal it bitwise.
"""

from __future__ import annotations

import numpy as np
import torch
from _ops import Call, agree, copy_of, noise, one_thread, record_op

from arcmerge import _C
from full_size_pair import to_bf16

ELEMENTS = 1 << 26
COEFFICIENTS = [0.3, 0.7]


def main() -> None:
    one_thread()
    a, b = noise(ELEMENTS, 1), noise(ELEMENTS, 2)
    out = torch.empty_like(a)
    operands = [_C.Operand(tensor.data_ptr(), 0) for tensor in (a, b)]

    def native(variant: str) -> torch.Tensor:
        _C.use_variant(variant)
        _C.combine(out.data_ptr(), 0, operands, COEFFICIENTS, 0, ELEMENTS)
        return out

    def plain() -> torch.Tensor:
        return (COEFFICIENTS[0] * a.float() + COEFFICIENTS[1] * b.float()).bfloat16()

    x, y = (np.float32(c) * tensor.float().numpy() for c, tensor in zip(COEFFICIENTS, (a, b), strict=True))
    reference = to_bf16(x + y)
    del x, y
    for variant in _C.variants():
        agree(f"native {variant}", different(native(variant), reference), 0)
    agree("torch", different(plain(), reference), 0)

    natives = [Call(f"native {name}", lambda name=name: native(name), 6) for name in _C.variants()]
    record_op("combine", ELEMENTS, [copy_of(a), *natives, Call("torch", plain, 6)])


def different(values: torch.Tensor, reference: np.ndarray) -> int:
    """How many of the bf16 values are not those of the reference."""
    return int(np.count_nonzero(values.view(torch.uint16).numpy() != reference))


if __name__ == "__main__":
    main()
