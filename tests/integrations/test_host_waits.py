"""Accelerated models on another device than the CPU: everything is there, and the host hardly waits for it.

Fake tensors have a device and a shape, but no values: an operation on tensors of two devices raises an error, and so
does reading a value, for which the host would wait for a GPU. Their device is "meta", as a torch for the CPU cannot
index those of "cuda".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

from accelerated import IDS, SETTINGS, assert_same, tiny
from arcmerge.integrations.transformers import accelerate, conditions, masks, register_attention

DEVICE = torch.device("meta")
LAYERS = 6
# Masks of the two sequences of IDS: padding at one end or the other, or none.
LEFT, RIGHT, NONE = (torch.ones_like(IDS) for _ in range(3))
LEFT[0, :4], RIGHT[0, 7:] = 0, 0


class Copies(TorchDispatchMode):
    """Raises an error for copies between devices for which the host waits.

    Attributes:
        rotating: how often attention_decode was given angles, as decoding steps of one sequence do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rotating = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.arcmerge.attention_decode.default:
            self.rotating += (kwargs or {}).get("cos_sin") is not None
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {each.device.type for each in (*args, found) if isinstance(each, Tensor)}
            assert len(devices) == 1, f"{func} between {devices}"
        if func is torch.ops.aten.index.Tensor:
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "an index of truth values"
        return found


class Read:
    """Replaces masks.read: keeps its results, or repeats those of another run on fake tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results: list[list[int]] = []
        self.again: Iterator[list[int]] | None = None
        self._read = masks.read
        monkeypatch.setattr(masks, "read", self)

    def __call__(self, *facts: Tensor) -> list[int]:
        result = self._read(*facts) if self.again is None else next(self.again)
        self.results.append(result)
        return result


@torch.no_grad()
def forwards(whole: Any, ids: Tensor, padding: Tensor) -> list[Tensor]:
    """The logits of a prompt, and of two decoding steps after it."""
    found, cache = [], DynamicCache(config=whole.config)
    for _ in range(3):
        found.append(whole(ids, attention_mask=padding, past_key_values=cache).logits)
        padding, ids = torch.cat([padding, torch.ones_like(padding[:, :1])], dim=1), ids[:, :1]
    return found


def model(by_name: bool) -> Any:
    config = Gemma2Config(**{**SETTINGS, "num_hidden_layers": LAYERS}, attn_implementation="eager", dtype="bfloat16")
    whole = Gemma2ForCausalLM._from_config(config).eval()
    whole.config._attn_implementation = "arcmerge" if by_name else "eager"
    return whole


CASES = {"left": LEFT, "right": RIGHT, "none": NONE, "one sequence": NONE[:1], "one sequence, padded": LEFT[:1]}


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "accelerated"])
@pytest.mark.parametrize("padding", CASES.values(), ids=CASES)
def test_everything_is_on_one_device_and_masks_are_read_once(
    padding: Tensor, by_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, ids, whole = Read(monkeypatch), IDS[: len(padding)], model(by_name)
    with register_attention() if by_name else accelerate(whole):
        expected = forwards(whole, ids, padding)
    count, fused = len(read.results), not by_name and len(padding) == 1 and bool(padding.all())
    assert 0 < count <= 2 * 3 + 2 * 2  # two masks in each forward, of which a single token asks twice; not once a layer

    read.again = iter(read.results[:])
    monkeypatch.setattr(conditions, "_TENSORS", (Tensor, nn.Parameter, FakeTensor))
    monkeypatch.setattr(conditions, "_DEVICES", ("meta",))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # knows no such device
    with FakeTensorMode(allow_non_fake_inputs=True), DEVICE:
        whole = model(by_name)
        ids, padding = torch.empty_like(ids, device=DEVICE), torch.empty_like(padding, device=DEVICE)
        with register_attention() if by_name else accelerate(whole), Copies() as copies:
            found = forwards(whole, ids, padding)
    assert [(logits.shape, logits.device) for logits in found] == [(logits.shape, DEVICE) for logits in expected]
    assert len(read.results) == 2 * count
    assert (copies.rotating > 0) == fused


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_is_changed_in_place_is_read_again(mode: Any) -> None:
    tokens = IDS.shape[1]
    plain, ours = tiny(), tiny()
    with accelerate(ours), mode():
        mask = torch.full((1, 1, tokens, tokens), torch.finfo(torch.float32).min).triu(1)
        for hidden in range(4):
            mask[..., :hidden] = torch.finfo(torch.float32).min
            assert_same([ours(IDS, attention_mask=mask).logits], [plain(IDS, attention_mask=mask).logits])
