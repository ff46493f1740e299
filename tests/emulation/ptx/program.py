"""A PTX kernel, taken apart: parameters, registers, instructions, labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


class Fault(Exception):
    """What a GPU would not do, or not do reliably. lane: of the machine, where one is to blame."""

    def __init__(self, message: str, lane: int | None = None) -> None:
        super().__init__(message)
        self.lane = lane


class Unsupported(NotImplementedError):
    """PTX that the emulator does not know."""


@dataclass(frozen=True)
class Address:
    """[base + offset]; base is a register, a parameter, a symbol or a number."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


class Instruction(NamedTuple):
    """`@!%p1 op.a.b x, y` has parts (op, a, b), predicate %p1, which is negated, and operands (x, y)."""

    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    text: str

    @property
    def opcode(self) -> str:
        return ".".join(self.parts)


@dataclass(frozen=True)
class Program:
    """parameters: name to type, in order; "map" for 128 bytes. threads: of a block. registers: declared name to type.
    labels: name to the instruction that follows.
    """

    name: str
    threads: int
    parameters: dict[str, str]
    registers: dict[str, str]
    instructions: list[Instruction]
    labels: dict[str, int]


_COMMENT = re.compile(r"//[^\n]*")
_LINE_DIRECTIVE = re.compile(r"^\s*\.(?:loc|file|pragma|section)\b[^\n]*", re.MULTILINE)
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,]*?(\w+)(\[128\])?\s*(?:,|$)")
_LABEL = re.compile(r"^\s*(\$?\w+):(?!:)")
_OUTSIDE_BRACES = re.compile(r",(?![^{]*\})")
# The address of a copy by a tensor map has coordinates.
_COORDINATES = re.compile(r"\[\s*([%\w]+)\s*,\s*(\{[^}]*\})\s*\]")
_ADDRESS = re.compile(r"\[\s*([%$\w.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]")


def parse(text: str) -> Program:
    """The one kernel of `text`."""
    text = _LINE_DIRECTIVE.sub("", _COMMENT.sub("", text))
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise Unsupported(f"PTX with {len(entries)} kernels")
    (entry,) = entries
    name, parameters, directives = entry.groups()
    required = re.search(r"\.reqntid\s+(\d+)", directives)
    if required is None:
        raise Unsupported(f"{name}: no .reqntid, so the number of threads is not known")
    registers: dict[str, str] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    scopes = [""]
    for statement in _body(text, entry.end()).split(";"):
        # Labels of inline assembly are known within its braces.
        statement = _enter(statement, scopes, len(instructions))
        while label := _LABEL.match(statement):
            labels[scopes[-1] + label[1]] = len(instructions)
            statement = _enter(statement[label.end() :], scopes, len(instructions))
        statement = statement.strip()
        if statement.startswith(".reg"):
            _declare(statement, registers)
        elif statement and not statement.startswith("."):
            instruction = _instruction(statement)
            inner = scopes[-1] + str(instruction.operands[0]) if instruction.parts[0] == "bra" else ""
            instructions.append(instruction._replace(operands=(inner,)) if inner in labels else instruction)
    return Program(name, int(required[1]), _parameters(parameters), registers, instructions, labels)


def _enter(statement: str, scopes: list[str], place: int) -> str:
    """The statement behind the braces that it starts with. scopes: a prefix of labels for each that is open."""
    rest = statement.lstrip("{} \t\n")
    for brace in statement[: len(statement) - len(rest)]:
        if brace == "{":
            scopes.append(f"{place}.{len(scopes)}.")
        elif brace == "}" and len(scopes) > 1:
            scopes.pop()
    return rest


def _parameters(text: str) -> dict[str, str]:
    found = _PARAMETER.findall(text.replace("\n", " ").strip())
    return {name: "map" if whole else kind for kind, name, whole in found}


def _body(text: str, start: int) -> str:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    raise Unsupported("PTX with a brace that is not closed")


def _declare(statement: str, registers: dict[str, str]) -> None:
    _, kind, names = re.split(r"\s+", statement.replace(",", " "), maxsplit=2)
    for name in names.split():
        many = re.fullmatch(r"(.+)<(\d+)>", name)
        for register in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
            if registers.setdefault(register, kind[1:]) != kind[1:]:
                raise Unsupported(f"register {register} of two types")


def _instruction(statement: str) -> Instruction:
    text = _COORDINATES.sub(r"[\1], \2", " ".join(statement.split()))
    guard = re.match(r"@(!?)\s*([%\w]+)\s+", text)
    opcode, _, operands = text[guard.end() if guard else 0 :].partition(" ")
    if opcode == "call" or opcode.startswith("call."):
        raise Unsupported(f"a call: {text}")
    arguments = tuple(_operand(operand.strip()) for operand in _OUTSIDE_BRACES.split(operands)) if operands else ()
    return Instruction(tuple(opcode.split(".")), arguments, guard[2] if guard else None, bool(guard and guard[1]), text)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(element.strip() for element in text.strip("{}").split(","))
    if text.startswith("["):
        address = _ADDRESS.fullmatch(text)
        if address is None:
            raise Unsupported(f"the address {text}")
        base, sign, offset = address.groups()
        return Address(base, int(f"{sign}1") * int(offset, 0) if offset else 0)
    return text
