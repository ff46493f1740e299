"""The kernels of slerp: the table, the coefficients against those of the host, launches, traffic, and no wait."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import arcmerge
from arcmerge import ops
from arcmerge.dispatch.registry import OPS
from arcmerge.geometry import NEARLY_PARALLEL, NEARLY_ZERO, slerp_coefficients
from arcmerge.kernels import segments
from arcmerge.kernels import slerp as kernels
from emulation.traffic import Traffic

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="looks inside the interpreter")
OP = OPS["slerp"].implementations["triton"]
PAIRS = 288  # as many as Gemma-2 2.6B has tensors


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64, device=DEVICE)


def position(*t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64, device=DEVICE)


def random(count: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


# ---- coefficients


def coefficients(grams: np.ndarray, t: np.ndarray, *, normalize: bool, segments: int = 1) -> np.ndarray:
    """What the kernel computes from Gram matrices (n, 2, 2) of so many segments each, not yet rounded to float32."""
    count = len(grams) // segments
    out = torch.empty(count, 2, dtype=torch.float64, device=DEVICE)
    runs = torch.tensor([[index * segments, (index + 1) * segments, index] for index in range(count)], device=DEVICE)
    kernels._coefficients_kernel[(count,)](
        out,
        runs,
        torch.from_numpy(grams).reshape(-1, 4).to(DEVICE),
        torch.from_numpy(t).to(DEVICE),
        NORMALIZE=normalize,
        NEARLY_PARALLEL=NEARLY_PARALLEL,
        NEARLY_ZERO=NEARLY_ZERO,
        T_STRIDE=1,
        RUN_STRIDE=3,
        ROWS=512,
        enable_fp_fusion=False,
    )
    return out.numpy(force=True)


def on_the_host(grams: np.ndarray, t: np.ndarray, *, normalize: bool) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.stack([slerp_coefficients(gram, one, normalize)[0] for gram, one in zip(grams, t, strict=True)])


def grams_of(cosines: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    a, b = lengths.T
    return np.stack([a * a, cosines * a * b, cosines * a * b, b * b], axis=-1).reshape(-1, 2, 2)


@pytest.mark.parametrize("normalize", [False, True])
def test_coefficients_are_within_the_stated_bound_of_those_of_the_host(normalize: bool) -> None:
    random = np.random.default_rng(5)
    near = NEARLY_PARALLEL - random.uniform(0, 1e-3, 40)
    cosines = np.concatenate([random.uniform(-NEARLY_PARALLEL, NEARLY_PARALLEL, 120), near, -near, [0.0]])
    lengths = 10.0 ** random.uniform(-7, 7, (len(cosines), 2))
    t = random.choice([0.1, 0.3, 0.5, -0.5, 1.5, 17.25, -1e5, 3e9], len(cosines))
    grams = grams_of(cosines, lengths)
    error = np.abs(coefficients(grams, t, normalize=normalize) - on_the_host(grams, t, normalize=normalize))
    bound = 2.0**-49 * (1 + np.abs(t)) / (1 - cosines**2)
    if normalize:
        bound = bound * (1 + np.abs(t)) * lengths.max(axis=1)
    assert (error <= bound[:, None] / (lengths if normalize else 1)).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_coefficients_without_an_arc_are_those_of_the_host(normalize: bool) -> None:
    cosines = np.array([1.0, -1.0, 1 + 1e-15, -1 - 1e-15, 0.99951, -0.99951, np.nextafter(0.9995, 1), 0.3, 0.0])
    lengths = np.full((len(cosines), 2), 3.0)
    lengths[-2], lengths[-1] = (1e-9, 2.0), (0.0, 0.0)
    grams, t = grams_of(cosines, lengths), np.full(len(cosines), 0.3)
    found, expected = (each(grams, t, normalize=normalize) for each in (coefficients, on_the_host))
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    if not normalize:  # mergekit's weights to the bit
        straight = [float(np.float32(1) - np.float32(0.3)), float(np.float32(0.3))]
        assert found[:7].tolist() == [straight] * 7


def test_coefficients_of_more_segments_than_a_step_of_the_sums() -> None:
    random, t = np.random.default_rng(6), np.array([0.3, 0.6])
    parts = random.integers(1, 9, (2, 1030, 2, 2)).astype(float)
    parts[..., 1, 0] = parts[..., 0, 1]
    found = coefficients(parts.reshape(-1, 2, 2), t, normalize=False, segments=1030)
    np.testing.assert_allclose(found, on_the_host(parts.sum(axis=1), t, normalize=False), rtol=1e-13)


def test_an_end_is_a_copy_and_a_gram_that_is_not_finite_has_no_angle() -> None:
    grams = grams_of(np.array([0.5] * 4), np.ones((4, 2)))
    grams[1:3, 1, 1] = np.inf
    grams[3, 0, 1] = grams[3, 1, 0] = np.nan
    found = coefficients(grams, np.array([1.0, 0.0, 0.5, 0.5]), normalize=True)
    assert found[:2].tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert np.isnan(found[2:]).all()


@pytest.mark.parametrize("t", [1e17, 1e300, -1e300])
def test_a_sine_far_away_is_a_sine(t: float) -> None:
    found = coefficients(grams_of(np.array([0.5]), np.ones((1, 2))), np.array([t]), normalize=False)
    assert (np.abs(found) <= 1 / np.sqrt(0.75) + 1e-15).all()


# ---- the table


def test_the_table_made_on_the_gpu_is_that_of_the_host() -> None:
    counts = (3 * segments.SEGMENT + 5, 0, 1, segments.SEGMENT, 0, 7)
    mixes = ((BF16, BF16), (BF16, F32), (BF16, BF16), (BF16, BF16), (BF16, BF16), (BF16, F32))
    groups = [
        (random(count, one), random(count, other), random(count, other))
        for count, (one, other) in zip(counts, mixes, strict=True)
    ]
    for host, made in zip(segments.launches(groups), segments.tabulated(groups, groups[2][2]), strict=True):
        assert (made.dtypes, made.runs.tolist()) == (host.dtypes, host.runs.tolist())
        assert made.table.tolist() == host.table.tolist()


def test_a_table_of_more_rows_than_a_program_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 16)
    groups = [(random(16 * count),) for count in (700, 1, 2000, 3, *[1] * 300)]
    (host,), (made,) = segments.launches(groups), segments.tabulated(groups, groups[0][0])
    assert torch.equal(made.table, host.table)


# ---- the op


def model(counts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    return [random(count, seed=2 * count) for count in counts], [random(count, seed=2 * count + 1) for count in counts]


def test_t_is_read_by_the_launch() -> None:
    a, b = model([100, 7])
    t = position(0.0, 1.0)
    assert torch.equal(OP(a, b, t, normalize=False)[1], b[1])
    t.copy_(position(1.0, 0.0))
    assert torch.equal(OP(a, b, t, normalize=False)[1], a[1])


def test_an_end_keeps_the_sign_of_zero_and_what_is_not_finite() -> None:
    a = torch.tensor([-0.0, 0.0, 1.0, -float("inf"), float("nan"), -(2.0**-133)], dtype=BF16, device=DEVICE)
    b = torch.tensor([2.0, -0.0, float("nan"), float("inf"), 1.0, 0.0], dtype=BF16, device=DEVICE)
    *outs, counts = OP([a, a], [b, b], position(0.0, 1.0), normalize=False)
    for out, end in zip(outs, (a, b), strict=True):
        assert torch.equal(out.isnan(), end.isnan())
        assert torch.equal(out.nan_to_num().view(torch.int16), end.nan_to_num().view(torch.int16))
    assert counts.tolist() == [2, 2]


def test_outputs_share_an_allocation_without_overlap() -> None:
    a, b = model([5, 0, 300, 1])
    *outs, _ = OP(a, b, position(0.5), normalize=False)
    assert len({out.untyped_storage().data_ptr() for out in outs}) == 1
    starts = [out.data_ptr() for out in outs if out.numel()]
    assert [(end - start) % 256 for start, end in itertools.pairwise(starts)] == [0, 0]
    assert starts == sorted(starts)
    assert starts[2] - starts[1] >= outs[2].nbytes


@contextmanager
def without_waiting() -> Iterator[list[str]]:
    """Yields the names of the kernels that are launched, which do not run; whatever reads a tensor's values fails."""
    launched: list[str] = []

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the host waits")

    def launch(kernel: object, grid: object) -> object:
        return lambda *_, **__: launched.append(kernel.fn.__name__)  # type: ignore[attr-defined]

    readers = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
    with (
        patch.multiple(Tensor, **dict.fromkeys(readers, refused)),
        patch.object(type(kernels._coefficients_kernel), "__getitem__", launch),
    ):
        yield launched


