"""arcmerge inside transformers: its attention by name, or all modules of a loaded Gemma-2.

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
from arcmerge.integrations.transformers.decode import DecodeStep, RotaryTable
from arcmerge.integrations.transformers.layers import REPLACEMENTS, DecoderLayer, Linear, Norm
from arcmerge.integrations.undo import Undo
from arcmerge.ops.linear import MAX_ROWS

with needed("transformers", by="arcmerge.integrations.transformers", extra="transformers"):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.gemma2 import modeling_gemma2 as gemma2

_REGISTERED = Counter[str]()


def register_attention() -> Undo:
    """Register arcmerge's attention as attn_implementation="arcmerge" in transformers, with its padding masks.

    It computes causal attention, with or without a sliding window, softcap and grouped heads, in inference. A model's
    own eager attention computes everything else.

    Returns:
        An Undo, also a context manager; the name is removed with the undo() of the last call.

    Example::

        >>> from arcmerge.integrations.transformers import register_attention
        >>> from transformers import Gemma2ForCausalLM
        >>> with register_attention():
        ...     model = Gemma2ForCausalLM.from_pretrained("out/", attn_implementation="arcmerge")
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
    """Let arcmerge's ops compute the norms, MLPs, attention and lm_head of a Gemma-2 of transformers, in place.

    Modules stay where they are and get another class; config and masks stay those of eager attention. transformers'
    own code still runs where gradients are recorded, under autocast, in other or mixed dtypes, and for modules that
    are not those of a plain Gemma-2, such as adapters and modules with hooks, whether added before or after this call.
    Softcaps, products and activations are float32 inside an op, so bfloat16 logits equal transformers' up to rounding.

    Args:
        model: a Gemma-2 model of transformers in bfloat16 or float32.

    Returns:
        An Undo, also a context manager. Its `left` lists the modules that transformers still runs.

    Raises:
        ArcmergeError: if the model has another architecture or dtype.

    Example::

        >>> from arcmerge.integrations.transformers import accelerate
        >>> from transformers import Gemma2ForCausalLM
        >>> model = Gemma2ForCausalLM.from_pretrained("out/")
        >>> accelerated = accelerate(model)
        >>> accelerated.left
        []
        >>> accelerated.undo()
    """
    if not isinstance(model, gemma2.Gemma2PreTrainedModel):
        raise ArcmergeError(f"'model' must be a Gemma-2 of transformers, got {type(model).__name__}")
    if model.dtype not in ACTIVATIONS:
        raise ArcmergeError(f"'model' must be in bfloat16 or float32, got {model.dtype}")
    undo = Undo()
    is_first = not any(isinstance(module, Norm) for module in model.modules())
    rotary = RotaryTable(model.config.max_position_embeddings)
    for name, module in model.named_modules():
        _replace(name, module, rotary, undo)
    if model.device.type == "cpu" and is_first:
        threads = _SingleThread()
        undo.later(model.register_forward_pre_hook(threads.before, with_kwargs=True).remove)
        undo.later(model.register_forward_hook(threads.after, always_call=True).remove)
    return undo


def _replace(name: str, module: Any, rotary: RotaryTable, undo: Undo) -> None:
    theirs = type(module)
    is_plain_head = name == "lm_head" and theirs is nn.Linear and module.bias is None
    ours = Linear if is_plain_head else REPLACEMENTS.get(theirs)
    if ours is not None and "forward" not in vars(module):
        module.__class__ = ours
        undo.later(lambda: setattr(module, "__class__", theirs))
        if isinstance(module, DecoderLayer):
            module.step = DecodeStep(module, rotary)
            undo.later(lambda: delattr(module, "step"))
        elif not getattr(module, "is_plain", lambda: True)():
            undo.left.append(name)
    elif ours is not None or (name == "lm_head" and theirs is not Linear):
        undo.left.append(name)


class _SingleThread:
    """Hooks that limit torch's own operations to one thread while a model runs a few tokens.

    torch's other threads spin for a while after each operation, on processors that the ops' threads need: decoding of a
    2.6B on two of them was 0.7 times as fast as without ops.
    """

    def __init__(self) -> None:
        self._count: int | None = None  # the user's number of threads, while it is replaced

    def before(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs = next((named[key] for key in ("input_ids", "inputs_embeds") if named.get(key) is not None), None)
        inputs = arguments[0] if inputs is None and arguments else inputs
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or inputs is None or inputs.dim() < 2:
            return
        if inputs.shape[0] * inputs.shape[1] <= MAX_ROWS:
            self._count = self._count or torch.get_num_threads()
            torch.set_num_threads(1)

    def after(self, *_: Any) -> None:
        if self._count is not None:
            torch.set_num_threads(self._count)
            self._count = None
