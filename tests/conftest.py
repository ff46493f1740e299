"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One of several processes of tests: threads of more than one would wait for each other. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job that a shell has put into the background ignores them, and so would every command that is tested.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

if os.environ.get("TRITON_INTERPRET") == "1":
    from emulation import interpreter

    interpreter.install()


# Files are handed out in this order: minutes of compiling go first, or one process would be left with them.
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
    """Of torch and of the native code: for tiny models, between whose calls more would wait for each other."""
    import torch

    from arcmerge import _C

    before = torch.get_num_threads(), _C.threads()
    torch.set_num_threads(1)
    _C.set_threads(1)
    yield
    torch.set_num_threads(before[0])
    _C.set_threads(before[1])
