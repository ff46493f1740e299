"""Fake GPUs for tests, in every order in which CUDA may execute what was enqueued."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulation.cuda import ORDERS, Runtime, cuda


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def gpus(order: str, one_thread: None) -> Iterator[Runtime]:
    """Two devices in each of the orders."""
    with cuda(devices=2, order=order, seed=1) as runtime:
        yield runtime


@pytest.fixture
def latest() -> Iterator[Runtime]:
    """Two devices that execute as late as they may."""
    with cuda(devices=2, order="latest") as runtime:
        yield runtime
