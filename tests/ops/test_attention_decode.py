"""attention_decode: the reference against transformers, the kernel against the truth and against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

from arcmerge.errors import ArcmergeError
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


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=DEVICE)


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
        table,
        integers(length),
        key_cache,
        value_cache,
        zeros(1, 2),
        heads,
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


def _reference_as_launcher(out: Tensor, partial: Tensor, statistics: Tensor, *arguments: Any) -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ARCMERGE_BACKEND", "reference")
        out.copy_(torch.ops.arcmerge.attention_decode(*arguments, False))


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
            qkv, table, integers(length), key_cache, value_cache, zeros(1, 1), 2, scale=1.0, softcap=50.0, window=4096
        )
        assert (out > 0.9).all() if seen else (out == 0).all()


def test_rows_do_not_depend_on_their_company(draw: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    qkv, table = draw.normal(3, 8 * 16), draw.normal(300, 16, dtype=F32)
    caches = draw.normal(2, 3, 2, 300, 16)
    counters = zeros(3, 2)

    def step(rows: slice, *lengths: int) -> Tensor:
        key, value = (cache[rows].clone() for cache in caches)
        return attention_decode(
            qkv[rows], table, integers(*lengths), key, value, counters[rows], 4, scale=0.3, softcap=50.0
        )

    assert torch.equal(step(slice(None), 300, 0, 200)[2:], step(slice(2, 3), 200))
    # The counters are as they were: a CUDA graph of the launch can run again.
    assert torch.equal(step(slice(None), 300, 0, 200)[2:], step(slice(2, 3), 200))


def test_op_is_registered_as_torch_wants(draw: Random) -> None:
    table = draw.normal(8, 16, dtype=F32)
    key, value = draw.normal(2, 2, 2, 8, 16)
    arguments = (draw.normal(2, 8 * 16), table, integers(8, 0), key, value, zeros(2, 2), 4, 0.3, 50.0, 4, False)
    torch.library.opcheck(torch.ops.arcmerge.attention_decode.default, arguments)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another width": ({"qkv": torch.ones(1, 7 * 16)}, r"'qkv' must have the shape \(1, 128\), got \(1, 112\)"),
    "strides": ({"qkv": torch.ones(1, 256)[:, ::2]}, "'qkv' must be contiguous, got the strides"),
    "heads that do not share": ({"heads": 3}, "heads of queries must be a multiple of the 2 heads of keys, got 3"),
    "another table": ({"table": torch.ones(9, 16, dtype=BF16)}, "'table' must have the dtype of 'qkv' torch.float32"),
    "a narrow table": ({"table": torch.ones(9, 8)}, r"'table' must have the shape \(9, 16\), got \(9, 8\)"),
    "a short table": ({"lengths": integers(10)}, r"'lengths' must be 0 to the 9 rows of 'table', got \[10\]"),
    "a negative length": ({"lengths": integers(-1)}, r"'lengths' must be 0 to the 9 rows of 'table', got \[-1\]"),
    "long lengths": ({"lengths": torch.tensor([8])}, "'lengths' must be int32, got torch.int64"),
    "few counters": ({"counters": zeros(1)}, r"'counters' must have the shape \(1, 2\), got \(1,\)"),
    "a full cache": ({"lengths": integers(9)}, "'key_cache' must have 9 slots or more for 9 tokens, got 8"),
    "a negative softcap": ({"softcap": -1.0}, "'softcap' and 'window' must be 0, for none, or more, got -1.0 and 0"),
}


@pytest.mark.parametrize(("changed", "sentence"), WRONG.values(), ids=WRONG)
def test_errors_say_what_is_wrong(changed: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {
        "qkv": torch.ones(1, 8 * 16),
        "table": torch.ones(9, 16),
        "lengths": integers(8),
        "key_cache": torch.ones(1, 2, 8, 16),
        "value_cache": torch.ones(1, 2, 8, 16),
        "counters": zeros(1, 2),
        "heads": 4,
        "softcap": 50.0,
    } | changed
    with pytest.raises(ArcmergeError, match=sentence):
        attention_decode(**arguments, scale=0.3)
