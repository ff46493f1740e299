"""The random masks of methods that keep each difference with some probability.

Random numbers come from the counter-based generator Philox-4x32-10. Every tensor of every model has a key of its own,
and the counter is the index of the element, so that a mask depends neither on threads and chunks nor on the order of
the tensors.
"""

from __future__ import annotations

from hashlib import blake2b


def mask_key(seed: int, tensor: str, model: int) -> int:
    """The key of the random mask of one model's tensor.

    It is the BLAKE2b digest of 8 bytes, read as little-endian, of three fields one after another: the seed and the
    index of the model in 8 little-endian bytes each, and the name in UTF-8. The name is last and the others have fixed
    lengths, so different arguments give different texts; the probability that two of n keys are equal is n^2 / 2^65.

    The keys must never change: a published recipe and its seed stand for the merged weights.

    Args:
        seed: seed of the merge, from 0 to 2^63 - 1.
        tensor: name of the output tensor.
        model: index of the model among the inputs of the tensor other than the base, as the recipe lists them.

    Returns:
        64 bits, of which Philox takes the low 32 first.

    Example:
        >>> hex(mask_key(0, "model.norm.weight", 1))
        '0x44d7a9e4e6f8a5c8'
    """
    text = seed.to_bytes(8, "little") + model.to_bytes(8, "little") + tensor.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
