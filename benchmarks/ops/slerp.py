"""slerp of a bf16 pair, a whole merge of one tensor: 10 bytes an element, on one thread.

The reference is the definition in numpy: dot products in float64, coefficients, two products and a sum in float32,
rounded once. Native must equal it bitwise; torch takes its angle from float32 sums by chunks of a million, as mergekit
has it, and may differ in one of a thousand values.
"""

from __future__ import annotations

import numpy as np
import torch
from _ops import Call, agree, copy_of, noise, one_thread, record_op

from arcmerge import _C
from arcmerge.geometry import slerp_coefficients
from arcmerge.ops import slerp
from full_size_pair import to_bf16

ELEMENTS, T = 1 << 26, 0.3
CHUNK = 1 << 20


def main() -> None:
    one_thread()
    a, b = noise(ELEMENTS, 1), noise(ELEMENTS, 2)

    def native(variant: str) -> torch.Tensor:
        _C.use_variant(variant)
        return slerp([a], [b], T)[0]

    def plain() -> torch.Tensor:
        parts = [(x.float(), y.float()) for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True)]
        aa, ab, bb = (sum(float(p[i] @ p[j]) for p in parts) for i, j in ((0, 0), (0, 1), (1, 1)))
        angle = np.arccos(ab / np.sqrt(aa * bb))
        weights = [float(np.sin(part * angle) / np.sin(angle)) for part in (1 - T, T)]
        return (weights[0] * a.float() + weights[1] * b.float()).bfloat16()

    x, y = a.double().numpy(), b.double().numpy()
    gram = np.array([[x @ x, x @ y], [y @ x, y @ y]])
    weights = slerp_coefficients(gram, T, normalize=False)[0].astype(np.float32)
    reference = to_bf16(weights[0] * x.astype(np.float32) + weights[1] * y.astype(np.float32))
    del x, y
    for variant in _C.variants():
        agree(f"native {variant}", different(native(variant), reference), 0)
    agree("torch", different(plain(), reference) / ELEMENTS, 1e-3)

    natives = [Call(f"native {name}", lambda name=name: native(name), 10) for name in _C.variants()]
    record_op("slerp", ELEMENTS, [copy_of(a), *natives, Call("torch", plain, 10)])


def different(values: torch.Tensor, reference: np.ndarray) -> int:
    """How many of the bf16 values are not those of the reference."""
    return int(np.count_nonzero(values.view(torch.uint16).numpy() != reference))


if __name__ == "__main__":
    main()
