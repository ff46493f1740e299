"""Arguments of public functions in the forms that users pass: Python, numpy and torch values, names and None."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch

from arcmerge.dispatch.checks import ACTIVATIONS
from arcmerge.errors import ArcmergeError
from arcmerge.merging.options import Options

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in ACTIVATIONS}


def plain(value: Any) -> Any:
    """Python numbers and lists for scalars and arrays of numpy and torch; other values unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def read_whole(name: str, value: Any) -> int:
    number = plain(value)
    if isinstance(number, float) and number.is_integer():  # as programs without integers write them
        return int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ArcmergeError(f"'{name}' must be a whole number, got {value!r:.80}")
    return number


def read_number(name: str, value: Any) -> float:
    number = plain(value)
    if not isinstance(number, bool) and isinstance(number, int | float):
        with suppress(OverflowError):  # of an int of 309 digits or more
            return float(number)
    raise ArcmergeError(f"'{name}' must be a number, got {value!r:.80}")


def read_bool(name: str, value: Any) -> bool:
    truth = plain(value)
    if not isinstance(truth, int) or truth not in (0, 1):
        raise ArcmergeError(f"'{name}' must be True or False, got {value!r:.80}")
    return bool(truth)


def read_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id, or a list, set, array or tensor of token ids."""
    found = plain(value)
    if isinstance(found, str | Mapping) or not isinstance(found, Iterable):
        found = [found]
    tokens = tuple(plain(token) for token in found)
    if not all(type(token) is int for token in tokens):
        raise ArcmergeError(f"'{name}' must be a token id or a list of token ids, got {value!r:.80}")
    return tokens


def read_strings(name: str, value: Any) -> tuple[str, ...]:
    """One string, or a list of strings, none of which is empty."""
    found = plain(value)
    strings = (found,) if isinstance(found, str) else tuple(found) if isinstance(found, Iterable) else (found,)
    if not all(isinstance(string, str) for string in strings):
        raise ArcmergeError(f"'{name}' must be a string or a list of strings, got {value!r:.80}")
    if not all(strings):
        raise ArcmergeError(f"'{name}' must be strings of one character or more, got an empty string")
    return strings


def read_device(value: str | torch.device | int | None) -> str:
    """The name of a device that is given as a name, a torch.device or a GPU index; None is "auto"."""
    if isinstance(index := plain(value), int) and not isinstance(index, bool):
        value = f"cuda:{index}"
    return Options(device="auto" if value is None else str(value)).resolved_device


def read_dtype(value: str | torch.dtype | None, stored: str) -> torch.dtype:
    """The dtype that is given as a name or a torch.dtype; None is bfloat16.

    stored: the dtype that "auto" stands for, but for float16, which is read as float32.
    """
    name = "bfloat16" if value is None else str(value).removeprefix("torch.")
    if name == "auto":
        name = "float32" if stored == "float16" else stored
    if name not in _DTYPES:
        raise ArcmergeError(f"'dtype' must be bfloat16, float32 or 'auto', got {value!r:.80}")
    return _DTYPES[name]
