"""Ops, registered with PyTorch as torch.ops.arcmerge.<name>: for torch.compile and for programs that only know torch.

`backend` chooses the implementation at every call, because ARCMERGE_BACKEND may change between two calls.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, ParamSpec, TypeVar, get_type_hints

import torch
from torch import Tensor

from arcmerge.dispatch.backend import choose, explain
from arcmerge.dispatch.recording import current

Implementation = Callable[..., Any]
Function = TypeVar("Function", bound=Implementation)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

LIBRARY = torch.library.Library("arcmerge", "DEF")
# A finalizer of torch's unregisters the ops when the process ends, also under a daemon thread that calls them: 7 of 8
# such exits ended in a traceback or in SIGSEGV, 0 of 8 with the ops left registered.
for _reference in weakref.getweakrefs(LIBRARY):
    if isinstance(_reference.__callback__, weakref.finalize):
        _reference.__callback__.atexit = False
SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    tuple[Tensor, Tensor]: "(Tensor, Tensor)",
    bool: "bool",
    float: "float",
    int: "int",
    int | None: "int?",
    str: "str",
    torch.dtype: "ScalarType",
}


class Op(Generic[Parameters, Result]):
    """An op: a reference, which defines it, and faster implementations. A call runs the one that `backend` chooses.

    The decorators `check`, `fake`, `native`, `triton` and so on add a function that takes the arguments of the
    reference, all of them: first those that the reference takes by position, then the others by keyword.
    """

    def __init__(
        self,
        reference: Callable[Parameters, Result],
        name: str,
        mutates: Collection[str],
        stepwise_by_reference: Collection[str],
    ) -> None:
        functools.update_wrapper(self, reference)
        self.name = name
        self.implementations: dict[str, Implementation] = {"reference": reference}
        parameters = inspect.signature(reference).parameters.values()
        self._defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        self._stepwise_by_reference = stepwise_by_reference
        self._suits: dict[str, Implementation] = {}
        self._check: Implementation
        self._fake: Implementation
        LIBRARY.define(schema(reference, name, mutates))
        for device in ("cpu", "cuda"):
            LIBRARY.impl(name, self._runner(device), device.upper())
        LIBRARY.impl(name, self._run_fake, "Meta")
        self._overload = getattr(torch.ops.arcmerge, name).default
        OPS[name] = self

    def __call__(self, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        result: Result = self._overload(*arguments, **named)
        return result

    def backend(self, device: str, *arguments: Any, **named: Any) -> str:
        """The name of the backend that a call for tensors on "cpu" or "cuda" would run now.

        The arguments are needed by ops with a backend that is chosen for some of them only.
        """
        rules = self._suits
        suits = lambda each: each not in rules or rules[each](*arguments, **named)  # noqa: E731
        return choose(device, self.name, self.implementations, suits).name

    def check(self, function: Function) -> Function:
        """Decorator: raises ArcmergeError for arguments that break the contract, before any implementation runs."""
        self._check = function
        return function

    def fake(self, function: Function) -> Function:
        """Decorator: returns an output of the right shape, dtype and device, with any values."""
        self._fake = function
        return function

    def native(self, function: Function) -> Function:
        """Decorator: the implementation for tensors on the CPU, in C++."""
        self.implementations["native"] = function
        return function

    def triton(self, function: Function) -> Function:
        """Decorator: the implementation for tensors on a GPU, in Triton."""
        self.implementations["triton"] = function
        return function

    def cuda_cpp(self, suits: Callable[..., bool]) -> Callable[[Function], Function]:
        """Decorator: the implementation for tensors on a GPU, in CUDA C++; `suits` tells whether to choose it for some
        arguments."""

        def add(function: Function) -> Function:
            self.implementations["cuda_cpp"], self._suits["cuda_cpp"] = function, suits
            return function

        return add

    def on_demand(self, backend: str) -> Callable[[Function], Function]:
        """Decorator: the implementation of a backend that runs only where a setting names it; it takes `stepwise`."""

        def add(function: Function) -> Function:
            self.implementations[backend] = function
            return function

        return add

    def _runner(self, device: str) -> Implementation:
        name, defaults, implementations = self.name, self._defaults, self.implementations
        by_reference = self._stepwise_by_reference
        guard: Callable[[tuple[Any, ...]], AbstractContextManager[object]]
        guard = _on_device if device == "cuda" else nullcontext

        def run(*arguments: Any, **named: Any) -> Any:
            if defaults:
                named = defaults | named  # the dispatcher leaves out arguments that are equal to their defaults
            self._check(*arguments, **named)
            backend = self.backend(device, *arguments, **named)
            if backend in by_reference:
                if named["stepwise"]:
                    backend = "reference"
                else:
                    del named["stepwise"]
            function = implementations[backend]
            with guard(arguments):
                if (recording := current()) is not None:
                    return recording.call(name, function, arguments, named)
                return function(*arguments, **named)

        return run

    def _run_fake(self, *arguments: Any, **named: Any) -> Any:
        named = self._defaults | named
        self._check(*arguments, **named)
        return self._fake(*arguments, **named)


def _on_device(arguments: tuple[Any, ...]) -> torch.cuda.device:
    """A context in which the current CUDA device is that of the first tensor.

    Triton launches on the current device and its stream, and the dispatcher of PyTorch does not change the device for
    an implementation in Python.
    """
    first = arguments[0]
    return torch.cuda.device((first if isinstance(first, Tensor) else first[0]).device)


OPS: dict[str, Op[Any, Any]] = {}


def op(
    name: str | None = None, *, mutates: Collection[str] = (), stepwise_by_reference: Collection[str] = ()
) -> Callable[[Callable[Parameters, Result]], Op[Parameters, Result]]:
    """Decorator for the reference of an op: plain torch, on any device.

    Its signature is that of the op: the schema of torch.ops.arcmerge.<name> is made of its annotations. Parameters with
    a default must be keyword-only.

    Args:
        name: of the op; by default that of the function.
        mutates: the tensors that are changed in place.
        stepwise_by_reference: the backends that cannot compute with stepwise=True. The reference does it for them, and
            they are not given the argument.
    """
    return lambda reference: Op(reference, name or reference.__name__, mutates, stepwise_by_reference)


def schema(reference: Callable[..., Any], name: str, mutates: Collection[str]) -> str:
    """The schema of an op in the language of PyTorch's native_functions.yaml, from the annotations of its reference."""
    types = get_type_hints(reference)
    arguments = []
    for index, each in enumerate(inspect.signature(reference).parameters.values()):
        assert each.default is each.empty or each.kind == each.KEYWORD_ONLY, each
        if each.kind == each.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        kind = f"Tensor(a{index}!)" if each.name in mutates else SCHEMA_TYPES[types[each.name]]
        arguments.append(f"{kind} {each.name}" + ("" if each.default is each.empty else f"={each.default!r}"))
    return f"{name}({', '.join(arguments)}) -> {SCHEMA_TYPES[types['return']]}"


def backends(device: str) -> dict[str, str]:
    """The backend of every op on a device type, "cpu" or "cuda", and why it was chosen, in words."""
    return {name: explain(device, name, each.implementations) for name, each in OPS.items()}
