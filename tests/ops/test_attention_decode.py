"""attention_decode: the reference against transformers, the kernel against the truth and against itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

from arcmerge.errors import ArcmergeError
from arcmerge.kernels import attention_decode as kernels
from arcmerge.kernels.attention_decode import scratch
from arcmerge.ops.attention_decode import attention_decode
from cases import attention_decode as cases
from cases.case import Case, Random, disagreement
from eager import by_transformers

BF16, F32 = torch.bfloat16, torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def draw() -> Random:
    return Random(40, DEVICE)


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCMERGE_BACKEND", request.param)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(("softcap", "window"), [(50.0, 0), (50.0, 8), (0.0, 5)])
def test_stepwise_has_the_bits_of_transformers(softcap: float, window: int, dtype: torch.dtype, draw: Random) -> None:
    heads, head_dim, length = 4, 32, 12
    qkv, table = draw.normal(1, 8 * head_dim, dtype=dtype), draw.normal(length, head_dim, dtype=dtype)
    key_cache, value_cache = draw.normal(2, 1, 2, 16, head_dim, dtype=dtype)
    states = qkv.view(1, 8, 1, head_dim)
    cosine, sine = (half.repeat(1, 2)[None] for half in table[-1:].chunk(2, dim=1))
    query, key = apply_rotary_pos_emb(states[:, :4], states[:, 4:6], cosine, sine)
    keys = torch.cat([key_cache[0, :, : length - 1], key[0]], dim=1)
    values = torch.cat([value_cache[0, :, : length - 1], states[0, 6:]], dim=1)
    due = by_transformers(query[0].transpose(0, 1), keys, values, 0.7, softcap, window, dtype)
    actual = attention_decode(
        qkv,
        key_cache,
        value_cache,
        integers(length),
        heads=heads,
        cos_sin=table,
        scale=0.7,
        softcap=softcap,
        window=window,
        stepwise=True,
    )
    assert torch.equal(actual, due.flatten(1))
    assert torch.equal(key_cache[0, :, :length], keys)
    assert torch.equal(value_cache[0, :, :length], values)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_both_are_within_what_rounding_allows(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "reference":
        monkeypatch.setattr(cases, "attention_decode", _reference_as_launcher)
    call = case.build(Random(41, DEVICE))
    call.launch()
    for name, expected in call.expected().items():
        assert disagreement(call.outputs[name], expected) <= 1, name


def _reference_as_launcher(
    out: Tensor, partial: Tensor, statistics: Tensor, counters: Tensor, *tensors: Tensor, **numbers: Any
) -> None:
    *others, cos_sin = tensors
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ARCMERGE_BACKEND", "reference")
        out.copy_(attention_decode(*others, cos_sin=cos_sin, **numbers))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("slots", [4096, 4160, 8192])
def test_window_of_4096_is_exact(slots: int) -> None:
    # One loud key: still visible when 4096 tokens are there and forgotten when 4097 are.
    for length, seen in ((4095, True), (4096, True), (4097, False)):
        qkv = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=BF16, device=DEVICE).repeat_interleave(16)[None]
        table = torch.tensor([1.0, 0.0], device=DEVICE).repeat_interleave(8).repeat(length, 1)
        key_cache, value_cache = torch.zeros(2, 1, 1, slots, 16, dtype=BF16, device=DEVICE)
        key_cache[:, :, 0], value_cache[:, :, 0] = 2.0, 1.0
        out = attention_decode(
            qkv,
            key_cache,
            value_cache,
            integers(length),
            heads=2,
            cos_sin=table,
            scale=1.0,
            softcap=50.0,
            window=4096,
        )
        assert (out > 0.9).all() if seen else (out == 0).all()


def test_a_row_does_not_depend_on_the_others(draw: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    qkv, table = draw.normal(3, 8 * 16), draw.normal(300, 16, dtype=F32)
    caches = draw.normal(2, 3, 2, 300, 16)

    def step(rows: slice, *lengths: int) -> Tensor:
        key, value = (cache[rows].clone() for cache in caches)
        return attention_decode(
            qkv[rows], key, value, integers(*lengths), heads=4, cos_sin=table, scale=0.3, softcap=50.0
        )

    assert torch.equal(step(slice(None), 300, 0, 200)[2:], step(slice(2, 3), 200))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_sequence_may_start_in_any_slot(draw: Random, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Every backend has the result, and the cache, of the sequence from slot 0 on."""
    qkv, table = draw.normal(4, 8 * 16, dtype=dtype), draw.normal(300, 16, dtype=F32)
    caches, first, lengths = draw.normal(2, 4, 2, 300, 16, dtype=dtype), (0, 299, 17, 150), integers(300, 7, 0, 200)
    for backend in ("reference", "triton", *(["native"] if DEVICE == "cpu" else [])):
        monkeypatch.setenv("ARCMERGE_BACKEND", backend)
        aligned = [states.clone() for states in caches]
        moved = [
            torch.stack([each.roll(start, dims=1) for each, start in zip(states, first, strict=True)])
            for states in caches
        ]
        options = dict(heads=4, cos_sin=table, scale=0.3, softcap=50.0)
        expected = attention_decode(qkv, *aligned, lengths, **options)
        found = attention_decode(qkv, *moved, lengths, first_slots=integers(*first), **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 if dtype == BF16 else 1e-5)
        for states, others in zip(moved, aligned, strict=True):
            back = [each.roll(-start, dims=1) for each, start in zip(states, first, strict=True)]
            assert torch.equal(torch.stack(back), others), backend


