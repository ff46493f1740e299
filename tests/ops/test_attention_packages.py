"""attention by flash-attn and FlashInfer, by stand-ins of these packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attention_packages
from arcmerge import ops
from arcmerge.dispatch import backend
from arcmerge.dispatch.registry import OPS, backends
from arcmerge.errors import ArcmergeError
from arcmerge.kernels.attention import attention as launch
from cases.case import Random

PACKAGES = ("flash_attn", "flashinfer")
every_package = pytest.mark.parametrize("package", PACKAGES)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of both packages, which run on the CPU."""
    attention_packages.install(monkeypatch)
    against = backend._against_package
    anywhere = tuple(
        backend.Backend(each.name, lambda device, name=each.name: against(name)("cuda"), each.detail)  # type: ignore[misc]
        if each.name in PACKAGES
        else each
        for each in backend.BACKENDS
    )
    monkeypatch.setattr(backend, "BACKENDS", anywhere)


def arguments(
    sequences: list[tuple[int, int]], slots: int, head_dim: int = 64, heads: tuple[int, int] = (4, 2), **numbers: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    """Arguments of `attention` for sequences of (new tokens, tokens)."""
    draw = Random(40)
    new, lengths = zip(*sequences, strict=True)
    starts = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
    query = draw.normal(sum(new), heads[0], head_dim)
    caches = [draw.normal(len(sequences), heads[1], slots, head_dim) for _ in range(2)]
    tensors = [query, *caches, starts, torch.tensor(lengths, dtype=torch.int32)]
    return tensors, {"max_seqlen_q": max(new), "scale": 0.2, "softcap": 5.0, "window": 0, **numbers}


CASES = {
    "ragged": arguments([(33, 33), (0, 5), (1, 300), (31, 512)], 512),
    "a window": arguments([(40, 200), (3, 3)], 256, window=17),
    "a window of 1": arguments([(4, 9)], 256, window=1),
    "a ring": arguments([(9, 700), (1, 257), (5, 100)], 256, window=200),
    "no softcap, heads of 256": arguments([(3, 20)], 256, 256, (8, 4), softcap=0.0),
    "an empty sequence": arguments([(2, 2), (0, 0)], 256),
    "nothing": arguments([(0, 7)], 256),
}


def same(found: Tensor, due: Tensor) -> bool:
    return bool(((found.double() - due.double()).abs() <= 2.0**-7).all())


@every_package
@pytest.mark.parametrize("case", CASES)
def test_a_package_gets_arguments_that_mean_the_same(
    package: str, case: str, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, numbers = CASES[case]
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    due = ops.attention(*tensors, **numbers)
    monkeypatch.setenv("ARCMERGE_BACKEND_ATTENTION", package)
    assert same(ops.attention(*tensors, **numbers), due)
    others = {**numbers, "window": numbers["window"] + 1, "scale": 2 * numbers["scale"]}
    assert case in ("nothing", "an empty sequence") or not same(ops.attention(*tensors, **others), due)


def test_flashinfer_takes_any_count_of_slots(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, numbers = arguments([(5, 70), (70, 70)], 100)
    due = ops.attention(*tensors, **numbers)
    monkeypatch.setenv("ARCMERGE_BACKEND_ATTENTION", "flashinfer")
    assert same(ops.attention(*tensors, **numbers), due)


def _as_float32(tensors: list[Tensor], numbers: dict[str, Any]) -> None:
    tensors[:3] = [tensor.float() for tensor in tensors[:3]]


REFUSED: dict[str, tuple[str, Callable[[list[Tensor], dict[str, Any]], None], str]] = {
    "stepwise": ("flash_attn", lambda _, numbers: numbers.update(stepwise=True), "'stepwise' must be False with flash"),
    "float32": ("flash_attn", _as_float32, "'query' must be bfloat16, got float32"),
    "float32, FlashInfer": ("flashinfer", _as_float32, "'query' must be bfloat16, got float32"),
    "stepwise, FlashInfer": ("flashinfer", lambda _, numbers: numbers.update(stepwise=True), "'stepwise' must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_package_does_not_compute_is_an_error(
    case: str, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, change, message = REFUSED[case]
    tensors, numbers = arguments([(3, 5)], 256)
    change(tensors, numbers)
    monkeypatch.setenv("ARCMERGE_BACKEND_ATTENTION", package)
    with pytest.raises(ArcmergeError, match=message):
        ops.attention(*tensors, **numbers)


def test_shapes_that_a_package_does_not_take_are_errors(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCMERGE_BACKEND_ATTENTION", "flash_attn")
    tensors, numbers = arguments([(3, 5)], 320)
    with pytest.raises(ArcmergeError, match="'key_cache' must have a multiple of 256 slots with flash_attn, got 320"):
        ops.attention(*tensors, **numbers)
    monkeypatch.setenv("ARCMERGE_BACKEND_ATTENTION", "flashinfer")
    tensors, numbers = arguments([(3, 5)], 256, 32)
    with pytest.raises(ArcmergeError, match="'query' must have heads of 64, 128, 256 elements with flashinfer, got 32"):
        ops.attention(*tensors, **numbers)


@every_package
def test_a_package_runs_only_where_a_setting_names_it(
    package: str, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ARCMERGE_BACKEND", "ARCMERGE_BACKEND_ATTENTION"):
        monkeypatch.delenv(name, raising=False)
    for device in ("cpu", "cuda"):
        assert not [each for each in backends(device).values() if package in each]
    monkeypatch.setenv("ARCMERGE_BACKEND_ATTENTION", package)
    found = {name for name, each in backends("cuda").items() if each.startswith(package)}
    assert found == {"attention"}
    assert backends("cuda")["attention"].endswith("forced by ARCMERGE_BACKEND_ATTENTION")
    monkeypatch.setenv("ARCMERGE_BACKEND", package)
    with pytest.raises(
        ArcmergeError, match=f"'ARCMERGE_BACKEND' must name .* geglu on cpu, got '{package}': it has no"
    ):
        ops.geglu(torch.ones(1, 8), torch.ones(1, 8))
    assert [name for name, each in OPS.items() if package in each.implementations] == ["attention"]


@every_package
def test_a_package_that_is_not_installed_is_an_error(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("ARCMERGE_BACKEND_ATTENTION", package)
    tensors, numbers = arguments([(3, 5)], 256)
    with pytest.raises(
        ArcmergeError,
        match=f"'ARCMERGE_BACKEND_ATTENTION' must name a backend .* got '{package}': {package} is not installed",
    ):
        ops.attention(*tensors, **numbers)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernel runs on the GPU")
def test_the_stand_in_is_the_kernel(installed: None) -> None:
    """The formula of the stand-ins, held against the kernel of this package, which was not written with it."""
    tensors, numbers = arguments([(5, 40)], 256, window=7)
    out = torch.empty_like(tensors[0])
    launch(out, *tensors, **numbers)
    query, key, value = tensors[0], *(cache[0, :, :40].transpose(0, 1) for cache in tensors[1:3])
    assert same(attention_packages.attended(query, key, value, 0.2, 5.0, True, 6, 0), out)
