"""When arcmerge's ops may take the place of operations of torch: the one place that says so for modules and attention.

Everything else is computed by transformers' own code: autocast, other or mixed dtypes, gradients, compilation, tensors
of other kinds, as quantised ones, and modules whose call does more than their forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from arcmerge.dispatch.checks import ACTIVATIONS

_TENSORS = (Tensor, nn.Parameter)
_DEVICES = ("cpu", "cuda")


def serves(module: nn.Module, x: Any, weights: Iterable[Any], *met: Any) -> bool:
    """Whether ops compute what `module` would of x with these weights: plain tensors of x's dtype on x's device.

    met: what else may bring gradients, such as masks and cached keys; None and other objects bring none.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in _TENSORS:
        return False
    dtype, device = x.dtype, x.device
    if dtype not in ACTIVATIONS or device.type not in _DEVICES or torch.is_autocast_enabled(device.type):
        return False
    for weight in weights:
        if type(weight) not in _TENSORS or weight.dtype != dtype or weight.device != device:
            return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # the ops' checks read lengths, for which a capture cannot wait
    return not _differentiates(module, x, *met)


def _differentiates(module: nn.Module, *tensors: Any) -> bool:
    """Whether derivatives are wanted of a tensor or of a weight of the module, in either direction."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    if not torch.is_grad_enabled():
        return False
    given = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    return any(tensor.requires_grad for tensor in (*given, *module.parameters()))


def is_untouched(part: Any, kind: type) -> bool:
    """Whether a part is of that kind, and would do nothing but its forward if it were called."""
    return (
        type(part) is kind
        and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
        and not torch_module._has_any_global_hook()
    )
