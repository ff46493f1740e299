"""arcmerge inside transformers: the attention alone by name, or all of a Gemma-2 that transformers has loaded.

with register_attention():
    model = Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="arcmerge")

accelerated = accelerate(model)    # model.generate, caches and hooks work as before
accelerated.undo()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2 as gemma2

from arcmerge import ops
from arcmerge.errors import ArcmergeError
from arcmerge.integrations.decoding import DecodingStep, Rotation
from arcmerge.integrations.undo import Undo
from arcmerge.ops.attention import HEAD_DIMS
from arcmerge.ops.linear import MOST_TOKENS

NAME = "arcmerge"
_DTYPES = (torch.bfloat16, torch.float32)

Forward = Callable[..., Any]


def register_attention() -> Undo:
    """Lets transformers' models be loaded with attn_implementation="arcmerge", padding masks included.

    For models whose attention is causal, with or without a window, softcap and groups of heads, in inference.
    """
    undo = Undo()
    for functions, ours in ((ALL_ATTENTION_FUNCTIONS, attention_forward), (ALL_MASK_ATTENTION_FUNCTIONS, visible_keys)):
        if NAME not in functions._global_mapping:
            type(functions).register(NAME, ours)
            undo.later(lambda functions=functions: functions._global_mapping.pop(NAME, None))
    return undo


def accelerate(model: Any) -> Undo:
    """Let norms, MLPs, attention and head of a Gemma-2 of transformers be computed by arcmerge's ops, in place.

    Where gradients are recorded, modules work as before. Adapters and hooks on linear layers go in first: modules that
    have them stay as they are. Softcaps, products and activations are float32 inside an op,
    so bfloat16 logits differ from transformers' by rounding. Raises ArcmergeError for anything but a Gemma-2 in
    bfloat16 or float32.
    """
    if not isinstance(model, gemma2.Gemma2PreTrainedModel):
        raise ArcmergeError(f"accelerate takes a Gemma-2 of transformers, got {type(model).__name__}")
    if model.dtype not in _DTYPES:
        raise ArcmergeError(f"accelerate takes a model in bfloat16 or float32, got {model.dtype}")
    undo = register_attention()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    undo.later(lambda: model.set_attn_implementation(before))
    rotation = Rotation(model.config.max_position_embeddings)
    for name, module in model.named_modules():
        make = _linear if name == "lm_head" else _FORWARDS.get(type(module))
        if isinstance(module, gemma2.Gemma2DecoderLayer):
            _replace(module, _layer(module, rotation), undo)
        elif make is not None and _is_plain(module):
            _replace(module, make(module), undo)
        elif make is not None:
            undo.left.append(name)
    if model.device.type == "cpu":
        _leave_processors(model, undo)
    return undo


def _leave_processors(model: nn.Module, undo: Undo) -> None:
    """Let torch's own operations of a few tokens use one thread.

    After each its other threads would wait in a loop for the next, on processors that the ops' threads need: decoding
    of a 2.6B on two of them was 0.7 times as fast as without ops.
    """
    threads = torch.get_num_threads()

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = next((named[key] for key in ("input_ids", "inputs_embeds") if named.get(key) is not None), None)
        given = arguments[0] if given is None and arguments else given
        if not torch.is_grad_enabled() and given is not None and given.shape[0] * given.shape[1] <= MOST_TOKENS:
            torch.set_num_threads(1)

    undo.later(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    undo.later(model.register_forward_hook(lambda *_: torch.set_num_threads(threads), always_call=True).remove)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module can be computed without calling what is inside it."""
    inside = [part for part in module.modules() if part is not module]
    return all(map(_is_known, [module, *inside])) and not _hooked(inside)


def _is_known(part: nn.Module) -> bool:
    """Whether all parameters that are a module's own are those that ops take: of norms and of linear layers."""
    has_no_bias = type(part) is nn.Linear and part.bias is None
    return has_no_bias or isinstance(part, gemma2.Gemma2RMSNorm) or not list(part.parameters(recurse=False))


