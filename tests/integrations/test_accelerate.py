"""Accelerated models of transformers: logits, tokens, caches, padding, hooks, and undo."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Gemma2ForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import arcmerge
from arcmerge import ops
from arcmerge.integrations.transformers import accelerate, register_attention
from gemma2_models import SHAPES, build

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build(folder, request.param, F32)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    build(folder, "2.6B", F32)
    return folder


def load(folder: Path, dtype: torch.dtype = F32, attention: str = "eager") -> Any:
    return Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def batch(*lengths: int, left: bool = True) -> dict[str, Tensor]:
    """Prompts of these lengths, padded on the left or the right."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(max(lengths) - length, None) if left else slice(0, length)
        ids[row, place] = torch.randint(3, 1003, (length,), generator=torch.Generator().manual_seed(row + length))
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize(
    ("lengths", "left"), [((1,), True), ((40,), True), ((9, 9), True), ((3, 19, 12, 1), True), ((3, 19, 12, 1), False)]
)
@pytest.mark.parametrize("way", ["accelerate", "attention alone"])
def test_logits(folder: Path, lengths: tuple[int, ...], left: bool, way: str) -> None:
    inputs = batch(*lengths, left=left)
    expected = load(folder)(**inputs).logits
    with register_attention():
        model = load(folder, attention="arcmerge" if way == "attention alone" else "eager")
        if way == "accelerate":
            assert accelerate(model).left == []
            assert model.config._attn_implementation == "eager"
        found = model(**inputs).logits
    assert (found - expected).abs().max() <= 1e-4  # at padding too


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("lengths", [(5,), (3, 19, 12)], ids=str)
def test_generate_gives_the_same_tokens(folder: Path, lengths: tuple[int, ...], cache: str) -> None:
    """In float32, beyond the window of 8, with every kind of cache."""
    inputs, options = batch(*lengths), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options["cache_implementation"] = "static"
    elif cache == "none":
        options["use_cache"] = False
    model = load(folder)
    expected = model.generate(**inputs, **options)
    with accelerate(model):
        assert torch.equal(model.generate(**inputs, **options), expected)


@torch.no_grad()
def test_caches_stay_those_of_transformers(one: Path) -> None:
    """Two copies of a cache, one of them cropped, used alternately beyond the first buffer."""

    def logits(model: Any) -> Tensor:
        first = model(**batch(120)).past_key_values
        second = DynamicCache(
            [(layer.keys, layer.values) for layer in first.layers], config=model.config.get_text_config()
        )
        found = []
        for token in range(3, 20):
            if token == 12:
                first.crop(-3)
            for cache, number in ((first, token), (second, 2 * token)):
                found.append(model(torch.tensor([[number]]), past_key_values=cache).logits)
        found.append(model(torch.tensor([[3, 4, 5]]), past_key_values=first).logits[:, -1:])
        found.append(model(torch.tensor([[7]]), past_key_values=first).logits)
        return torch.cat(found)

    model = load(one)
    model.config.sliding_window = 4096
    for layer in model.model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 4096
    expected = logits(model)
    with accelerate(model):
        assert (logits(model) - expected).abs().max() <= 1e-4


def test_steps_inside_and_outside_of_inference_mode(one: Path) -> None:
    model, inputs = load(one), batch(5)
    model.requires_grad_(False)
    with accelerate(model):
        with torch.inference_mode():
            model(torch.tensor([[7]]), past_key_values=model(**inputs).past_key_values)
        cache = model(**inputs).past_key_values
        found = model(torch.tensor([[7]]), past_key_values=cache).logits
    expected = model(torch.cat([inputs["input_ids"], torch.tensor([[7]])], dim=1)).logits[:, -1:]
    assert (found - expected).abs().max() <= 1e-4  # as test_logits


