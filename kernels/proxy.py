"""The fence between the proxies of shared memory, which Triton before 3.7.1 leaves out.

Loads of a loop become cp.async, which writes shared memory by the generic proxy; `wgmma` and `tcgen05.mma` read it by
the asynchronous one. PTX demands `fence.proxy.async` in between (memory consistency model, proxies). Triton 3.6 and
3.7.0 have it for operands from registers only; without it, a product may read what was there before the copy.

Source: triton-lang/triton #9610, in 3.7.1 by #10537.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .target import TRITON

FENCED = tl.constexpr(TRITON >= (3, 7, 1))


@triton.constexpr_function
def _missing():
    """Whether this Triton leaves the fence out, and the architecture has matrix units that need it."""
    if FENCED or triton.knobs.runtime.interpret:
        return False
    return cuda_capability_geq(9) and not cuda_capability_geq(12)


@triton.jit
def fence():
    """Between the loads of operands and their product in a loop: the product sees what the loads wrote.

    The wait for the loads is at their first use, which is their copy to shared memory, right after them. So the fence
    comes after the wait.
    """
    if _missing():
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.b32 $0, $1;", "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1
        )
