"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported."""

import os
from pathlib import Path

import pytest

import tiny

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    from emulation import interpreter

    interpreter.install()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny pair gemma-a and gemma-b."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("gemma-a", "gemma-b"):
        tiny.make(name, folder)
    return folder
