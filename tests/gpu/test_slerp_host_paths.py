"""Merges of tensors and `set_t` on two fake GPUs, in every order: the bits of the CPU, few launches, few waits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import arcmerge
import host_paths
from arcmerge import ops
from emulation.cuda import Runtime

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a GPU of its own")


@pytest.fixture(autouse=True)
def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the package was built with nvcc; test_cuda_host_paths.py has the other kernel."""
    monkeypatch.setenv("ARCMERGE_BACKEND_SLERP", "triton")


T = {"end": 0.0, "b": 1.0}


def parents() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def parent() -> dict[str, Tensor]:
        shapes = {"end": (33, 5), "b": (9,), "c": (2000,), "empty": (0,)}
        found = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
        return {**found, "norm": torch.randn(40, generator=generator), "positions": torch.arange(3)}

    return parent(), parent()


def on(device: str, *models: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: tensor.to(device) for name, tensor in model.items()} for model in models]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].cpu(), tensor), name


def test_state_dicts_by_slerp(gpus: Runtime) -> None:
    models = parents()
    a, b = on("cuda:1", *models)
    gpus.counts.clear()
    found = arcmerge.slerp(a, b, lambda name: T.get(name, 0.3), slerp_normalize=True)
    # Four kernels for each of two combinations of dtypes, and the copy of the whole numbers.
    assert gpus.counts == {"launches": 9}
    assert_same(found, arcmerge.slerp(*models, lambda name: T.get(name, 0.3), slerp_normalize=True))


def test_models_over_two_devices(gpus: Runtime) -> None:
    models = parents()
    spread = [
        {name: tensor.to(f"cuda:{index % 2}") for index, (name, tensor) in enumerate(model.items())} for model in models
    ]
    assert_same(arcmerge.slerp(*spread, 0.3), arcmerge.slerp(*models, 0.3))


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
def test_state_dicts_by_other_methods(gpus: Runtime, method: str) -> None:
    models = parents()
    parameters = {} if method == "karcher" else {"weight": [0.3, 0.6]}
    on_gpu = on("cuda:1", *models)
    gpus.counts.clear()
    found = arcmerge.merge_state_dicts(on_gpu, method, parameters=parameters)
    assert gpus.counts == {"launches": 9, "waits": 1}
    assert_same(found, arcmerge.merge_state_dicts(models, method, parameters=parameters))


def test_a_captured_slerp_reads_t_at_every_replay(gpus: Runtime) -> None:
    a, b = ([*model.values()][:5] for model in parents())
    with torch.cuda.device(1):
        x, y = ([tensor.to("cuda:1") for tensor in side] for side in (a, b))
        t = torch.tensor([0.25], dtype=torch.float64, device="cuda:1")
        ops.slerp(x, y, t)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.slerp(x, y, t)
        for position in (0.5, 1.0):
            t.fill_(position)
            graph.replay()
            for found, expected in zip(captured, ops.slerp(a, b, position), strict=True):
                assert torch.equal(found.cpu(), expected)


def test_set_t_takes_one_launch_and_one_wait(gpus: Runtime, tmp_path: Path) -> None:
    model = host_paths.model_of(host_paths.make_pair(tmp_path), "cuda:1")
    model.set_t(0.6)
    gpus.counts.clear()
    model.set_t(0.7)
    assert gpus.counts == {"launches": 1, "waits": 1}
