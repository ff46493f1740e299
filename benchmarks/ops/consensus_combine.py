"""consensus_combine of two bf16 tensors and their base into bf16, as TIES at a density of one half: 8 bytes an element,
on one thread, next to combine of the same three.

The reference is the definition in torch; native must equal it bitwise. The cuts lie between equal magnitudes.
"""

from __future__ import annotations

import torch
from _ops import Call, agree, copy_of, noise, one_thread, record_op

from arcmerge import _C
from arcmerge.ops.selection import NO_CUT, between

ELEMENTS = 1 << 26


def codes(x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return (x.float() - base.float()).abs().bfloat16().view(torch.int16).int() << 16


def median_cut(x: torch.Tensor, base: torch.Tensor) -> tuple[int, int, int, int]:
    """The cut that keeps the larger half of the magnitudes, and of equal ones the first."""
    at_least = torch.bincount(codes(x, base) >> 16, minlength=32768).flip(0).cumsum(0)
    place = int((at_least < ELEMENTS // 2).sum())
    above = int(at_least[place - 1]) if place else 0
    return *NO_CUT[:2], (32767 - place) << 16, ELEMENTS // 2 - above


def main() -> None:
    one_thread()
    base, *tensors = (noise(ELEMENTS, seed) for seed in (1, 2, 3))
    cuts = [median_cut(tensor, base) for tensor in tensors]
    out = torch.empty_like(base)
    operands = [_C.Operand(tensor.data_ptr(), 0) for tensor in tensors]
    base_operand = _C.Operand(base.data_ptr(), 0)
    consensus = _C.Consensus([(1, 1, 1, 1)] * 2, election=1)

    def native(variant: str, probabilities: tuple[float, float] = (1, 1)) -> torch.Tensor:
        _C.use_variant(variant)
        selection = _C.Selection(cuts, [1, 2], [probabilities] * 2, 4096, rounded=True)
        before = [(0, 0)] * 2
        _C.consensus_combine(out.data_ptr(), 0, operands, base_operand, selection, consensus, before, 0, ELEMENTS)
        return out

    def plain() -> torch.Tensor:
        kept = [
            torch.where(between(codes(tensor, base), cut), tensor.float() - base.float(), 0)
            for tensor, cut in zip(tensors, cuts, strict=True)
        ]
        negative = kept[0] + kept[1] < 0
        agrees = [torch.where(negative, difference < 0, difference > 0) for difference in kept]
        count = agrees[0].float() + agrees[1].float()
        total = torch.where(agrees[0], kept[0], 0) + torch.where(agrees[1], kept[1], 0)
        return (base.float() + total / count.clamp(min=1)).bfloat16()

    reference = plain().view(torch.int16)
    for variant in _C.variants():
        agree(f"native {variant}", int((native(variant).view(torch.int16) != reference).sum()), 0)

    best, *_ = _C.variants()

    def combine() -> None:
        _C.use_variant(best)
        _C.combine(out.data_ptr(), 0, [*operands, base_operand], [0.3, 0.3, 0.4], 0, ELEMENTS)

    calls = [copy_of(base), Call("combine", combine, 8)]
    calls += [Call(f"native {name}", lambda name=name: native(name), 8) for name in _C.variants()]
    calls += [
        Call(f"at random, {name}", lambda chances=chances: native(best, chances), 8)
        for name, chances in (("alike", (0.5, 0.5)), ("by rank", (0.3, 0.7)))
    ]
    record_op("consensus_combine", ELEMENTS, [*calls, Call("torch", plain, 8)])


if __name__ == "__main__":
    main()
