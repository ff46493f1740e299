"""A model of transformers in any state gives the same results before, while and after it is accelerated."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from transformers import DynamicCache, Gemma2ForCausalLM

from accelerated import IDS, assert_same, outcome, tensors, tiny
from arcmerge import ops
from arcmerge.integrations.transformers import accelerate

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


pytestmark = pytest.mark.usefixtures("one_thread")


def norms_in_float32(model: Any) -> None:
    """As after peft.prepare_model_for_kbit_training."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data = weight.data.float()


def projection_in_float32(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.float()


def own_head(model: Any) -> None:
    model.set_output_embeddings(nn.Linear(32, 61, bias=False))


def head_with_bias(model: Any) -> None:
    model.lm_head = nn.Linear(32, 61)


def lora(model: Any, **named: Any) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, **named)
    model.add_adapter(config)


def turned(model: Any) -> None:
    """A square weight that is stored as its transpose."""
    weight = torch.randn(32, 32)
    for attention in (layer.self_attn for layer in model.model.layers):
        attention.k_proj.weight = nn.Parameter(weight.T)


def scaled_hook(model: Any, of: str, pre: bool) -> None:
    part = model.get_submodule(of)
    if pre:
        part.register_forward_pre_hook(
            lambda _, given, named: (
                tuple(x * 2 for x in given),
                {key: x * 2 if key == "hidden_states" else x for key, x in named.items()},
            ),
            with_kwargs=True,
        )
    else:
        part.register_forward_hook(lambda _, given, out: (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2)


def attention_of(name: str) -> Callable[[Any], None]:
    return lambda model: model.set_attn_implementation(name)


def attribute(path: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        part, _, name = path.rpartition(".")
        setattr(model.get_submodule(part), name, value)

    return change


# Changes of a model before or after it is accelerated.
STATES: dict[str, Callable[[Any], Any]] = {
    "float16": lambda model: model.half(),
    "bfloat16": lambda model: model.to(BF16),
    "float32": lambda model: model.float(),
    "float64": lambda model: model.double(),
    "norms in float32": norms_in_float32,
    "projection in float32": projection_in_float32,
    "train": lambda model: model.train(),
    "frozen": lambda model: model.requires_grad_(False),
    "gradient checkpointing": lambda model: (model.gradient_checkpointing_enable(), model.train()),
    "embedding resized": lambda model: model.resize_token_embeddings(70, mean_resizing=False),
    "own head": own_head,
    "head with bias": head_with_bias,
    "LoRA": lora,
    "DoRA": lambda model: lora(model, use_dora=True),
    "weights turned": turned,
    "weights doubled": lambda model: [weight.data.mul_(2) for weight in model.parameters()],
    "weights of another class": lambda model: model.load_state_dict(tiny(initializer_range=0.2).state_dict()),
    "eps": attribute("model.layers.0.post_attention_layernorm.eps", 0.5),
    "softcap of attention": attribute("model.layers.1.self_attn.attn_logit_softcapping", None),
    "scale of attention": attribute("model.layers.1.self_attn.scaling", 0.5),
    "other activation": attribute("model.layers.0.mlp.act_fn", nn.ReLU()),
    "no softcap of logits": lambda model: setattr(model.config, "final_logit_softcapping", None),
    "no softcap in config": lambda model: setattr(model.config, "attn_logit_softcapping", None),
    "window in config": lambda model: setattr(model.config, "sliding_window", 3),
    "attentions in config": lambda model: setattr(model.config, "output_attentions", True),
    "fewer layers in config": lambda model: setattr(model.config, "num_hidden_layers", 1),
    "eager attention": attention_of("eager"),
    "sdpa": attention_of("sdpa"),
    "spectral norm": lambda model: nn.utils.parametrizations.spectral_norm(model.model.layers[0].mlp.down_proj),
    **{
        f"{'pre-' if pre else ''}hook of {part or 'the model'}": lambda model, part=part, pre=pre: scaled_hook(
            model, f"model.layers.1{part and '.'}{part}", pre
        )
        for part in ("", "self_attn", "self_attn.o_proj", "mlp", "mlp.act_fn", "input_layernorm")
        for pre in (False, True)
    },
}


def used(model: Any) -> Any:
    """A prompt with padding, cached steps beyond the window, and gradients if they are recorded."""
    torch.manual_seed(4)
    mask = (torch.arange(IDS.shape[1]) >= torch.tensor([[3], [0]])).long()
    found = [model(IDS, attention_mask=mask, labels=IDS)]
    with torch.no_grad():
        cache, start = DynamicCache(config=model.config), 0
        for count in (3, 1, 1, 2, 1):
            found.append(model(IDS[1:, start : start + count], past_key_values=cache))
            start += count
    if found[0].loss.requires_grad:
        found[0].loss.backward()
    return [tensor.detach() for tensor in tensors(found)], [
        weight.grad for weight in model.parameters() if weight.grad is not None
    ]


def tolerance_of(model: Any) -> float:
    """The tolerance of half precision: some units in the last place of logits up to 30."""
    return 2e-4 if all(weight.dtype in (F32, torch.float64) for weight in model.parameters()) else 0.6


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("when", "recorded"), [("before", True), ("after", False)])
def test_states(state: str, when: str, recorded: bool) -> None:
    dtype = BF16 if "in float32" in state else F32
    model, other = tiny(dtype=dtype), tiny(dtype=dtype)
    with torch.set_grad_enabled(recorded):
        torch.manual_seed(2)
        refused = outcome(lambda model: (STATES[state](model), torch.ones(1))[1], model)
        expected = outcome(used, model)
        if when == "before":
            torch.manual_seed(2)
            assert_same(outcome(lambda model: (STATES[state](model), torch.ones(1))[1], other), refused)
            if other.dtype not in (BF16, F32):
                return  # raises, see test_accelerate
        undo = accelerate(other)
        if when == "after":
            outcome(used, other)  # to find state that earlier calls have left
            other.zero_grad()
            torch.manual_seed(2)
            assert_same(outcome(lambda model: (STATES[state](model), torch.ones(1))[1], other), refused)
        assert_same(outcome(used, other), expected, tolerance_of(model))
        undo.undo()
        other.zero_grad()
        assert not [module for module in other.modules() if type(module).__module__.startswith("arcmerge")]
        assert_same(outcome(used, other), expected, tolerance_of(model))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("autocast", [BF16, F16])
def test_autocast(dtype: torch.dtype, autocast: torch.dtype) -> None:
    model, other = tiny(dtype=dtype), tiny(dtype=dtype)
    with torch.no_grad(), accelerate(other), torch.autocast("cpu", dtype=autocast):
        assert_same(outcome(used, other), outcome(used, model), 0.0)


def test_compilation() -> None:
    """Without a graph break."""

    def compiled(model: Any) -> Any:
        call = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            return call(IDS[:1, :3], use_cache=False)  # few enough for an accelerated model to set torch's threads

    model, other = tiny(num_hidden_layers=1), tiny(num_hidden_layers=1)
    with accelerate(other):
        assert_same(outcome(compiled, other), outcome(compiled, model))


def test_forward_derivatives_and_gradients_of_a_prefix() -> None:
    def tangent(model: Any) -> Any:
        embedded = model.get_input_embeddings()(IDS)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(embedded, torch.ones_like(embedded))
            return forward_ad.unpack_dual(model(inputs_embeds=dual, use_cache=False).logits).tangent

    def prefix(model: Any) -> Any:
        """Learned keys and values before a frozen model."""
        states = [torch.randn(1, 2, 3, 16, requires_grad=True) for _ in range(4)]
        for tokens in (1, 4):
            cache = DynamicCache([(states[0], states[1]), (states[2], states[3])])
            model(IDS[:1, :tokens], past_key_values=cache).logits.sum().backward()
        return [state.grad for state in states]

    for function in (tangent, prefix):
        model, other = tiny().requires_grad_(False), tiny().requires_grad_(False)
        with accelerate(other):
            assert_same(outcome(function, other), outcome(function, model), 1e-3)


@torch.no_grad()
def test_hooks_of_all_modules() -> None:
    seen: list[str] = []
    model = tiny()
    with accelerate(model):
        cache = model(IDS[:1, :3]).past_key_values
        handle = nn.modules.module.register_module_forward_hook(lambda part, *_: seen.append(type(part).__name__))
        model(IDS[:1, 3:4], past_key_values=cache)
        handle.remove()
    assert seen.count("Linear") == 2 * 7 + 1
    assert seen.count("Norm") == 2 * 4 + 1


@torch.no_grad()
def test_copies_outlive_their_original(tmp_path: Path) -> None:
    model = tiny()
    expected = outcome(used, model)
    undo = accelerate(model)
    used(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.save_pretrained(tmp_path)
    undo.undo()
    for other in (*copies, Gemma2ForCausalLM.from_pretrained(tmp_path).eval(), model):
        assert_same(outcome(used, other), expected)


@torch.no_grad()
def test_twice_and_in_any_order_of_undoing() -> None:
    expected = outcome(used, tiny())
    for order in ([0, 1], [1, 0]):
        model = tiny()
        undos = [accelerate(model), accelerate(model)]
        assert undos[1].left == []
        for number in order:
            assert_same(outcome(used, model), expected)
            undos[number].undo()
        assert_same(outcome(used, model), expected)
        assert not [part for part in model.modules() if part._forward_hooks or part._forward_pre_hooks]


@torch.no_grad()
def test_threads_on_one_model() -> None:
    """At the same slots with different positions, to find a rotation of the other thread."""
    model = tiny(sliding_window=64)
    found: dict[int, Any] = {}

    def steps(shift: int) -> torch.Tensor:
        cache, out = model(IDS[:1, :3], position_ids=torch.arange(3)[None] + shift).past_key_values, []
        for number in range(12):
            place = torch.tensor([[3 + shift + number]])
            out.append(model(IDS[:1, 3:4], past_key_values=cache, position_ids=place).logits)
        return torch.cat(out)

    def work(shift: int) -> None:
        with torch.no_grad():  # of this thread
            found[shift] = steps(shift)

    expected = {shift: steps(shift) for shift in (0, 7, 13)}
    with accelerate(model):
        workers = [threading.Thread(target=work, args=(shift,)) for shift in expected]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for shift, logits in expected.items():
        torch.testing.assert_close(found[shift], logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_ops_run_again_after_an_adapter_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    original = ops.linear_geglu
    monkeypatch.setattr(ops, "linear_geglu", lambda *a, **k: called.append(True) or original(*a, **k))
    model = tiny()
    with accelerate(model):
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
        adapted(IDS)
        assert not called
        expected = adapted(IDS).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert len(called) == 2


def test_weights_without_memory() -> None:
    """Accelerated on the meta device, filled afterwards."""
    with torch.device("meta"):
        model = tiny()
    accelerate(model)
    filled = tiny()
    for path, weight in [*filled.named_parameters(), *filled.named_buffers()]:
        part, _, name = path.rpartition(".")
        setattr(model.get_submodule(part), name, weight)
    model.tie_weights()
    with torch.no_grad():
        assert_same(outcome(used, model), outcome(used, tiny()))
