"""Arguments in the forms that people pass: numbers of Python, numpy and torch, lists and arrays, names and None."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch

from arcmerge.errors import ArcmergeError
from arcmerge.merging.options import Options

RUNS_IN = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def plain(value: Any) -> Any:
    """Numbers and lists of Python for the scalars and arrays of numpy and torch; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def read_whole(name: str, value: Any) -> int:
    number = plain(value)
    if isinstance(number, float) and number.is_integer():  # as programs without whole numbers write them
        return int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ArcmergeError(f"'{name}' must be a whole number, got {value!r:.80}.")
    return number


def read_number(name: str, value: Any) -> float:
    number = plain(value)
    if not isinstance(number, bool) and isinstance(number, int | float):
        with suppress(OverflowError):  # of a whole number of 309 digits or more
            return float(number)
    raise ArcmergeError(f"'{name}' must be a number, got {value!r:.80}.")


def read_truth(name: str, value: Any) -> bool:
    truth = plain(value)
    if not isinstance(truth, int) or truth not in (0, 1):
        raise ArcmergeError(f"'{name}' must be True or False, got {value!r:.80}.")
    return bool(truth)


def read_tokens(name: str, value: Any) -> tuple[int, ...]:
    """Token ids: one, or a list, set, array or tensor of them."""
    found = plain(value)
    if isinstance(found, str | Mapping) or not isinstance(found, Iterable):
        found = [found]
    tokens = tuple(plain(token) for token in found)
    if not all(type(token) is int for token in tokens):
        raise ArcmergeError(f"'{name}' must be a token id or a list of them, got {value!r:.80}.")
    return tokens


def read_strings(name: str, value: Any) -> tuple[str, ...]:
    """Strings of one character or more: one, or a list of them."""
    found = plain(value)
    strings = (found,) if isinstance(found, str) else tuple(found) if isinstance(found, Iterable) else (found,)
    if not all(isinstance(string, str) for string in strings):
        raise ArcmergeError(f"'{name}' must be a string or a list of strings, got {value!r:.80}.")
    if not all(strings):
        raise ArcmergeError(f"'{name}' must be strings of one character or more, has an empty one.")
    return strings


def read_device(value: str | torch.device | int | None) -> str:
    """The device of a name, of torch's kind, or of the number of a GPU; None is "auto"."""
    if isinstance(number := plain(value), int) and not isinstance(number, bool):
        value = f"cuda:{number}"
    return Options(device="auto" if value is None else str(value)).resolved_device


def read_dtype(value: str | torch.dtype | None, stored: str) -> torch.dtype:
    """The dtype of a name or of torch's kind; None is bfloat16. stored: what "auto" is, in float32 if float16."""
    name = "bfloat16" if value is None else str(value).removeprefix("torch.")
    if name == "auto":
        name = "float32" if stored == "float16" else stored
    if name not in RUNS_IN:
        raise ArcmergeError(f"'dtype' must be bfloat16, float32 or 'auto', got {value!r:.80}.")
    return RUNS_IN[name]
