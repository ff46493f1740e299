"""Ops in PyTorch's own registry: torch.ops.arcmerge.<name>, for torch.compile and for programs that know only torch.

An op is a schema, a reference that defines what it computes, and faster ways to compute the same. Which of them serves
a device is decided in `backend`, at every call: an environment variable may change between two.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, cast

import torch

from arcmerge.dispatch.backend import choose, explain
from arcmerge.dispatch.recording import current

Implementation = Callable[..., Any]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

LIBRARY = torch.library.Library("arcmerge", "DEF")
# A finalizer of torch's unregisters the ops when the process ends, also under a daemon thread that calls them: 7 of 8
# such exits ended in a traceback or in SIGSEGV, 0 of 8 with the ops left registered.
for _reference in weakref.getweakrefs(LIBRARY):
    if isinstance(_reference.__callback__, weakref.finalize):
        _reference.__callback__.atexit = False
OPS: dict[str, Mapping[str, Implementation]] = {}


def op(
    schema: str,
    *,
    check: Callable[..., None],
    reference: Callable[Parameters, Result],
    fake: Implementation,
    native: Implementation | None = None,
    triton: Implementation | None = None,
) -> Callable[Parameters, Result]:
    """Define torch.ops.arcmerge.<name> and return it, typed as its reference, all of whose arguments every other takes.

    schema: as in PyTorch's native_functions.yaml, with the aliases of what is written in place. check: raises
    ArcmergeError for arguments that break the contract, before anything else sees them. reference: plain torch, any
    device. fake: shapes and dtypes alone. native: tensors on the cpu. triton: tensors on a GPU.
    """
    name = schema.partition("(")[0]
    named = {"native": native, "triton": triton, "reference": reference}
    offered = {backend: function for backend, function in named.items() if function is not None}
    OPS[name] = offered
    LIBRARY.define(schema)
    for key in ("cpu", "cuda"):
        LIBRARY.impl(name, _checked(check, _serving(name, key, offered)), key.upper())
    LIBRARY.impl(name, _checked(check, fake), "Meta")
    return cast(Callable[Parameters, Result], getattr(torch.ops.arcmerge, name).default)


def backends(device: str) -> dict[str, str]:
    """What serves every op on a device type, "cpu" or "cuda", and why, in words."""
    return {name: explain(device, name, offered) for name, offered in OPS.items()}


def _serving(name: str, device: str, offered: Mapping[str, Implementation]) -> Implementation:
    def call(*arguments: Any, **named: Any) -> Any:
        function = offered[choose(device, name, offered).name]
        if (recording := current()) is not None:
            return recording.call(name, function, arguments, named)
        return function(*arguments, **named)

    return call


def _checked(check: Callable[..., None], function: Implementation) -> Implementation:
    def call(*arguments: Any, **named: Any) -> Any:
        check(*arguments, **named)
        return function(*arguments, **named)

    return call
