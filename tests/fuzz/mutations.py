"""Random changes to JSON documents, to lines of JSON, to text and to bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Mutate = Callable[[bytes, random.Random], bytes]

_DEPTHS = (30, 300, 900)  # allowed; readable by Python's json but not by copy; too deep for both
# Values that readers may handle wrongly: of the wrong type, out of range, or strange.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 255, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "a", "0", "1e3", "true", "None", "\ud800", "\x00", "\n", "é\u202e", "x" * 5000),
    *("../../x", "/etc/passwd", "a/../../b", "model.safetensors", "<bos>", "bfloat16", "float16", "layers.0.x"),
    *([], {}, [None], [[]], [0], [-1, 2**70], ["a", 1], {"a": None}, {"": 1}, {"content": 1}, {"content": "<x>"}),
)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change one to three values of a JSON document, or bytes if `data` is not JSON."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    if rng.random() < 0.05:
        return mutate_bytes(data, rng)
    try:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            document = _changed(document, rng)
        return json.dumps(document).encode()
    except (ValueError, RecursionError):  # nested too deep to be written
        return b"[" * 100_000


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """Change, remove or duplicate one line of JSON."""
    lines = data.split(b"\n")
    index = rng.randrange(len(lines))
    change = rng.random()
    if change < 0.1:
        del lines[index]
    elif change < 0.2:
        lines.insert(index, lines[rng.randrange(len(lines))])
    else:
        lines[index] = mutate_json(lines[index], rng)
    return b"\n".join(lines)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file, mostly with a correct length."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.1 or length > len(data) - 8:
        return mutate_bytes(data, rng)
    header = mutate_json(data[8 : 8 + length], rng)
    stated = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) + 1, 2**31, 2**63, 2**64 - 1))
    rest = data[8 + length :]
    return stated.to_bytes(8, "little") + header + (rest if rng.random() < 0.9 else rest[: rng.randrange(9)])


def mutate_text(data: bytes, rng: random.Random, words: tuple[bytes, ...] = ()) -> bytes:
    """Remove, duplicate or move a line or a part of it, insert one of `words`, or change bytes."""
    change = rng.random()
    if not data or change < 0.3:
        index = rng.randrange(len(data) + 1)
        return data[:index] + rng.choice(words or (b"0", b"x")) + data[index:]
    if change < 0.6:
        lines = data.split(b"\n")
        first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[first], lines[second] = lines[second], lines[first] if rng.random() < 0.5 else lines[second]
        return b"\n".join(lines)
    if change < 0.8:
        start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        return data[:start] + data[end:]
    return mutate_bytes(data, rng)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        index = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[index:index] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4))))
            case 1:
                del changed[index : index + rng.choice((1, 3, 50))]
            case 2 if index < len(changed):
                changed[index] ^= 1 << rng.randrange(8)
            case _:
                changed[index : index + 1] = bytes([rng.choice(b'{}[]",:0-9\\ue\xff\x00')])
    return bytes(changed)


def _changed(document: Any, rng: random.Random) -> Any:
    """Change one value of the document; returns the document, or another one if the root is changed."""
    entries = list(_entries(document))
    if not entries or rng.random() < 0.02:
        return _replaced(document, document, rng)
    holder, key = rng.choice(entries)
    match rng.randrange(10):
        case 0 | 1 | 2 | 3 | 4:
            holder[key] = _replaced(holder[key], document, rng)
        case 5:
            del holder[key]
        case 6 if isinstance(holder, list):
            holder.insert(key, _odd(rng))
        case 6:
            holder[rng.choice(("a", "", "__metadata__", "text_config", key + "x"))] = _odd(rng)
        case 7 if isinstance(holder, dict):
            holder[rng.choice((key.upper(), key + "s", " " + key))] = holder.pop(key)
        case 8:
            other, name = rng.choice(entries)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = copy.deepcopy(other[name])
        case _:
            other, name = rng.choice(entries)
            if name in other if isinstance(other, dict) else name < len(other):
                # Copies, because one may contain the other, which would then contain itself.
                holder[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(holder[key])
    return document


def _entries(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every dict or list with each of its keys, outer ones first; without recursion, as documents may be deep."""
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder) if isinstance(holder, list) else 0):
            yield holder, key
            waiting.append(holder[key])


def _replaced(value: Any, document: Any, rng: random.Random) -> Any:
    change = rng.random()
    if isinstance(value, int | float) and not isinstance(value, bool) and change < 0.5:
        return rng.choice((value + 1, value - 1, -value, value * 2, 0.5, str(value), [value], f"{value}.0"))
    if isinstance(value, str) and change < 0.3:
        return rng.choice((value[:-1], value + "x", value.upper(), [value], {"content": value}, value + "\ud800"))
    if change < 0.03:
        nested: Any = value
        for _ in range(rng.choice(_DEPTHS)):
            nested = [nested] if rng.random() < 0.5 else {"a": nested}
        return nested
    if change < 0.1:
        return rng.choice(([value], {"a": value}, [value, value]))
    return _odd(rng)


def _odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD))  # a copy, so that later changes do not change the table
