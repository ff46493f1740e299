"""Changes at random: to the values of a JSON document, to lines of them, to text, to bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Mutate = Callable[[bytes, random.Random], bytes]

_DEPTHS = (30, 300, 900)  # allowed; what Python's json reads and its copy cannot; more than either
# Values at which readers slip: of the wrong type, out of every range, not of this world.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 255, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "a", "0", "1e3", "true", "None", "\ud800", "\x00", "\n", "é\u202e", "x" * 5000),
    *("../../x", "/etc/passwd", "a/../../b", "model.safetensors", "<bos>", "bfloat16", "float16", "layers.0.x"),
    *([], {}, [None], [[]], [0], [-1, 2**70], ["a", 1], {"a": None}, {"": 1}, {"content": 1}, {"content": "<x>"}),
)


def mutate_json(data: bytes, chance: random.Random) -> bytes:
    """Data as a JSON document with one to three of its places changed; as bytes where it is none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, chance)
    if chance.random() < 0.05:
        return mutate_bytes(data, chance)
    try:
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            document = _changed(document, chance)
        return json.dumps(document).encode()
    except (ValueError, RecursionError):  # too deep to be written
        return b"[" * 100_000


def mutate_lines(data: bytes, chance: random.Random) -> bytes:
    """Data as lines of JSON with one of them changed, lost or doubled."""
    lines = data.split(b"\n")
    place = chance.randrange(len(lines))
    change = chance.random()
    if change < 0.1:
        del lines[place]
    elif change < 0.2:
        lines.insert(place, lines[chance.randrange(len(lines))])
    else:
        lines[place] = mutate_json(lines[place], chance)
    return b"\n".join(lines)


def mutate_safetensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with its header changed, mostly under a length that is right."""
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.1 or length > len(data) - 8:
        return mutate_bytes(data, chance)
    header = mutate_json(data[8 : 8 + length], chance)
    said = len(header) if chance.random() < 0.9 else chance.choice((0, 1, len(header) + 1, 2**31, 2**63, 2**64 - 1))
    rest = data[8 + length :]
    return said.to_bytes(8, "little") + header + (rest if chance.random() < 0.9 else rest[: chance.randrange(9)])


def mutate_text(data: bytes, chance: random.Random, words: tuple[bytes, ...] = ()) -> bytes:
    """Data with a line or a part of one lost, doubled or moved, one of `words` put in, or bytes changed."""
    change = chance.random()
    if not data or change < 0.3:
        place = chance.randrange(len(data) + 1)
        return data[:place] + chance.choice(words or (b"0", b"x")) + data[place:]
    if change < 0.6:
        lines = data.split(b"\n")
        first, second = chance.randrange(len(lines)), chance.randrange(len(lines))
        lines[first], lines[second] = lines[second], lines[first] if chance.random() < 0.5 else lines[second]
        return b"\n".join(lines)
    if change < 0.8:
        start, end = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
        return data[:start] + data[end:]
    return mutate_bytes(data, chance)


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(len(changed) + 1)
        match chance.randrange(4):
            case 0:
                changed[place:place] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 4))))
            case 1:
                del changed[place : place + chance.choice((1, 3, 50))]
            case 2 if place < len(changed):
                changed[place] ^= 1 << chance.randrange(8)
            case _:
                changed[place : place + 1] = bytes([chance.choice(b'{}[]",:0-9\\ue\xff\x00')])
    return bytes(changed)


def _changed(document: Any, chance: random.Random) -> Any:
    """The document with one place changed; a copy where that is the root."""
    places = list(_places(document))
    if not places or chance.random() < 0.02:
        return _replaced(document, document, chance)
    holder, key = chance.choice(places)
    match chance.randrange(10):
        case 0 | 1 | 2 | 3 | 4:
            holder[key] = _replaced(holder[key], document, chance)
        case 5:
            del holder[key]
        case 6 if isinstance(holder, list):
            holder.insert(key, _odd(chance))
        case 6:
            holder[chance.choice(("a", "", "__metadata__", "text_config", key + "x"))] = _odd(chance)
        case 7 if isinstance(holder, dict):
            holder[chance.choice((key.upper(), key + "s", " " + key))] = holder.pop(key)
        case 8:
            other, name = chance.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = copy.deepcopy(other[name])
        case _:
            other, name = chance.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                # Copies: one may hold the other, which would then hold itself.
                holder[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(holder[key])
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every dict or list with each of its keys, the outer ones first; without recursion, as documents may be deep."""
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder) if isinstance(holder, list) else 0):
            yield holder, key
            waiting.append(holder[key])


def _replaced(value: Any, document: Any, chance: random.Random) -> Any:
    change = chance.random()
    if isinstance(value, int | float) and not isinstance(value, bool) and change < 0.5:
        return chance.choice((value + 1, value - 1, -value, value * 2, 0.5, str(value), [value], f"{value}.0"))
    if isinstance(value, str) and change < 0.3:
        return chance.choice((value[:-1], value + "x", value.upper(), [value], {"content": value}, value + "\ud800"))
    if change < 0.03:
        nested: Any = value
        for _ in range(chance.choice(_DEPTHS)):
            nested = [nested] if chance.random() < 0.5 else {"a": nested}
        return nested
    if change < 0.1:
        return chance.choice(([value], {"a": value}, [value, value]))
    return _odd(chance)


def _odd(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(ODD))  # a copy: later changes must not reach the table
