"""The keys of random masks: fixed for ever, and different for different arguments."""

from __future__ import annotations

from itertools import product

from arcmerge.merging.methods.masks import mask_key

LARGEST = 2**63 - 1


def test_keys_never_change() -> None:
    """The first is that of `b2sum -l 64` for the bytes of the docstring."""
    assert mask_key(0, "model.norm.weight", 1) == 0x44D7A9E4E6F8A5C8
    assert mask_key(0, "", 0) == 0x0E7494F907A55052
    assert mask_key(LARGEST, "model.layers.0.mlp.up_proj.weight", 7) == 0xB31984686861CC88
    assert mask_key(42, "größe", 2) == 0x858B483DD1F20B48


def test_keys_differ_in_each_argument() -> None:
    """Names that a careless encoding would run into the numbers beside them are among them, and a lone surrogate."""
    names = ["", "0", "1", "00", "\0", "\0\1", "1\0", "a", "a0", "a\0", "a\x01", "model.norm.weight", "\ud800", "?"]
    numbers = [0, 1, 2, 10, 255, 256, 2**32, LARGEST]
    keys = [mask_key(*arguments) for arguments in product(numbers, names, numbers)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
    assert max(keys) > 2**63
