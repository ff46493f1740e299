"""arcmerge inside transformers: the attention alone by name, or all of a Gemma-2 that transformers has loaded.

with register_attention():
    model = Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="arcmerge")

accelerated = accelerate(model)    # model.generate, caches and hooks work as before
accelerated.undo()
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from arcmerge.dispatch.checks import ACTIVATIONS
from arcmerge.errors import ArcmergeError, needed
from arcmerge.integrations.transformers.attention import NAME, attention_forward
from arcmerge.integrations.transformers.decode import DecodingStep, Rotation
from arcmerge.integrations.transformers.layers import OURS, DecoderLayer, Linear, Norm
from arcmerge.integrations.undo import Undo
from arcmerge.ops.linear import MAX_ROWS

with needed("transformers", by="arcmerge.integrations.transformers", extra="transformers"):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.gemma2 import modeling_gemma2 as gemma2

_REGISTERED = Counter[str]()


def register_attention() -> Undo:
    """Lets transformers' models be loaded with attn_implementation="arcmerge", padding masks included.

    For models whose attention is causal, with or without a window, softcap and groups of heads, in inference; all else
    goes through their own eager attention. The name is known until as many undo() as there were calls.
    """
    undo = Undo()
    for functions, ours in ((ALL_ATTENTION_FUNCTIONS, attention_forward), (ALL_MASK_ATTENTION_FUNCTIONS, eager_mask)):
        type(functions).register(NAME, ours)
    _REGISTERED[NAME] += 1
    undo.later(_unregister_attention)
    return undo


def _unregister_attention() -> None:
    _REGISTERED[NAME] -= 1
    if not _REGISTERED[NAME]:
        for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            functions._global_mapping.pop(NAME, None)


def accelerate(model: Any) -> Undo:
    """Let norms, MLPs, attention and head of a Gemma-2 of transformers be computed by arcmerge's ops, in place.

    Modules stay where they are and get another class; config and masks stay those of eager attention. Where gradients
    are recorded, under autocast, in other or mixed dtypes, and where parts of a module are not those of a plain
    Gemma-2, as with adapters and hooks, now or later, it works as before; the result's `left` names those of now.
    Softcaps, products and activations are float32 inside an op, so bfloat16 logits differ from transformers' by
    rounding. Raises ArcmergeError for anything but a Gemma-2 in bfloat16 or float32.
    """
    if not isinstance(model, gemma2.Gemma2PreTrainedModel):
        raise ArcmergeError(f"accelerate takes a Gemma-2 of transformers, got {type(model).__name__}")
    if model.dtype not in ACTIVATIONS:
        raise ArcmergeError(f"accelerate takes a model in bfloat16 or float32, got {model.dtype}")
    undo = Undo()
    is_first = not any(isinstance(module, Norm) for module in model.modules())
    rotation = Rotation(model.config.max_position_embeddings)
    for name, module in model.named_modules():
        _replace(name, module, rotation, undo)
    if model.device.type == "cpu" and is_first:
        threads = _Threads()
        undo.later(model.register_forward_pre_hook(threads.before, with_kwargs=True).remove)
        undo.later(model.register_forward_hook(threads.after, always_call=True).remove)
    return undo


def _replace(name: str, module: Any, rotation: Rotation, undo: Undo) -> None:
    theirs = type(module)
    plain_head = name == "lm_head" and theirs is nn.Linear and module.bias is None
    ours = Linear if plain_head else OURS.get(theirs)
    if ours is not None and "forward" not in vars(module):
        module.__class__ = ours
        undo.later(lambda: setattr(module, "__class__", theirs))
        if isinstance(module, DecoderLayer):
            module.step = DecodingStep(module, rotation)
            undo.later(lambda: delattr(module, "step"))
        elif not getattr(module, "is_plain", lambda: True)():
            undo.left.append(name)
    elif ours is not None or (name == "lm_head" and theirs is not Linear):
        undo.left.append(name)


class _Threads:
    """Lets torch's own operations of a few tokens use one thread.

    After each its other threads would wait in a loop for the next, on processors that the ops' threads need: decoding
    of a 2.6B on two of them was 0.7 times as fast as without ops.
    """

    def __init__(self) -> None:
        self._count: int | None = None  # what the user has set, while one is used

    def before(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = next((named[key] for key in ("input_ids", "inputs_embeds") if named.get(key) is not None), None)
        given = arguments[0] if given is None and arguments else given
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or given is None or given.dim() < 2:
            return
        if given.shape[0] * given.shape[1] <= MAX_ROWS:
            self._count = self._count or torch.get_num_threads()
            torch.set_num_threads(1)

    def after(self, *_: Any) -> None:
        if self._count is not None:
            torch.set_num_threads(self._count)
            self._count = None
