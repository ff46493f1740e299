"""The memory of a running model: what a Gemma-2 of each size needs, and that a merge leaves it free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import arcmerge
import host_paths
from arcmerge.gemma2.runtime import runner, workspace
from arcmerge.gemma2.runtime.runner import Runner
from arcmerge.gemma2.runtime.workspace import workspace_bytes
from arcmerge.merging.execution import memory
from cases.gemma import GEMMA_2, Shape
from emulation.cuda import cuda
from fake_devices import needs_fake_devices
from random_network import config_of

BF16, F32 = torch.bfloat16, torch.float32
GiB = 1 << 30
TOKENS = 48


# Bytes of keys and values a token: 2 tensors of so many layers, heads, elements and bytes. Half of the layers have a
# slot for each of 8,192 tokens, the others for a window of 4,096 and a pass of 2,048. The largest activations of a pass
# are gate, up and their product, or the partial results of 8,000 tiles of the head.
@pytest.mark.parametrize(
    ("shape", "a_token", "mlp"),
    [(GEMMA_2[0], 106_496, 113 << 20), (GEMMA_2[1], 344_064, 176 << 20), (GEMMA_2[2], 376_832, 453 << 20)],
    ids=[shape.name for shape in GEMMA_2],
)
def test_a_model_of_each_size_has_room_for_a_whole_context(shape: Shape, a_token: int, mlp: int) -> None:
    cache = a_token * (8192 + 6144) // 2
    found = workspace_bytes(config_of(shape), BF16)
    assert found >= cache + max(mlp, 2048 * 8000 * 12)
    assert found <= 1.3 * (cache + max(mlp, 2048 * 8000 * 12)) + GiB // 4
    assert workspace_bytes(config_of(shape), F32) > found


def test_a_27b_needs_more_than_a_2b() -> None:
    two, nine, twenty_seven = (workspace_bytes(config_of(shape), BF16) / GiB for shape in GEMMA_2)
    assert 1.0 < two < 1.3
    assert 2.5 < nine < 2.9
    assert 3.0 < twenty_seven < 3.5


@needs_fake_devices
def test_a_pass_stays_within_it(tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of the allocator, above what was allocated before, without the parts that no pass of this model has."""
    for name, value in {"PASS_TOKENS": TOKENS, "_LIBRARIES": 0, "_PARTIALS": 0}.items():
        monkeypatch.setattr(workspace, name, value)
    monkeypatch.setattr(runner, "PASS_TOKENS", TOKENS)
    pair = host_paths.make_pair(tmp_path)
    with cuda(order="earliest") as runtime, torch.inference_mode():
        model = host_paths.model_of(pair, "cuda:0")
        allocator, length = runtime.allocators[0], model.config.max_position_embeddings
        before = allocator.allocated
        peak = 0
        allocate = allocator.allocate

        def watched(nbytes: int) -> Any:
            nonlocal peak
            found = allocate(nbytes)
            peak = max(peak, allocator.allocated - before)
            return found

        allocator.allocate = watched  # type: ignore[method-assign]
        Runner(model.network, 1, length).feed_for_last([[2] * TOKENS])
        assert 0.8 * workspace_bytes(model.config, BF16) < peak <= workspace_bytes(model.config, BF16)


def test_a_merge_in_memory_leaves_it_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(memory, "must_stream", lambda required, parents, device: asked.append(required) or False)
    pair = host_paths.make_pair(tmp_path)
    with cuda(order="latest"):
        model = host_paths.model_of(pair, "cuda:0")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("arcmerge.gemma2.merged_model.workspace_bytes", lambda *_: 0)
            host_paths.model_of(pair, "cuda:0")
    assert isinstance(model, arcmerge.Gemma2)
    assert asked[0] - asked[1] == workspace_bytes(model.config, BF16)