@torch.no_grad()
def test_weights_may_change_between_steps(one: Path) -> None:
    """In place, in other memory, and as another parameter."""

    def logits(model: Any) -> Tensor:
        found, cache = [], model(**batch(3)).past_key_values
        for change in (None, "in place", "memory", "parameter", None):
            down, up = (getattr(model.model.layers[2].mlp, name) for name in ("down_proj", "up_proj"))
            if change == "in place":
                down.weight.mul_(2.0)
            elif change == "memory":
                down.weight.data = down.weight * 3.0
            elif change == "parameter":
                up.weight = torch.nn.Parameter(up.weight * 0.1)
            found.append(model(torch.tensor([[9]]), past_key_values=cache).logits)
        return torch.cat(found)

    expected, model = logits(load(one)), load(one)
    with accelerate(model):
        assert (logits(model) - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_bfloat16_is_as_accurate_as_transformers(one: Path) -> None:
    inputs = batch(60)
    truth, model = load(one)(**inputs).logits, load(one, BF16)
    theirs = (model(**inputs).logits - truth).norm()
    with accelerate(model):
        # Most of the error comes from the residual stream, which transformers keeps in bfloat16.
        assert (model(**inputs).logits - truth).norm() <= 1.25 * theirs


@torch.no_grad()
def test_undo(one: Path) -> None:
    model, inputs, threads = load(one), batch(4, 11), torch.get_num_threads()
    expected = model(**inputs).logits
    undo = accelerate(model)
    assert not torch.equal(model(**inputs).logits, expected)
    assert torch.get_num_threads() == threads
    undo.undo()
    undo.undo()
    assert torch.equal(model(**inputs).logits, expected)
    assert model.config._attn_implementation == "eager"
    untouched = load(one)
    for ours, theirs in zip(model.modules(), untouched.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
        assert not {**ours._forward_hooks, **ours._forward_pre_hooks}
    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        assert "arcmerge" not in functions
    with pytest.raises((KeyError, ValueError), match="arcmerge"):
        load(one, attention="arcmerge")(**inputs)


@torch.no_grad()
def test_hooks_keep_working(one: Path) -> None:
    model, inputs, seen = load(one), batch(6), []
    layer = model.model.layers[1]
    for name in ("input_layernorm", "self_attn", "mlp", "post_feedforward_layernorm"):
        getattr(layer, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    layer.mlp.down_proj.register_forward_hook(lambda *_: seen.append("down_proj"))
    with accelerate(model) as undo:
        model(**inputs)
        # A module with a hook inside, which an op would skip, stays unchanged.
        assert undo.left == ["model.layers.1.mlp"]
    assert seen == ["input_layernorm", "self_attn", "down_proj", "mlp", "post_feedforward_layernorm"]
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 5


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_transformers(one: Path, frozen: bool) -> None:
    """Also for weights whose inputs need no gradients, as after a frozen embedding."""
    model, inputs = load(one), batch(3, 12)
    model.get_input_embeddings().weight.requires_grad_(not frozen)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = [weight.grad.clone() for weight in weights]
    model.zero_grad()
    with accelerate(model):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_copies_and_pickles_have_weights_of_their_own(one: Path, tmp_path: Path) -> None:
    model, inputs = load(one), batch(5)
    with accelerate(model):
        generate = {"max_new_tokens": 4, "do_sample": False}
        expected = model.generate(**inputs, **generate)
        copied = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        for other in (copied, torch.load(tmp_path / "model.pt", weights_only=False)):
            assert torch.equal(other.generate(**inputs, **generate), expected)
            other.to(BF16).model.layers[0].mlp.down_proj.weight.zero_()
            assert not torch.allclose(other(**inputs).logits.float(), model(**inputs).logits, atol=0.05)
        assert torch.equal(model.generate(**inputs, **generate), expected)


@torch.no_grad()
def test_another_activation_is_left_to_transformers(one: Path) -> None:
    model = Gemma2ForCausalLM.from_pretrained(one, dtype=F32, hidden_activation="relu").eval()
    expected = model(**batch(5)).logits
    with accelerate(model) as undo:
        assert undo.left == [f"model.layers.{number}.mlp" for number in range(4)]
        torch.testing.assert_close(model(**batch(5)).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_modules_and_hooks_that_are_added_later_run(one: Path) -> None:
    """Adapters, which replace linear layers, and hooks of modules inside a fused op."""

    class Adapter(torch.nn.Module):
        def __init__(self, inside: Any) -> None:
            super().__init__()
            self.inside, self.weight = inside, getattr(inside, "weight", None)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inside(x)

    for place in ("self_attn.q_proj", "mlp.up_proj", "mlp", "input_layernorm"):
        model, inputs = load(one), batch(5)
        parent, _, name = f"model.layers.1.{place}".rpartition(".")
        generate = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with accelerate(model):
            setattr(model.get_submodule(parent), name, Adapter(model.get_submodule(f"{parent}.{name}")))
            ours = model.generate(**inputs, **generate)
        theirs = model.generate(**inputs, **generate)
        for one_step, other in zip(ours.logits, theirs.logits, strict=True):
            torch.testing.assert_close(one_step, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("way", ["accelerate", "attention alone"])
def test_masks_that_the_op_does_not_support(one: Path, way: str) -> None:
    """Masks of four dimensions, and packed sequences."""
    eager, ids = load(one), batch(12)["input_ids"]
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    seen[7, 2] = False
    added = torch.zeros(1, 1, 12, 12).masked_fill(~seen, torch.finfo(F32).min)
    packed = torch.tensor([[*range(5), *range(7)]])
    with register_attention() as undo:
        model = load(one, attention="arcmerge" if way == "attention alone" else "eager")
        if way == "accelerate":
            accelerated = accelerate(model)
            undo.later(accelerated.undo)
        for named in ({"attention_mask": added}, {"position_ids": packed, "use_cache": False}):
            torch.testing.assert_close(model(ids, **named).logits, eager(ids, **named).logits, rtol=1e-4, atol=1e-4)
        # By name, a boolean mask is True where a key is seen; eager attention adds the mask.
        same = seen[None, None] if way == "accelerate" else added
        of_bool = model(ids, attention_mask=seen[None, None]).logits
        torch.testing.assert_close(of_bool, eager(ids, attention_mask=same).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_calls_of_ops(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    names = ("rmsnorm", "rmsnorm_add_rmsnorm", "rope_cache", "linear", "linear_geglu", "attention", "attention_decode")
    for name in names:
        original = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, name=name, original=original, **k: called.append(name) or original(*a, **k)
        )
    model = load(one)
    with accelerate(model):
        model(**batch(5))
        prompt = {name: called.count(name) for name in set(called)}
        cache = model(**batch(5)).past_key_values
        steps = []
        for _ in range(2):
            called.clear()
            model(torch.tensor([[7]]), past_key_values=cache)
            steps.append({name: called.count(name) for name in set(called)})
    # Four layers, the final norm and the lm_head.
    layers = {"rmsnorm_add_rmsnorm": 4 * 2, "rope_cache": 4, "linear_geglu": 4, "attention": 4}
    assert prompt == {"rmsnorm": 4 + 1, "linear": 4 * 3 + 1, **layers}
    recorded = {"rmsnorm_add_rmsnorm": 4 * 2, "linear_geglu": 4, "attention_decode": 4}
    assert steps == [{"rmsnorm": 4 + 1, "linear": 4 * 3 + 1, **recorded}, {"rmsnorm": 1, "linear": 1}]


@torch.no_grad()
def test_unsupported_models_raise(one: Path) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match="'model' must be a Gemma-2 of transformers, got Linear"):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(arcmerge.ArcmergeError, match=r"in bfloat16 or float32, got torch\.float16"):
        accelerate(load(one, torch.float16))