def _hooked(parts: Iterable[Any]) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def _replace(module: nn.Module, ours: Forward, undo: Undo) -> None:
    theirs = module.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            given = (*arguments, *named.values())
            if any(isinstance(value, Tensor) and value.requires_grad for value in given):
                return theirs(*arguments, **named)
        return ours(*arguments, **named)

    module.forward = forward
    undo.later(lambda: vars(module).pop("forward"))


# ---- what replaces the forward of a module


def _norm(module: Any) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return ops.rmsnorm(x, module.weight, module.eps).to(x.dtype)

    return forward


def _mlp(module: Any) -> Forward:
    def forward(x: Tensor) -> Tensor:
        inner = ops.linear_geglu(x.flatten(0, -2), module.gate_proj.weight, module.up_proj.weight)
        return ops.linear(inner, [module.down_proj.weight]).view(x.shape)

    return forward


def _linear(module: Any) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return ops.linear(x.flatten(0, -2), [module.weight]).view(*x.shape[:-1], -1)

    return forward


def _attention(module: Any) -> Forward:
    projections = [module.q_proj, module.k_proj, module.v_proj]
    heads = [one.weight.shape[0] // module.head_dim for one in projections]
    out = _linear(module.o_proj)

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **named: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = named.pop("past_key_values", cache)
        batch, tokens = hidden_states.shape[:-1]
        qkv = ops.linear(hidden_states.flatten(0, -2), [one.weight for one in projections])
        query, key, value = qkv.view(len(qkv), -1, module.head_dim).split(heads, dim=1)
        # Into tensors of their own, as a cache takes them: by one op for fourteen of torch.
        states = key.new_empty(2, batch, heads[1], tokens, module.head_dim)
        query = ops.rope_cache(query, key, value, *_rotation(*position_embeddings, batch), *states)
        query, (key, value) = query.view(batch, tokens, -1, module.head_dim).transpose(1, 2), states
        if cache is not None:
            key, value = cache.update(key, value, module.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation, gemma2.eager_attention_forward
        )
        attended, weights = attend(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=module.scaling,
            sliding_window=module.sliding_window,
            softcap=module.attn_logit_softcapping,
            **named,
        )
        return out(attended.flatten(2)), weights

    return forward


@lru_cache(maxsize=1)  # Every layer of a step asks for the same.
def _rotation(cosine: Tensor, sine: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Table, positions and sequences for ops.rope_cache, of cos and sin [1 or B, T, Dh] whose halves are the same."""
    half = cosine.shape[2] // 2
    table = torch.cat([cosine[..., :half], sine[..., :half]], dim=2).expand(batch, -1, -1).flatten(0, 1).contiguous()
    rows = torch.arange(len(table), device=table.device)
    return table, rows, rows // cosine.shape[1]


def _layer(module: Any, rotation: Rotation) -> Forward:
    theirs, step = module.forward, DecodingStep(module, rotation)
    attention, mlp = module.self_attn, module.mlp
    first, second, third, last = norms = (
        module.input_layernorm,
        module.post_attention_layernorm,
        module.pre_feedforward_layernorm,
        module.post_feedforward_layernorm,
    )
    inside = [part for part in module.modules() if part is not module]
    is_known = all(map(_is_known, inside))

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        **named: Any,
    ) -> Tensor:
        cache = named.pop("past_key_values", cache)  # as it was called before transformers 5.20
        plain = is_known and not _hooked(inside) and module.config._attn_implementation == NAME
        if plain and attention_mask is None and step.serves(hidden_states, cache):
            return step(hidden_states, position_embeddings, cache)
        given = {"position_embeddings": position_embeddings, "attention_mask": attention_mask, "cache": cache, **named}
        if _hooked(norms):
            return theirs(hidden_states, position_ids=position_ids, **given)
        normed = ops.rmsnorm(hidden_states, first.weight, first.eps)
        branch, _ = attention(normed, position_ids=position_ids, **given)
        residual, normed = ops.rmsnorm_add_rmsnorm(branch, hidden_states, second.weight, third.weight, third.eps)
        return residual + ops.rmsnorm(mlp(normed), last.weight, last.eps)

    return forward


_FORWARDS: dict[type, Callable[[Any], Forward]] = {
    gemma2.Gemma2RMSNorm: _norm,
    gemma2.Gemma2MLP: _mlp,
    gemma2.Gemma2Attention: _attention,
}


# ---- the attention and its mask, as transformers calls them


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, Dh], key and value [B, Hkv, S, Dh] -> ([B, T, H, Dh], no weights).

    attention_mask: from `visible_keys`. Rows of padding come out as zeros. Raises ArcmergeError for what ops.attention
    has not: dropout, masks of four dimensions, other heads.
    """
    if dropout:
        raise ArcmergeError(f"attn_implementation='arcmerge' has no dropout, got {dropout}; call model.eval()")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ArcmergeError("attn_implementation='arcmerge' takes masks [batch, tokens] alone; use 'eager' for others")
    if query.shape[3] not in HEAD_DIMS:
        raise ArcmergeError(f"attn_implementation='arcmerge' has heads of {HEAD_DIMS} elements, got {query.shape[3]}")
    batch, tokens, head_dim = query.shape[0], query.shape[2], query.shape[3]
    device = query.device
    how: dict[str, Any] = {
        "scale": head_dim**-0.5 if scaling is None else scaling,
        "softcap": softcap or 0.0,
        "window": sliding_window or 0,
    }
    rows = query.transpose(1, 2)
    if attention_mask is None:
        visible, asked = None, torch.ones(batch, tokens, dtype=torch.bool, device=device)
        lengths = torch.full((batch,), key.shape[2], dtype=torch.int32, device=device)
    else:
        visible = attention_mask.to(device, torch.bool)
        # Queries stand at the last positions that any sequence sees.
        end = int(visible.any(dim=0).nonzero().max()) + 1
        asked = visible[:, end - tokens : end]
        lengths = visible.sum(dim=1, dtype=torch.int32)
        # The op takes the tokens of a sequence from slot 0 on.
        order = (~visible).to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None].expand(key.shape)
        key, value = key.gather(2, order), value.gather(2, order)
    key, value = key.contiguous(), value.contiguous()
    if tokens == 1:
        return _decode(rows[:, 0], key, value, lengths * asked[:, 0], how), None
    starts = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    starts[1:] = asked.sum(dim=1).cumsum(dim=0)
    packed = rows.reshape(-1, rows.shape[2], head_dim) if visible is None else rows[asked]
    found = ops.attention(packed.contiguous(), key, value, starts, lengths, tokens, **how)
    if visible is None:
        return found.view(rows.shape), None
    out = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    out[asked] = found
    return out, None


def _decode(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, how: dict[str, Any]) -> Tensor:
    """[B, 1, H, Dh], of one query a sequence: 4 ms a layer less than as a prompt of one token (2.6B, 512 keys, AVX2).

    The op rotates and appends the newest key, which transformers has done: so it is given that key again, and a
    rotation by nothing, which changes no bit.
    """
    batch, heads, head_dim = query.shape
    newest, row = (lengths - 1).clamp(min=0), torch.arange(batch, device=query.device)
    states = [query, key[row, :, newest], value[row, :, newest]]
    qkv = torch.cat(states, dim=1).flatten(1)
    table = _no_rotation(key.shape[2], head_dim, key.device)
    counters = torch.zeros(batch, key.shape[1], dtype=torch.int32, device=key.device)
    return ops.attention_decode(qkv, table, lengths, key, value, counters, heads, **how).view(batch, 1, heads, head_dim)


@lru_cache(maxsize=1)
def _no_rotation(keys: int, head_dim: int, device: torch.device) -> Tensor:
    """A rope table whose angles are all zero."""
    table = torch.zeros(keys, head_dim, device=device)
    table[:, : head_dim // 2] = 1.0
    return table


def visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """[batch, keys] bool: which keys are tokens that some query may see; None: all. Causality and windows are the op's.

    Raises ArcmergeError for several sequences packed into one row, which only masks of four dimensions tell apart.
    """
    if not allow_is_causal_skip and q_length > 1:
        raise ArcmergeError("attn_implementation='arcmerge' takes one sequence a row; use 'eager' for packed ones")
    if attention_mask is not None:
        device = attention_mask.device
    written = torch.arange(kv_offset, kv_offset + kv_length, device=device) < q_offset + q_length
    visible = written.expand(batch_size, -1)
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        visible = visible & nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
    return None if visible.all() else visible
