"""Native attention, attention_decode and rope_cache: the cases of the kernels, and cases for their own blocks.

Results are within the error of rounding for every variant, and do not depend on threads or other queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.registry import backends
from arcmerge.ops import attention, attention_decode, rope_cache
from cases import attention as prefill
from cases import attention_decode as decode
from cases import rope_cache as rope
from cases.case import Call, Random, disagreement
from operands import BF16, F32, at_offset, every_variant, same_bits, using

dtypes = pytest.mark.parametrize("dtype", [BF16, F32], ids=str)


@pytest.fixture(autouse=True)
def native_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARCMERGE_BACKEND", raising=False)
    served = backends("cpu")
    assert all(served[name].startswith("native") for name in ("attention", "attention_decode", "rope_cache"))
    monkeypatch.setattr(prefill, "attention", lambda out, *of, **how: out.copy_(attention(*of, **how)))
    monkeypatch.setattr(decode, "attention_decode", _decode_as_launcher)
    monkeypatch.setattr(rope, "rope_cache", lambda out, *of: out.copy_(rope_cache(*of)))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and resets it after the test."""
    before = _C.threads()
    yield _C.set_threads
    _C.set_threads(before)


def _decode_as_launcher(
    out: Tensor, partial: Tensor, statistics: Tensor, counters: Tensor, *tensors: Tensor, **numbers: Any
) -> None:
    *others, cos_sin = tensors
    out.copy_(attention_decode(*others, cos_sin=cos_sin, **numbers))


def agrees(call: Call) -> None:
    call.launch()
    for name, expected in call.expected().items():
        assert disagreement(call.outputs[name], expected) <= 1, name


KERNELS = [*prefill.SMALL, *decode.SMALL, *rope.SMALL]

# Blocks have 96 columns (48 queries of 2 heads) and 128 keys, and a ring may end inside; splits have 512 keys.
BLOCKS = {
    "round blocks of keys": partial(
        prefill.build, sequences=((1, 127), (2, 128), (1, 129), (3, 257)), heads=(2, 1), head_dim=64, loud=5.0
    ),
    "round blocks of queries": partial(
        prefill.build, sequences=((47, 47), (48, 90), (49, 49), (97, 300)), heads=(4, 2), head_dim=16, loud=30.0
    ),
    "a window over blocks": partial(
        prefill.build, sequences=((150, 500), (3, 200)), heads=(2, 1), head_dim=32, window=131, loud=10.0
    ),
    "a ring cut within a block": partial(
        prefill.build, sequences=((60, 500), (5, 191)), heads=(2, 1), head_dim=32, window=101, slots=192, loud=10.0
    ),
    "a ring shorter than a block": partial(
        prefill.build, sequences=((9, 200), (1, 64)), heads=(4, 1), head_dim=32, window=40, slots=64, loud=10.0
    ),
    "f32, 100 heads a group": partial(
        prefill.build, sequences=((3, 140),), heads=(100, 1), head_dim=16, dtype=F32, loud=10.0
    ),
    "f32, odd window and start": partial(
        prefill.build, sequences=((5, 150), (40, 300)), heads=(2, 1), head_dim=64, dtype=F32, window=23, loud=10.0
    ),
    "round splits": partial(decode.build, lengths=(511, 512, 513, 1025, 0, 1), heads=(2, 1), head_dim=64, loud=5.0),
    "an odd ring over splits": partial(
        decode.build, lengths=(700, 1500), heads=(4, 2), head_dim=32, slots=611, window=600, loud=5.0
    ),
    "f32, splits, 5 heads a group": partial(
        decode.build, lengths=(1100, 30), heads=(5, 1), head_dim=32, dtypes=(F32, F32), loud=3.0
    ),
    "bf16 heads of 16 over splits": partial(
        decode.build, lengths=(900, 77), heads=(4, 2), head_dim=16, softcap=0.0, positive=True
    ),
}


@every_variant
@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_kernels_cases(variant: str, case: Any) -> None:
    with using(variant):
        agrees(case.build(Random(41)))


@every_variant
@pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS)
def test_blocks(variant: str, build: Callable[[Random], Call]) -> None:
    with using(variant):
        agrees(build(Random(43)))


@every_variant
@pytest.mark.parametrize("build", [BLOCKS["round blocks of queries"], BLOCKS["an odd ring over splits"]])
def test_results_do_not_depend_on_the_number_of_threads(
    variant: str, build: Callable[[Random], Call], threads: Callable[[int], None]
) -> None:
    found = []
    for number in (1, 2, 5):
        threads(number)
        with using(variant):
            call = build(Random(43))
            call.launch()
        found.append(call.outputs["out"])
    assert same_bits(found[1], found[0])
    assert same_bits(found[2], found[0])


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@every_variant
@dtypes
@pytest.mark.parametrize("window", [0, 37])
def test_a_query_does_not_depend_on_other_queries(variant: str, dtype: torch.dtype, window: int) -> None:
    draw = Random(44)
    query = draw.normal(300, 4, 32, dtype=dtype, scale=5.0)
    key, value = draw.normal(2, 2, 2, 320, 32, dtype=dtype)
    limits = dict(scale=0.2, softcap=50.0, window=window)
    with using(variant):
        whole = attention(query, key, value, integers(0, 300, 300), integers(300, 9), max_seqlen_q=300, **limits)
        for count, length in ((1, 300), (1, 129), (50, 261), (101, 300), (7, 7)):
            rows = query[length - count : length]
            alone = attention(
                rows, key[:1], value[:1], integers(0, count), integers(length), max_seqlen_q=count, **limits
            )
            assert same_bits(alone, whole[length - count : length])