@interpreted
@pytest.mark.parametrize("t", ["a number", "numbers", "a tensor"])
def test_a_model_takes_four_launches_and_no_wait(t: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    a, b = model([1 + index for index in range(PAIRS)])
    value = {"a number": 0.3, "numbers": [0.3] * PAIRS, "a tensor": position(0.3)}[t]
    with without_waiting() as launched:
        ops.slerp(a, b, value, normalize=True)
    assert launched == ["_table_kernel", "_segments_kernel", "_coefficients_kernel", "_combine_kernel"]


@interpreted
def test_what_reads_values_is_refused() -> None:
    with without_waiting(), pytest.raises(AssertionError, match="the host waits"):
        OPS["slerp"].implementations["reference"](*model([3]), position(0.3), normalize=False)


@interpreted
def test_traffic_is_ten_bytes_an_element() -> None:
    counts = [3 * segments.SEGMENT, 8000, 2048]
    a, b = model(counts)
    outs = [torch.empty_like(each) for each in a]
    with Traffic(*a, *b, *outs) as traffic:
        kernels.slerp(
            outs,
            list(zip(a, b, strict=True)),
            position(0.3),
            zeros(3),
            normalize=True,
            nearly_parallel=NEARLY_PARALLEL,
            nearly_zero=NEARLY_ZERO,
        )
    floor = 10 * sum(counts)
    assert floor <= traffic.loaded + traffic.stored <= 1.01 * floor
    assert (traffic.launches, traffic.atomics) == (4, 0)


# ---- state dicts


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of tensors on a GPU, for those on the CPU too."""
    monkeypatch.setattr("arcmerge.tensors_on_gpu.on_gpu", lambda tensor: True)
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")


def state_dicts() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    a = {f"layer {index}": random(40 * index, seed=index) for index in range(4)}
    a |= {"norm": random(7, F32), "half": random(20, F16), "scale": random(3), "positions": torch.arange(5)}
    b = {name: tensor.flip(0) for name, tensor in a.items()}
    return a, {**b, "norm": b["norm"].bfloat16(), "scale": a["scale"]}


T = {"layer 1": 0.0, "layer 2": 1.0, "layer 3": 0.6, "positions": 0.7}


@pytest.mark.parametrize("normalize", [False, True])
def test_state_dicts_are_merged_together_with_the_bits_of_one_by_one(
    normalize: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    a, b = state_dicts()
    expected = arcmerge.slerp(a, b, lambda name: T.get(name, 0.3), slerp_normalize=normalize)
    request.getfixturevalue("together")
    found = arcmerge.slerp(a, b, lambda name: T.get(name, 0.3), slerp_normalize=normalize)
    assert list(found) == list(a)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert found["layer 1"].data_ptr() != a["layer 1"].data_ptr()


def test_tensors_alone_take_the_same_way(together: None) -> None:
    a, b = random(50, seed=1), random(50, seed=2)
    assert torch.equal(arcmerge.slerp(a, b, 0.3), ops.slerp([a], [b], 0.3)[0])


@interpreted
def test_state_dicts_take_four_launches_and_no_wait(together: None) -> None:
    a, b = ({str(index): tensor for index, tensor in enumerate(side)} for side in model([1 + i for i in range(PAIRS)]))
    with without_waiting() as launched:
        arcmerge.slerp(a, b, lambda name: int(name) / (PAIRS - 1))
    assert len(launched) == 4


def test_a_merged_state_dict_can_be_saved(together: None, tmp_path: Path) -> None:
    merged = arcmerge.slerp(*state_dicts(), 0.3)
    save_file(merged, tmp_path / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in load_file(tmp_path / "model.safetensors").items())
