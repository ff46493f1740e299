"""gumbel: noise for sampling; argmax(score + noise) has the distribution softmax(score).

The uniform numbers have the bits of those in ops/gumbel.py. Reads no memory; takes some 100 instructions an id.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def uniform(seed, step, ids):
    """A number in (0, 1), from the first word of Philox-4x32-10 of counter (id, step) and key seed; step is int64.

    Large noise comes from numbers near 0, where float32 keeps all 32 bits of a word.
    """
    counter = ids.to(tl.uint32)
    word, _, _, _ = tl.philox(seed, counter, step.to(tl.uint32), (step >> 32).to(tl.uint32), counter * 0)
    return tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)


@triton.jit
def gumbel(seed, step, ids):
    """-log(-log(1 - uniform)). Needs accurate logarithms: their arguments come as near to 1 as float32 allows."""
    return -tl.log(-libdevice.log1p(-uniform(seed, step, ids)))
