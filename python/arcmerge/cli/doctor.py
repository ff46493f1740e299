"""The command `arcmerge doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from arcmerge.cli.terminal import print_json

NAME = "doctor"
SUMMARY = "show versions, processors, GPUs and the backend of every op"
INTERRUPTED = "nothing was written"
EPILOG = """\
example:
  arcmerge doctor"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(arguments: argparse.Namespace) -> None:
    from arcmerge.doctor import examine

    findings = examine()
    print_json(findings) if arguments.json else _print_table(findings)


def _print_table(findings: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    ops = {device: _grouped(backends) for device, backends in findings["ops"].items()}
    for key, value in _flat({**findings, "ops": ops}):
        table.add_row(key, value)
    Console().print(table, highlight=False)


def _grouped(backends: Mapping[str, str]) -> dict[str, str]:
    """The ops of each backend in one line: {"gram, combine": "native"}."""
    grouped: dict[str, list[str]] = {}
    for op, backend in backends.items():
        grouped.setdefault(backend, []).append(op)
    return {", ".join(ops): backend for backend, ops in grouped.items()}


def _flat(findings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in findings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key} ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "not installed")
            rows.append((prefix + str(key), text or "none"))
    return rows
