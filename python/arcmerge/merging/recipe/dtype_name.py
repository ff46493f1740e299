"""The dtypes that a recipe names."""

from __future__ import annotations

from typing import Any

from arcmerge.dtypes import BY_NAME, MERGEABLE, DType
from arcmerge.merging.recipe.yaml_document import Reader, did_you_mean, shown


def read_dtype(value: Any, location: str, reader: Reader) -> DType | None:
    """Read the name of a dtype, with or without `torch.` in front; None gives None."""
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    dtype = BY_NAME.get(name)
    if dtype in MERGEABLE:
        return dtype
    names = ", ".join(dtype.name for dtype in MERGEABLE)
    meant = _NICKNAMES.get(name.lower())
    hint = f"; write `{meant}`" if meant else did_you_mean(name, [dtype.name for dtype in MERGEABLE])
    reader.problem(location, f"must be one of {names}, got {shown(value)}{hint}")
    return None


_NICKNAMES = {
    "bf16": "bfloat16",
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "float64", "fp64", "f64", "double"), "float32"),
}
