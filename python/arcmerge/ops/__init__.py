"""The two ops that every merge is made of, on torch tensors: gram, then combine."""

from arcmerge.ops.combine import combine
from arcmerge.ops.gram import gram
from arcmerge.ops.registry import backends

__all__ = ["backends", "combine", "gram"]
