"""Faults that are planted in the source of a kernel, to test that a case finds them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

from paths import ROOT

KERNELS = ROOT / "kernels"


@contextmanager
def planted(module: str, right: str, wrong: str, folder: Path, user: str | None = None) -> Iterator[None]:
    """Context manager: the cases call the launchers of a copy of kernels/MODULE.py, in `folder`, that has the fault.

    right: what the source has once, and the copy has as `wrong`. user: the kernel that imports the module, if that is
    none itself.
    """
    source = (KERNELS / f"{module}.py").read_text()
    assert source.count(right) == 1, f"{module}.py has {source.count(right)} times {right!r}"
    file = folder / f"{module}.py"
    file.write_text(source.replace(right, wrong))
    copy = loaded(module, file)
    if user:
        with mock.patch.dict(sys.modules, {f"arcmerge.kernels.{module}": copy}):
            module, copy = user, loaded(user, KERNELS / f"{user}.py")
    name = f"arcmerge.kernels.{module}"
    with ExitStack() as patches:
        for caller, contents in list(sys.modules.items()):
            if caller.partition(".")[0] != "cases":
                continue
            for attribute, value in list(vars(contents).items()):
                if value is sys.modules[name]:
                    patches.enter_context(mock.patch.object(contents, attribute, copy))
                elif getattr(value, "__module__", None) == name:
                    patches.enter_context(mock.patch.object(contents, attribute, getattr(copy, attribute)))
        yield


def loaded(module: str, file: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"arcmerge.kernels.{module}_planted", file)
    assert specification is not None
    assert specification.loader is not None
    copy = importlib.util.module_from_spec(specification)
    # Dataclasses and named tuples look for the module of a class.
    with mock.patch.dict(sys.modules, {specification.name: copy}):
        specification.loader.exec_module(copy)
    return copy
