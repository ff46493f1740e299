"""attention: the reference against transformers and a float64 formula, the kernel against the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arcmerge.errors import ArcmergeError
from arcmerge.kernels import attention as kernels
from arcmerge.ops.attention import RING_SLOTS, attend, attention
from cases import attention as cases
from cases.attention import exact_attention
from cases.case import Case, Random, disagreement
from eager import by_transformers

BF16, F32 = torch.bfloat16, torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def draw() -> Random:
    return Random(30, DEVICE)


def whole(count: int, length: int) -> dict[str, Any]:
    """cu_seqlens_q, seqlens_k and max_seqlen_q of one sequence."""
    starts, lengths = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in ([0, count], [length]))
    return {"cu_seqlens_q": starts, "seqlens_k": lengths, "max_seqlen_q": count}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(("softcap", "window"), [(50.0, 0), (50.0, 8), (0.0, 0), (0.0, 1)])
def test_stepwise_has_the_bits_of_transformers(
    softcap: float, window: int, dtype: torch.dtype, draw: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = (draw.normal(*shape, dtype=dtype) for shape in ((20, 4, 32), (2, 30, 32), (2, 30, 32)))
    due = by_transformers(query, key, value, 1.5, softcap, window, dtype)
    for backend in ("reference", "triton"):
        monkeypatch.setenv("ARCMERGE_BACKEND", backend)
        actual = attention(
            query, key[None], value[None], **whole(20, 30), scale=1.5, softcap=softcap, window=window, stepwise=True
        )
        assert torch.equal(actual, due)


@pytest.mark.parametrize(("softcap", "window"), [(50.0, 0), (50.0, 8), (0.0, 0), (0.0, 300)])
def test_reference_is_the_formula(softcap: float, window: int, draw: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    # More queries than the reference takes at a time.
    query, key, value = (draw.normal(*shape, dtype=F32) for shape in ((300, 4, 16), (2, 310, 16), (2, 310, 16)))
    actual = attention(query, key[None], value[None], **whole(300, 310), scale=0.7, softcap=softcap, window=window)
    truth, tolerance = exact_attention(query, key, value, 0.7, softcap, window, F32)
    assert ((actual.double() - truth).abs() <= tolerance).all()
    hugging_face = by_transformers(query, key, value, 0.7, softcap, window, F32)
    assert (actual.double() - truth).abs().max() <= 2 * (hugging_face.double() - truth).abs().max()


def test_formula_takes_float64(draw: Random) -> None:
    query, key, value = (draw.normal(*shape, dtype=torch.float64) for shape in ((6, 4, 16), (2, 9, 16), (2, 9, 16)))
    actual = attend(query, key, value, torch.arange(3, 9), torch.arange(9), 0.7, 50.0, 4, False)
    torch.testing.assert_close(actual, exact_attention(query, key, value, 0.7, 50.0, 4, F32)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_kernel_is_within_what_rounding_allows(case: Case) -> None:
    call = case.build(Random(31, DEVICE))
    call.launch()
    for name, expected in call.expected().items():
        assert disagreement(call.outputs[name], expected) <= 1


def test_kernel_sees_exactly_a_window_of_4096(draw: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only one key is loud: the oldest that the first of three queries sees. The other queries do not see it.
    length, count = 4099, 3
    query = torch.ones(count, 2, 16, device=DEVICE)
    key, value = torch.zeros(2, 1, 1, length, 16, device=DEVICE)
    key[..., 1, :], value[..., 1, :] = 2.0, 1.0
    for backend in ("reference", "triton"):
        monkeypatch.setenv("ARCMERGE_BACKEND", backend)
        out = attention(query, key, value, **whole(count, length), scale=1.0, softcap=50.0, window=4096)
        assert (out[0] > 0.9).all()
        assert (out[1:] == 0).all()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, draw: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    query = draw.normal(50, 4, 16, dtype=dtype)
    key, value = draw.normal(2, 3, 2, 64, 16, dtype=dtype)
    starts, lengths = (torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in ([0, 30, 30, 50], [60, 9, 20]))
    together = attention(query, key, value, starts, lengths, max_seqlen_q=30, scale=0.3, softcap=50.0, window=40)
    alone = attention(query[30:], key[2:], value[2:], **whole(20, 20), scale=0.3, softcap=50.0, window=40)
    assert torch.equal(together[30:], alone)


def test_op_is_registered_as_torch_wants(draw: Random) -> None:
    query, key, value = draw.normal(5, 4, 16), draw.normal(1, 2, 8, 16), draw.normal(1, 2, 8, 16)
    numbers = {"scale": 0.3, "softcap": 50.0, "window": 4}
    torch.library.opcheck(torch.ops.arcmerge.attention.default, (query, key, value), {**whole(5, 8), **numbers})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another dtype": ({"query": torch.ones(5, 4, 16, dtype=torch.float16)}, "'query' must be bfloat16 or float32"),
    "mixed dtypes": ({"value_cache": torch.ones(1, 2, 64, 16)}, "'value_cache' must have the dtype of 'query'"),
    "unlike caches": (
        {"value_cache": torch.ones(1, 2, 65, 16, dtype=BF16)},
        "'value_cache' must have the shape [B, Hkv, S, Dh] = [1, 2, 64, 16], got [1, 2, 65, 16]",
    ),
    "three dimensions": (
        {"key_cache": torch.ones(2, 64, 16, dtype=BF16)},
        "'key_cache' must have the shape [B, Hkv, S, Dh], got [2, 64, 16]",
    ),
    "odd heads": (
        {"key_cache": torch.ones(1, 2, 8, 24, dtype=BF16), "value_cache": torch.ones(1, 2, 8, 24, dtype=BF16)},
        "'key_cache' must have heads of 16, 32, 64, 128 or 256 elements, got 24",
    ),
    "heads that do not share": (
        {"query": torch.ones(5, 3, 16, dtype=BF16)},
        "'heads' must be a multiple of the 2 key-value heads, got 3",
    ),
    "another head": (
        {"query": torch.ones(5, 4, 32, dtype=BF16)},
        "'query' must have the shape [T, H, Dh] = [*, *, 16], got [5, 4, 32]",
    ),
    "strides": ({"query": torch.ones(4, 5, 16, dtype=BF16).transpose(0, 1)}, "'query' must be contiguous"),
    "long lengths": ({"seqlens_k": torch.tensor([8])}, "'seqlens_k' must be int32, got int64"),
    "two lengths": (
        {"seqlens_k": torch.tensor([8, 8], dtype=torch.int32)},
        "'seqlens_k' must have the shape [B] = [1], got [2]",
    ),
    "rows left over": (
        {"cu_seqlens_q": torch.tensor([0, 4], dtype=torch.int32)},
        "'cu_seqlens_q' must rise from 0 to the 5 rows of 'query', got [0, 4]",
    ),
    "short grid": ({"max_seqlen_q": 4}, "'max_seqlen_q' must be 5 or more, got 4"),
    "queries that are not counted": (
        {"seqlens_k": torch.tensor([4], dtype=torch.int32)},
        "'seqlens_k[0]' must include the 5 queries of the sequence, got 4",
    ),
    "a full cache": (
        {"seqlens_k": torch.tensor([65], dtype=torch.int32)},
        "'key_cache' must have 65 slots or more for 65 tokens, got 64",
    ),
    "a ring too small": (
        {"seqlens_k": torch.tensor([100], dtype=torch.int32), "window": 61},
        "'key_cache' must have 65 slots or more for 100 tokens, got 64",
    ),
    "an odd ring": (
        {
            "key_cache": torch.ones(1, 2, 65, 16, dtype=BF16),
            "value_cache": torch.ones(1, 2, 65, 16, dtype=BF16),
            "seqlens_k": torch.tensor([66], dtype=torch.int32),
            "window": 8,
        },
        "'key_cache' must have a multiple of 64 slots as a ring buffer, got 65",
    ),
    "a negative window": ({"window": -1}, "'window' must be 0 (no window) or more, got -1"),
}


@pytest.mark.parametrize(("changed", "sentence"), WRONG.values(), ids=WRONG)
def test_errors_say_what_is_wrong(changed: dict[str, Any], sentence: str) -> None:
    arguments = {
        "query": torch.ones(5, 4, 16, dtype=BF16),
        "key_cache": torch.ones(1, 2, 64, 16, dtype=BF16),
        "value_cache": torch.ones(1, 2, 64, 16, dtype=BF16),
        "cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32),
        "seqlens_k": torch.tensor([8], dtype=torch.int32),
        "max_seqlen_q": 5,
        "window": 0,
    } | changed
    call: Callable[..., Tensor] = attention
    with pytest.raises(ArcmergeError, match=re.escape(sentence)):
        call(**arguments, scale=0.3, softcap=50.0)


def test_no_tile_of_keys_runs_past_the_end_of_a_ring(draw: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [tile for table in kernels.TILES.values() for tile in table.values()]
    assert kernels.RING_SLOTS.value == RING_SLOTS
    assert all(RING_SLOTS % tile.block_n == 0 for tile in (*rows, kernels.FLOAT32))
    monkeypatch.setattr(kernels, "_tile", lambda *_: kernels.Tile(64, 128, 4, 2))
    query, keys = draw.normal(20, 4, 32), draw.normal(1, 2, 192, 32)
    given = whole(20, 300).values()
    with pytest.raises(Exception, match="must not run past the end of a ring buffer"):
        kernels.attention(
            torch.empty_like(query),
            query,
            keys,
            keys,
            *list(given)[:2],
            max_seqlen_q=20,
            scale=0.2,
            softcap=0.0,
            window=8,
        )
