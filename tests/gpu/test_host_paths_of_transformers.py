"""Models of transformers on fake GPUs, accelerated or with attention by name: results have the bits of the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arcmerge import ops
from emulation.cuda.tensor import CudaTensor
from fake_devices import needs_fake_devices
from host_paths import same

pytestmark = needs_fake_devices


@pytest.fixture
def fake_tensors_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of a fake GPU are of a subclass, for which ops do not replace operations of torch otherwise."""
    from arcmerge.integrations.transformers import conditions

    monkeypatch.setattr(conditions, "_TENSORS", (*conditions._TENSORS, CudaTensor))


def logits_of_transformers(device: str) -> list[torch.Tensor]:
    """The logits of three tokens that an accelerated model of transformers generates."""
    import accelerated

    model = accelerated.tiny(num_hidden_layers=1).to(device)
    ids = torch.tensor([[2, 5, 7]], device=device)
    with torch.no_grad(), accelerated.accelerate(model):
        found = model.generate(ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return [logits.cpu() for logits in found.logits]


@pytest.fixture(scope="module")
def of_transformers() -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARCMERGE_BACKEND", "triton")
        return logits_of_transformers("cpu")


@pytest.mark.usefixtures("gpus", "fake_tensors_are_plain")
def test_an_accelerated_model_of_transformers(
    of_transformers: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from arcmerge.integrations.transformers.decode import DecodeStep

    steps: list[Any] = []
    step = DecodeStep.__call__
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, *arguments: steps.append(1) or step(self, *arguments))
    assert same(logits_of_transformers("cuda:1"), of_transformers)
    assert len(steps) == 2


@pytest.mark.usefixtures("gpus", "fake_tensors_are_plain")
@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "accelerated"])
def test_a_padded_batch_decodes_without_copies_of_its_cache(monkeypatch: pytest.MonkeyPatch, by_name: bool) -> None:
    import accelerated
    from arcmerge.integrations.transformers import register_attention

    def logits(device: str) -> list[torch.Tensor]:
        model = accelerated.tiny(num_hidden_layers=2).to(device)
        mask = torch.ones_like(accelerated.IDS)
        mask[1, :4] = 0
        with torch.no_grad(), register_attention() if by_name else accelerated.accelerate(model):
            if by_name:
                model.set_attn_implementation("arcmerge")
            found = model.generate(
                accelerated.IDS.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=3,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return [each.cpu() for each in found.logits]

    gathered: list[int] = []
    gather = torch.Tensor.gather
    monkeypatch.setattr(torch.Tensor, "gather", lambda self, *rest: gathered.append(self.dim()) or gather(self, *rest))
    found = logits("cuda:1")
    assert gathered.count(4) == 2 * 2  # keys and values of the prompt, in each of two layers
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    assert same(found, logits("cpu"))


@pytest.mark.usefixtures("gpus", "fake_tensors_are_plain")
def test_attention_by_name_with_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerated
    from arcmerge.integrations.transformers import register_attention

    def logits(device: str) -> torch.Tensor:
        model = accelerated.tiny(num_hidden_layers=1).to(device)
        model.set_attn_implementation("arcmerge")
        mask = torch.ones_like(accelerated.IDS)
        mask[1, :4] = 0
        with torch.no_grad():
            return model(accelerated.IDS.to(device), attention_mask=mask.to(device)).logits.cpu()

    calls: list[str] = []
    attention = ops.attention
    monkeypatch.setattr(
        ops, "attention", lambda q, *rest, **named: calls.append(str(q.device)) or attention(q, *rest, **named)
    )
    with register_attention():
        found = logits("cuda:1")
        monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
        assert same(found, logits("cpu"))
    assert calls == ["cuda:1", "cpu"]
