"""Refuses writes outside of some folders, by a Python audit hook."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {"os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.chmod", "os.truncate"}
_PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}


class Confined:
    """From now on, raises OSError if code changes files outside of `folders` or runs programs.

    An audit hook cannot be removed; after `close` it allows everything.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = (*(str(folder.resolve()) for folder in folders), "/dev/null")
        self._open = True
        sys.addaudithook(self._audit)

    def close(self) -> None:
        self._open = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._open:
            return
        if event in _PROGRAMS:
            raise OSError(f"{event} {arguments[0]!r} ran a program")
        writes = event == "open" and arguments[2] is not None and arguments[2] & _WRITES
        if writes or event in _CHANGES:
            paths = [path for path in arguments[: 2 if event == "os.rename" else 1] if not isinstance(path, int)]
            for path in paths:
                where = os.path.realpath(os.fspath(path))
                where = where.decode() if isinstance(where, bytes) else where
                if not where.startswith(self._folders):
                    raise OSError(f"{event} outside: {where}")
