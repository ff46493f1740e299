"""The conditions under which arcmerge's ops replace operations of torch, for modules and for attention.

transformers' own code computes everything else: autocast, other or mixed dtypes, gradients, compilation, tensor
subclasses such as quantised ones, and modules whose call does more than their forward.
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


def ops_apply(module: nn.Module, x: Any, weights: Iterable[Any], *others: Any) -> bool:
    """Whether ops can compute the forward of `module` for x: plain tensors of one dtype on one device, no gradients.

    others: further inputs that may require gradients, such as masks and cached keys; other objects than tensors are
    ignored.
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
        return False  # the checks of ops read lengths, which would synchronize in the middle of a capture
    return not _needs_gradients(module, x, *others)


def _needs_gradients(module: nn.Module, *tensors: Any) -> bool:
    """Whether a tensor or a weight of the module needs derivatives, in forward or in reverse mode."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    if not torch.is_grad_enabled():
        return False
    given = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    return any(tensor.requires_grad for tensor in (*given, *module.parameters()))


def is_unmodified(module: Any, kind: type) -> bool:
    """Whether a module has exactly this type, no hooks and no forward of its own."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        and not torch_module._has_any_global_hook()
    )
