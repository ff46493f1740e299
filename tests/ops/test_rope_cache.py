"""rope_cache: the reference against transformers and complex numbers, the kernel against the reference, bit for bit."""

import pytest
import torch
from transformers import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding, apply_rotary_pos_emb

from arcmerge.errors import ArcmergeError
from arcmerge.ops.rope_cache import rope_cache, rope_table, rotated
from operands import BF16, F32, normal, same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", ["reference", "triton"])
LENGTH, HEAD_DIM, THETA = 40, 16, 10000.0


def operands(positions, sequences, dtype=BF16, table_dtype=F32, heads=(4, 2), slots=8):
    """The arguments of the op; query, key and value are views of one tensor, the caches are full of NaN."""
    all_heads = heads[0] + 2 * heads[1]
    rows = normal(len(positions), all_heads * HEAD_DIM, dtype=dtype).to(DEVICE)
    query, key, value = rows.unflatten(1, (all_heads, HEAD_DIM)).split([heads[0], heads[1], heads[1]], dim=1)
    table = rope_table(LENGTH, HEAD_DIM, THETA, table_dtype, DEVICE)
    indices = [torch.tensor(numbers, device=DEVICE) for numbers in (positions, sequences)]
    caches = [torch.full((3, heads[1], slots, HEAD_DIM), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    return [query, key, value, table, *indices, *caches]


def transformers_angles(length, head_dim, dtype):
    config = Gemma2Config(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": THETA})
    return Gemma2RotaryEmbedding(config)(torch.empty(0, dtype=dtype), torch.arange(length)[None])


def test_reference_has_the_bits_of_transformers():
    query, key, _, table, *_ = operands(range(12), [0] * 12, BF16, BF16)
    cosine, sine = transformers_angles(12, HEAD_DIM, BF16)
    expected = apply_rotary_pos_emb(query.cpu()[None], key.cpu()[None], cosine, sine, unsqueeze_dim=2)
    for states, right in zip((query, key), expected, strict=True):
        assert same_bits(rotated(states, table[:12]).cpu(), right[0])


def test_definition_is_a_rotation_in_the_complex_plane():
    states = normal(LENGTH, 3, HEAD_DIM).double()
    table = rope_table(LENGTH, HEAD_DIM, THETA, torch.float64, "cpu")
    pairs = torch.complex(*states.chunk(2, dim=-1))
    frequencies = torch.tensor([THETA ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)], dtype=torch.float64)
    turns = torch.polar(
        torch.ones(LENGTH, 1, HEAD_DIM // 2).double(), torch.arange(LENGTH)[:, None, None] * frequencies
    )
    turned = pairs * turns
    # Angles of the table are float32 products, up to 39: each within three roundings of 2^-24 of itself.
    torch.testing.assert_close(
        rotated(states, table), torch.cat([turned.real, turned.imag], -1), rtol=0, atol=39 * 3 * 2.0**-24 * 8
    )


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_table_has_the_bits_of_transformers(head_dim, dtype):
    cosine, sine = transformers_angles(8192, head_dim, dtype)
    half = head_dim // 2
    expected = torch.cat([cosine[0, :, :half], sine[0, :, :half]], dim=1)
    assert same_bits(rope_table(8192, head_dim, THETA, dtype, "cpu"), expected)


@backends
@pytest.mark.parametrize(("dtype", "table_dtype"), [(BF16, F32), (BF16, BF16), (F32, F32)], ids=str)
def test_op_writes_the_ring_and_nothing_else(monkeypatch, backend, dtype, table_dtype):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    positions, sequences = [0, 39, 7, 8, 9, 15], [0, 1, 2, 2, 2, 0]
    query, key, value, table, _, _, *caches = arguments = operands(positions, sequences, dtype, table_dtype)
    out = rope_cache(*arguments)
    assert out.is_contiguous()
    assert same_bits(out, rotated(query, table[positions]))
    right_key = rotated(key, table[positions])
    for cache, states in zip(caches, (right_key, value), strict=True):
        expected = torch.full_like(cache, float("nan"))
        for row, (position, sequence) in enumerate(zip(positions, sequences, strict=True)):
            expected[sequence, :, position % 8] = states[row]
        assert same_bits(cache, expected)


@backends
def test_padding_is_zero_and_leaves_no_trace(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    positions, sequences = [-1, 3, -7], [0, 1, 2]
    query, key, value, *_, key_cache, value_cache = arguments = operands(positions, sequences)
    for states in (query, key, value):
        states[0] = float("nan")
    out = rope_cache(*arguments)
    assert (out[[0, 2]] == 0).all()
    assert (out[1] != 0).any()
    for cache in (key_cache, value_cache):
        assert cache.isfinite().sum() == 2 * HEAD_DIM
        assert cache[1, :, 3].isfinite().all()


@backends
def test_op_serves_no_tokens(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    arguments = operands([5], [0])
    arguments[:3] = [states[:0] for states in arguments[:3]]
    arguments[4:6] = [indices[:0] for indices in arguments[4:6]]
    assert rope_cache(*arguments).shape == (0, 4, HEAD_DIM)


def test_registration(monkeypatch):
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    arguments = [tensor.cpu() for tensor in operands([3, 4, -1], [1, 2, 0])]
    # opcheck compares with ==, to which NaN is not equal.
    arguments[6:] = [cache.zero_() for cache in arguments[6:]]
    torch.library.opcheck(torch.ops.arcmerge.rope_cache.default, tuple(arguments))


@pytest.mark.parametrize(
    ("number", "change", "sentence"),
    [
        (0, lambda x: x.half(), "'query' must be bfloat16 or float32, got float16"),
        (1, lambda x: x.float(), "'key' must have the dtype of 'query', bfloat16, got float32"),
        (1, lambda x: x[:, :1], "'key' must have the shape [T, Hkv, Dh] = [2, 2, 16], got [2, 1, 16]"),
        (3, lambda x: x[:, :8], "'cos_sin' must have the shape [P, Dh] = [*, 16], got [40, 8]"),
        (0, lambda x: x[0], "'query' must have the shape [T, H, Dh] = [*, *, 16], got [4, 16]"),
        (
            0,
            lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            "'query' must have contiguous rows, got the strides (64, 1, 4)",
        ),
        (4, lambda x: x.int(), "'positions' must be int64, got int32"),
        (
            4,
            lambda x: x.to("meta"),
            f"'positions' must be on the device of 'query', {torch.empty(0, device=DEVICE).device}, got meta",
        ),
        (5, lambda x: x[:1], "'sequences' must have the shape [T] = [2], got [1]"),
        (6, lambda x: x.mT.contiguous().mT, "'key_cache' must be contiguous, got the strides (256, 128, 1, 8)"),
        (
            7,
            lambda x: x[:, :, :4],
            "'value_cache' must have the shape [B, Hkv, S, Dh] = [3, 2, 8, 16], got [3, 2, 4, 16]",
        ),
    ],
)
def test_wrong_calls_are_refused_in_a_sentence(number, change, sentence):
    arguments = operands([3, 4], [0, 1])
    arguments[number] = change(arguments[number])
    with pytest.raises(ArcmergeError) as caught:
        rope_cache(*arguments)
    assert str(caught.value) == sentence