def test_counters_of_a_cache_are_kept_and_zero_again(draw: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    key, value = draw.normal(2, 3, 2, 300, 16)
    counters = scratch(key, 4)[2]
    for lengths in ((300, 0, 200), (1, 2, 3)):
        attention_decode(draw.normal(3, 8 * 16), key, value, integers(*lengths), heads=4, scale=0.3)
        assert not counters.any()
    # A CUDA graph of the launch finds them where they were.
    assert scratch(key, 4)[2] is counters
    assert scratch(value, 4)[2] is not counters


def test_an_interrupted_launch_does_not_spoil_the_next(draw: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    qkv, caches = draw.normal(3, 8 * 16), draw.normal(2, 3, 2, 300, 16)

    key, value = caches

    def step() -> Tensor:
        return attention_decode(qkv, key, value, integers(300, 0, 200), heads=4, scale=0.3)

    expected, counters = step(), scratch(key, 4)[2]
    counters.fill_(1)  # as if one of the splits had ended
    assert torch.equal(step(), expected)
    assert not counters.any()


class Launch:
    """Replaces a kernel: keeps its grid and the constants for which it would be compiled."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **constants: self.launches.append((grid, constants))


def test_a_cache_that_grows_compiles_no_other_kernel(draw: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Launch()
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    monkeypatch.setattr(kernels, "_attention_decode_kernel", kernel)
    for slots in (16, 128, 256, 1040, 4096):
        key, value = draw.normal(2, 1, 2, slots, 16)
        attention_decode(draw.normal(1, 8 * 16), key, value, integers(9), heads=4, scale=0.3)
    assert [grid for grid, _ in kernel.launches] == [(splits, 2, 1) for splits in (1, 1, 2, 9, 32)]
    assert all(constants == kernel.launches[0][1] for _, constants in kernel.launches)


@pytest.mark.usefixtures("backend")
def test_without_cos_sin_nothing_is_rotated(draw: Random) -> None:
    qkv, table = draw.normal(2, 8 * 16), torch.tensor([1.0, 0.0], device=DEVICE).repeat_interleave(8).repeat(9, 1)
    caches = draw.normal(2, 2, 2, 9, 16)
    found, expected = (
        attention_decode(qkv, *caches.clone(), integers(9, 4), heads=4, scale=0.3, cos_sin=each)
        for each in (None, table)
    )
    assert torch.equal(found, expected)


def test_op_is_registered_as_torch_wants(draw: Random) -> None:
    table = draw.normal(8, 16, dtype=F32)
    key, value = draw.normal(2, 2, 2, 8, 16)
    arguments = (draw.normal(2, 8 * 16), key, value, integers(8, 0))
    named = {"heads": 4, "cos_sin": table, "scale": 0.3, "softcap": 50.0, "window": 4}
    torch.library.opcheck(torch.ops.arcmerge.attention_decode.default, arguments, named)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another width": (
        {"qkv": torch.ones(1, 7 * 16)},
        "'qkv' must have the shape [B, (H+2Hkv)*Dh] = [1, 128], got [1, 112]",
    ),
    "strides": ({"qkv": torch.ones(1, 256)[:, ::2]}, "'qkv' must be contiguous, got the strides"),
    "heads that do not share": ({"heads": 3}, "'heads' must be a multiple of the 2 key-value heads, got 3"),
    "another table": (
        {"cos_sin": torch.ones(9, 16, dtype=BF16)},
        "'cos_sin' must have the dtype of 'qkv', float32, got bfloat16",
    ),
    "a narrow table": (
        {"cos_sin": torch.ones(9, 8)},
        "'cos_sin' must have the shape [P, Dh] = [*, 16], got [9, 8]",
    ),
    "a short table": ({"seqlens_k": integers(10)}, "'seqlens_k' must be 0 to the 9 rows of 'cos_sin', got [10]"),
    "a negative length": ({"seqlens_k": integers(-1)}, "'seqlens_k' must be 0 to the 9 rows of 'cos_sin', got [-1]"),
    "long lengths": ({"seqlens_k": torch.tensor([8])}, "'seqlens_k' must be int32, got int64"),
    "a short cache": (
        {"cos_sin": None, "seqlens_k": integers(9)},
        "'seqlens_k' must be 0 to the 8 slots of 'key_cache', got [9]",
    ),
    "a full cache": ({"seqlens_k": integers(9)}, "'key_cache' must have 9 slots or more for 9 tokens, got 8"),
    "a negative softcap": ({"softcap": -1.0}, "'softcap' must be 0 (no cap) or more, got -1.0"),
}


@pytest.mark.parametrize(("changed", "sentence"), WRONG.values(), ids=WRONG)
def test_errors_say_what_is_wrong(changed: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {
        "qkv": torch.ones(1, 8 * 16),
        "cos_sin": torch.ones(9, 16),
        "seqlens_k": integers(8),
        "key_cache": torch.ones(1, 2, 8, 16),
        "value_cache": torch.ones(1, 2, 8, 16),
        "heads": 4,
        "softcap": 50.0,
    } | changed
    with pytest.raises(ArcmergeError, match=re.escape(sentence)):
        attention_decode(**arguments, scale=0.3)
