"""gram of a bf16 pair, as a spherical merge needs it of every tensor: 4 bytes an element, on one thread.

The reference is numpy in float64. Native must be within 1e-9 of |a||b|; torch in float32, by chunks of a million as
mergekit has it, within 1e-3.
"""

from __future__ import annotations

import numpy as np
from _ops import Call, agree, copy_of, noise, one_thread, record_op

from arcmerge import _C

ELEMENTS = 1 << 26
CHUNK = 1 << 20


def main() -> None:
    one_thread()
    a, b = noise(ELEMENTS, 1), noise(ELEMENTS, 2)
    operands = [_C.Operand(tensor.data_ptr(), 0) for tensor in (a, b)]

    def native(variant: str) -> list[float]:
        _C.use_variant(variant)
        return _C.gram(operands, None, 0, ELEMENTS)

    def plain() -> list[float]:
        parts = [(x.float(), y.float()) for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True)]
        aa, ab, bb = (sum(float(p[i] @ p[j]) for p in parts) for i, j in ((0, 0), (0, 1), (1, 1)))
        return [aa, ab, ab, bb]

    x, y = a.double().numpy(), b.double().numpy()
    reference = np.array([x @ x, x @ y, y @ x, y @ y])
    del x, y
    lengths = np.sqrt(reference[0] * reference[3])
    for variant in _C.variants():
        agree(f"native {variant}", np.abs(native(variant) - reference).max() / lengths, 1e-9)
    agree("torch", np.abs(plain() - reference).max() / lengths, 1e-3)

    natives = [Call(f"native {name}", lambda name=name: native(name), 4) for name in _C.variants()]
    record_op("gram", ELEMENTS, [copy_of(a), *natives, Call("torch", plain, 4)])


if __name__ == "__main__":
    main()