@every_variant
@dtypes
def test_a_new_token_does_not_depend_on_other_tokens(variant: str, dtype: torch.dtype) -> None:
    draw = Random(45)
    qkv, table = draw.normal(3, 8 * 32, dtype=dtype), draw.normal(700, 32, dtype=F32)
    key, value = draw.normal(2, 3, 2, 700, 32, dtype=dtype)

    def answer(rows: slice, *lengths: int) -> Tensor:
        caches = key[rows].clone(), value[rows].clone()
        return attention_decode(qkv[rows], *caches, integers(*lengths), heads=4, cos_sin=table, scale=0.2, softcap=50.0)

    with using(variant):
        together = answer(slice(3), 700, 0, 513)
        assert same_bits(answer(slice(2, 3), 513), together[2:])
        assert not together[1].any()


@every_variant
@pytest.mark.parametrize("window", [2**31, 2**32, 2**32 + 3, 2**62])
def test_a_window_of_any_size_contains_all_keys_before_the_query(variant: str, window: int) -> None:
    draw = Random(46)
    query, table = draw.normal(20, 4, 32), draw.normal(300, 32)
    key, value = draw.normal(2, 1, 2, 300, 32)

    def answers(window: int) -> list[Tensor]:
        limits = dict(scale=0.2, softcap=50.0, window=window)
        prefilled = attention(query, key, value, integers(0, 20), integers(300), max_seqlen_q=20, **limits)
        caches = key.clone(), value.clone()
        return [
            prefilled,
            attention_decode(query[:2].view(1, -1), *caches, integers(300), heads=4, cos_sin=table, **limits),
        ]

    with using(variant):
        for limited, all_of_them in zip(answers(window), answers(0), strict=True):
            assert same_bits(limited, all_of_them)


@every_variant
def test_a_nan_query_gives_nan(variant: str) -> None:
    draw = Random(46)
    query, key, value = draw.normal(5, 2, 16), draw.normal(1, 1, 64, 16), draw.normal(1, 1, 64, 16)
    query[2, 1] = float("nan")
    with using(variant):
        out = attention(query, key, value, integers(0, 5), integers(40), max_seqlen_q=5, scale=0.2, softcap=50.0)
    assert out.isnan().all(2).nonzero().tolist() == [[2, 1]]
    assert out.isnan().sum() == 16


@dtypes
def test_the_reference_serves_stepwise(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    draw = Random(47)
    query, key, value = (draw.normal(*shape, dtype=dtype) for shape in ((9, 2, 16), (1, 1, 64, 16), (1, 1, 64, 16)))
    qkv, table = draw.normal(1, 4 * 16, dtype=dtype), draw.normal(64, 16, dtype=dtype)
    found = []
    for backend in ("reference", "native"):
        monkeypatch.setenv("ARCMERGE_BACKEND", backend)
        limits: dict[str, Any] = dict(scale=0.2, softcap=50.0, stepwise=True)
        found.append(attention(query, key, value, integers(0, 9), integers(40), max_seqlen_q=9, **limits))
        caches = key.clone(), value.clone()
        found.append(attention_decode(qkv, *caches, integers(41), heads=2, cos_sin=table, **limits))
    assert same_bits(found[2], found[0])
    assert same_bits(found[3], found[1])


@every_variant
@dtypes
def test_caches_at_any_address(variant: str, dtype: torch.dtype) -> None:
    draw = Random(48)
    query, key, value = draw.normal(20, 2, 16, dtype=dtype), *draw.normal(2, 1, 1, 40, 16, dtype=dtype)
    out = torch.full_like(query, float("nan"))
    starts, lengths = integers(0, 20), integers(40)
    with using(variant):
        expected = attention(query, key, value, starts, lengths, max_seqlen_q=20, scale=0.2, softcap=50.0)
        moved = [at_offset(tensor.flatten(), 3) for tensor in (query, key, value)]
        at = [buffer.data_ptr() + 3 for buffer in moved]
        cache = _C.KvCache(at[1], at[2], 1, 1, 40, 16, 0 if dtype == BF16 else 2)
        _C.attention(out.data_ptr(), at[0], 2, cache, starts.data_ptr(), lengths.data_ptr(), 0.2, 50.0, 0)
    assert same_bits(out, expected)


def test_wrong_arguments_are_refused() -> None:
    cache = _C.KvCache(0, 0, 1, 2, 64, 16, 0)
    with pytest.raises(ValueError, match=r"^'heads' must be a multiple of the cache's 2, got 3$"):
        _C.attention(0, 0, 3, cache, 0, 0, 1.0, 0.0, 0)
    with pytest.raises(ValueError, match=r"^'cache' must have heads, slots and an even head_dim, got 1, 0 and"):
        _C.attention_decode(0, 0, 1, 0, 0, 0, _C.KvCache(0, 0, 1, 1, 0, 16, 0), 1.0, 0.0, 0)
    with pytest.raises(ValueError, match=r"^'dtype' must be 0 \(bf16\) or 2 \(f32\), got 1$"):
        _C.KvCache(0, 0, 1, 1, 8, 16, 1)
