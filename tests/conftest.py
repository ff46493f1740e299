"""Fixtures, and the environment of the tests, which must be set before torch and triton are imported."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny

# The tests are the same on every machine. Without ARCMERGE_GPU=1, which `make gpu` sets, they and their processes see
# no GPU, so that the device "auto" is the CPU, and Triton interprets its kernels.
if os.environ.get("ARCMERGE_GPU") != "1":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Several test processes run at once, so each uses one thread. This must be set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A background job of a shell ignores these signals, and its children inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

if os.environ.get("TRITON_INTERPRET") == "1":
    from emulation import interpreter

    interpreter.install()


# The files that take longest start first, so that both processes end at about the same time.
_LONGEST = ("test_proof.py", "test_sweep_search.py", "test_gpu_benchmark.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny pair gemma-a and gemma-b."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("gemma-a", "gemma-b"):
        tiny.make(name, folder)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch and the native code, which is fastest for tiny models."""
    import torch

    from arcmerge import _C

    before = torch.get_num_threads(), _C.threads()
    torch.set_num_threads(1)
    _C.set_threads(1)
    yield
    torch.set_num_threads(before[0])
    _C.set_threads(before[1])
