"""Stand-ins of flash-attn and FlashInfer, which check their arguments and compute what their documentation says."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

BF16 = torch.bfloat16


def attended(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, causal: bool, left: int, right: int
) -> Tensor:
    """[n, H, Dh] of one sequence, keys [L, Hkv, Dh]; a query sees `left` keys before its own and `right` after."""
    group = query.shape[1] // key.shape[1]
    key, value = (each.double().repeat_interleave(group, dim=1) for each in (key, value))
    scores = torch.einsum("nhd,lhd->hnl", query.double(), key) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(key)) - torch.arange(len(key) - len(query), len(key))[:, None]
    hidden = distance > (0 if causal else right if right >= 0 else len(key))
    if left >= 0:
        hidden |= distance < -left
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights, value).to(query.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    assert q.dtype == k.dtype == v.dtype == BF16
    assert block_table is not None
    assert softmax_scale is not None
    assert k.shape[1] % 256 == 0
    assert {k.stride(-1), v.stride(-1), q.stride(-1), block_table.stride(-1)} == {1}
    assert {each.dtype for each in (cu_seqlens_q, cu_seqlens_k, block_table)} == {torch.int32}
    new, lengths = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert (int(new.max()), int(lengths.max())) == (max_seqlen_q, max_seqlen_k)
    assert len(block_table) == len(new)
    parts = []
    for (start, end), pages, length in zip(pairwise(cu_seqlens_q.tolist()), block_table, lengths.tolist(), strict=True):
        key, value = (each[pages.long()].flatten(0, 1)[:length] for each in (k, v))
        parts.append(attended(q[start:end], key, value, softmax_scale, softcap, causal, *window_size))
    return torch.cat(parts)


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert (float_workspace_buffer.dtype, float_workspace_buffer.numel()) == (torch.uint8, 128 << 20)
        assert kv_layout == "HND"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        tables = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert {each.dtype for each in tables} == {torch.int32}
        assert (q_data_type, kv_data_type) == (BF16, BF16)
        self.starts = qo_indptr.tolist()
        self.tables = [paged_kv_indices[first:last].long() for first, last in pairwise(paged_kv_indptr.tolist())]
        self.last = paged_kv_last_page_len.tolist()
        self.shape, self.page_size = (num_qo_heads, num_kv_heads, head_dim_qk), page_size
        self.numbers = (sm_scale, logits_soft_cap, causal, window_left, -1)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        k, v = paged_kv_cache
        assert k.stride() == v.stride()
        assert k.stride(-1) == 1
        assert (q.shape[1], k.shape[1], q.shape[2], k.shape[2]) == (*self.shape, self.page_size)
        parts = []
        for (start, end), pages, last in zip(pairwise(self.starts), self.tables, self.last, strict=True):
            length = (len(pages) - 1) * self.page_size + last
            key, value = (each[pages].transpose(1, 2).flatten(0, 1)[:length] for each in (k, v))
            parts.append(attended(q[start:end], key, value, *self.numbers))  # type: ignore[arg-type]
        return torch.cat(parts)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both packages be found and imported."""
    contents = {"flash_attn": flash_attn_varlen_func, "flashinfer": BatchPrefillWithPagedKVCacheWrapper}
    for name, content in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        setattr(module, content.__name__, content)
        monkeypatch.setitem(sys.modules, name, module)
