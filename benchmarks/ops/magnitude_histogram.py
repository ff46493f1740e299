"""magnitude_histogram of a bf16 tensor and its base: 4 bytes an element, on one thread, next to gram of the same pair.

An addition in memory for each element limits it, which takes longer where equal codes meet. So there are three pairs: a
light fine-tune, which moves a quarter of the elements to a neighbour, unrelated noise, and a constant difference. The
reference is numpy's bincount; all counts must equal its.
"""

from __future__ import annotations

import numpy as np
import torch
from _ops import Call, agree, copy_of, noise, one_thread, record_op

from arcmerge import _C

ELEMENTS = 1 << 26


def light_fine_tune(base: torch.Tensor) -> torch.Tensor:
    """The base with a quarter of its elements moved to a neighbour. The neighbour of 0 may be a NaN, so zeros stay."""
    draw = torch.Generator().manual_seed(3)
    step = torch.randint(0, 8, base.shape, dtype=torch.int16, generator=draw)
    step[base == 0] = 2
    return (base.view(torch.int16) + (step == 0).short() - (step == 1).short()).view(torch.bfloat16)


def main() -> None:
    one_thread()
    base = noise(ELEMENTS, 1)
    pairs = {
        "light": (light_fine_tune(base), base),
        "noise": (noise(ELEMENTS, 2), base),
        "constant": (torch.full_like(base, 1.5), torch.ones_like(base)),
    }
    counts = torch.empty(2, 32768, dtype=torch.int64)
    selections = {
        kind: _C.Selection([], [1], [(probability, probability)], ELEMENTS, rounded=True)
        for kind, probability in (("", 1.0), (" at random", 0.5))
    }

    def native(variant: str, pair: str, kind: str = "") -> torch.Tensor:
        _C.use_variant(variant)
        x, y = (_C.Operand(tensor.data_ptr(), 0) for tensor in pairs[pair])
        _C.magnitude_histogram(counts.zero_().data_ptr(), [x], y, selections[kind], 0, ELEMENTS)
        return counts.sum(0)

    def plain(pair: str) -> torch.Tensor:
        x, y = pairs[pair]
        return torch.bincount((x.float() - y.float()).abs().bfloat16().view(torch.int16).int(), minlength=32768)

    for pair, (x, y) in pairs.items():
        magnitudes = (x.float() - y.float()).abs().bfloat16().view(torch.uint16).numpy()
        reference = np.bincount(magnitudes, minlength=32768)
        for variant in _C.variants():
            for kind in selections:
                wrong = np.abs(native(variant, pair, kind).numpy() - reference).sum()
                agree(f"native {variant} {pair}{kind}", float(wrong), 0)
        agree(f"torch {pair}", float(np.abs(plain(pair).numpy() - reference).sum()), 0)

    best, *_ = _C.variants()
    operands = [_C.Operand(tensor.data_ptr(), 0) for tensor in pairs["noise"]]
    _C.use_variant(best)
    calls = [copy_of(base), Call("gram", lambda: _C.gram(operands, None, 0, ELEMENTS), 4)]
    for pair in pairs:
        calls += [Call(f"{name} {pair}", lambda name=name, pair=pair: native(name, pair), 4) for name in _C.variants()]
    calls.append(Call("noise at random", lambda: native(best, "noise", " at random"), 4))
    record_op("magnitude_histogram", ELEMENTS, [*calls, Call("torch noise", lambda: plain("noise"), 4)])


if __name__ == "__main__":
    main()
