"""The choice of a backend for an op: the first of an ordered list that can run on the tensors' device.

ARCMERGE_BACKEND names the backend to use, and ARCMERGE_BACKEND_<OP>, as in ARCMERGE_BACKEND_ATTENTION, that of one op;
an op that it cannot run raises.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass

from arcmerge import _C, cuda
from arcmerge.errors import ArcmergeError


@dataclass(frozen=True)
class Backend:
    """A backend.

    Args:
        name: as ARCMERGE_BACKEND takes it.
        objection: given a device type, returns why the backend cannot run there, or None.
        detail: returns a few words on the code that runs.
    """

    name: str
    objection: Callable[[str], str | None]
    detail: Callable[[], str]


def _against_native(device: str) -> str | None:
    return None if device == "cpu" else f"it runs on cpu, not on {device}"


def _against_cuda_cpp(device: str) -> str | None:
    if not cuda.has_ptx():
        return "the package was built without nvcc"
    return None if device == "cuda" else f"it runs on cuda, not on {device}"


def _against_triton(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"it runs on cuda (on cpu with TRITON_INTERPRET=1), not on {device}"


def _against_package(package: str) -> Callable[[str], str | None]:
    def objection(device: str) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        return None if device == "cuda" else f"it runs on cuda, not on {device}"

    return objection


# The reference runs everywhere, so that what comes after it runs only where a setting names it.
BACKENDS = (
    Backend("native", _against_native, lambda: f"{_C.variant()} code"),
    Backend("cuda_cpp", _against_cuda_cpp, lambda: "CUDA C++, for tensors for which it moves fewer bytes than triton"),
    Backend("triton", _against_triton, lambda: "kernels compiled on first use"),
    Backend("reference", lambda device: None, lambda: "plain torch"),
    Backend("flash_attn", _against_package("flash_attn"), lambda: "the package flash-attn"),
    Backend("flashinfer", _against_package("flashinfer"), lambda: "the package FlashInfer"),
)


def _setting(op: str) -> tuple[str, str | None]:
    """The environment variable that names the backend of an op, and its value, None if it is not set."""
    own = f"ARCMERGE_BACKEND_{op.upper()}"
    name = own if own in os.environ else "ARCMERGE_BACKEND"
    return name, os.environ.get(name)


def settings() -> tuple[tuple[str, str], ...]:
    """The environment variables that name backends, and their values. What was captured under others is stale."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("ARCMERGE_BACKEND")))


def is_forced(op: str) -> bool:
    """Whether a setting names the backend of an op."""
    return _setting(op)[1] is not None


def choose(device: str, op: str, offered: Collection[str], suits: Callable[[str], bool] = lambda name: True) -> Backend:
    """Choose the backend of an op.

    Args:
        device: type of the tensors' device, "cpu" or "cuda".
        op: name of the op.
        offered: names of the backends that have the op.
        suits: given the name of a backend, whether to choose it for the arguments of this call if no setting names one.

    Raises:
        ArcmergeError: if a setting names a backend that does not exist or cannot run the op there.
    """
    setting, forced = _setting(op)
    if forced is None:
        for backend in BACKENDS:
            if backend.name in offered and backend.objection(device) is None and suits(backend.name):
                return backend
    for backend in BACKENDS:
        if backend.name == forced:
            if objection := _objection(backend, device, op, offered):
                raise ArcmergeError(
                    f"'{setting}' must name a backend that can run {op} on {device}, got '{forced}': {objection}"
                )
            return backend
    names = ", ".join(backend.name for backend in BACKENDS)
    raise ArcmergeError(f"'{setting}' must be one of {names}, got '{forced}'")


def _objection(backend: Backend, device: str, op: str, offered: Collection[str]) -> str | None:
    return backend.objection(device) if backend.name in offered else f"it has no {op}"


def explain(device: str, op: str, offered: Collection[str]) -> str:
    """The backend of an op on a device type and why it was chosen, in words; or the error of `choose`."""
    try:
        chosen = choose(device, op, offered)
    except ArcmergeError as error:
        return str(error)
    setting, forced = _setting(op)
    if forced is not None:
        return f"{chosen.name} ({chosen.detail()}): forced by {setting}"
    passed_over = [
        f"not {backend.name}: {_objection(backend, device, op, offered)}"
        for backend in BACKENDS[: BACKENDS.index(chosen)]
    ]
    return "; ".join([f"{chosen.name} ({chosen.detail()})", *passed_over])
