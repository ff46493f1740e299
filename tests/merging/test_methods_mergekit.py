"""Merge methods against the functions of mergekit 0.1.5 in float64, if mergekit is installed."""

from __future__ import annotations

from typing import Any

import pytest

import arcmerge
from arcmerge.merging.methods.registry import METHODS, get
from golden.record import choices
from vectors import assert_close, merge, random_tensors

# Functions that mergekit 0.1.5 can compute in float64; its bf16 and float32 paths round intermediate values.
MERGEKIT: list[tuple[str, int, int | None, dict[str, Any]]] = [
    *(("slerp", 2, base, {"t": t}) for base in (0, 1) for t in (0.0, 0.3, 1.0, 1.5, -0.5)),
    ("nuslerp", 2, None, {"weight": (0.4, 0.9)}),
    ("nuslerp", 2, None, {"weight": (0.4, 0.9), "nuslerp_row_wise": True}),
    ("nuslerp", 2, None, {"weight": (0.4, 0.9), "nuslerp_flatten": False}),
    ("nuslerp", 2, None, {"weight": (0.4, 0.9), "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("nuslerp", 3, 0, {"weight": (None, 0.4, 0.9)}),
    ("nuslerp", 3, 1, {"weight": (0.4, None, 0.9), "nuslerp_flatten": False}),
    ("nuslerp", 2, None, {"weight": (1, -1)}),
    ("multislerp", 3, None, {"weight": (0.2, 0.5, 0.7)}),
    ("multislerp", 3, None, {"weight": (0.2, 0.5, 0.7), "normalize_weights": False, "eps": 0.1}),
    ("multislerp", 4, 0, {"weight": (None, 0.2, 0.5, 0.7)}),
    ("multislerp", 2, 1, {"weight": (0.2, None)}),
    *(("karcher", count, None, {}) for count in (1, 2, 3, 6)),
    ("karcher", 3, None, {"max_iter": 1}),
    ("model_stock", 3, 0, {}),
    ("model_stock", 4, 2, {"filter_wise": True}),
    ("linear", 3, None, {"weight": (0.2, 0.5, 0.7)}),
    ("linear", 3, None, {"weight": (0.2, 0.5, 0.7), "normalize": False}),
    ("task_arithmetic", 3, 1, {"weight": (0.2, None, 0.5)}),
    ("task_arithmetic", 3, 0, {"weight": (None, 0.2, 0.5), "normalize": True, "lambda": 0.7}),
    ("passthrough", 1, None, {"scale": (0.3,)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "count", "base", "parameters"), MERGEKIT)
@pytest.mark.parametrize("case", ["apart", "near", "with zero", "opposite"])
def test_agrees_with_mergekit(name: str, count: int, base: int | None, parameters: dict[str, Any], case: str) -> None:
    methods = pytest.importorskip("mergekit.merge_methods.api")
    torch = pytest.importorskip("torch")
    tensors = random_tensors(15, count, common=30.0 if case == "near" else 0.5)
    if case == "with zero":
        tensors[0] = 0 * tensors[0]
    if case == "opposite" and name != "nuslerp":  # mergekit's nuslerp divides by the rounded sine of 180 degrees
        tensors[-1] = -2 * tensors[0]
    theirs = {
        key: [v for v in value if v is not None] if isinstance(value, tuple) else value
        for key, value in parameters.items()
    }
    expected = methods.merge_tensors(
        [torch.tensor(tensor) for tensor in tensors],
        name,
        base_index=base if get(name).base != "ignored" else None,
        parameters=theirs,
    )
    # On the linear branch slerp has the weights of mergekit's float32, and mergekit uses float64 here. Elsewhere,
    # multislerp's tangent vector, zero up to rounding, is compared with eps = 1e-8.
    relative = 2**-24 if name == "slerp" and case == "opposite" else 1e-9
    assert_close(merge(name, tensors, base, **parameters), expected.numpy(), tensors, relative=relative)


# Methods that choose elements, which both compare in float32.
TRIMMED: list[tuple[str, int, int, dict[str, Any]]] = [
    ("ties", 3, 0, {"density": (None, 0.3, 0.7)}),
    ("ties", 4, 1, {"density": 0.5, "rescale": True, "normalize": False, "lambda": 1.7}),
    ("ties", 3, 2, {"density": 1.0, "int8_mask": True}),
    ("ties", 3, 0, {"density": (None, 0.01, 0.0)}),
    ("breadcrumbs", 3, 0, {"density": 0.6, "gamma": (None, 0.2, 0.0)}),
    ("breadcrumbs", 3, 0, {"density": 0.9, "gamma": 0.5, "rescale": True, "normalize": True}),
    ("breadcrumbs", 3, 0, {"density": 0.02, "gamma": 1.0}),
    ("breadcrumbs_ties", 4, 3, {"density": 0.6, "gamma": 0.1, "lambda": -0.5}),
    ("dare_linear", 3, 0, {"density": 0.4}),
    ("dare_linear", 3, 1, {"density": (0.0, None, 0.8), "normalize": True, "rescale": False}),
    ("dare_ties", 4, 0, {"density": 0.7, "normalize": True}),
    ("della", 3, 0, {"density": 0.5}),
    ("della", 3, 0, {"density": (None, 0.3, 1.0), "epsilon": 0.2, "normalize": False}),
    ("della_linear", 3, 2, {"density": 0.6, "epsilon": (0.3, 0.0, None), "rescale": False}),
]


@pytest.mark.parametrize(("name", "count", "base", "parameters"), TRIMMED)
@pytest.mark.parametrize("weights", [(0.61, 0.37, 0.17), (0.61, -0.37, 0.17), (1.0, -1.0, 0.0)], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (40, 30), (33,), (2, 3, 4)], ids=str)
def test_chosen_elements_agree_with_mergekit(
    name: str, count: int, base: int, parameters: dict[str, Any], weights: tuple[float, ...], shape: tuple[int, ...]
) -> None:
    methods = pytest.importorskip("mergekit.merge_methods.api")
    torch = pytest.importorskip("torch")
    if len(shape) == 3 and name.startswith("della"):
        pytest.skip("mergekit's row is dim 1 of any tensor")
    tensors = [torch.tensor(tensor).float() for tensor in random_tensors(16, count, shape, common=2.0)]
    weight: list[float | None] = list(weights[: count - 1])
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in parameters.items()}
    theirs = {
        key: [v for v in value if v is not None] if isinstance(value, list) else value for key, value in given.items()
    }
    per_model = {"density", "gamma", "epsilon"}
    theirs = {
        key: [value] * (count - 1) if key in per_model and not isinstance(value, list) else value
        for key, value in theirs.items()
    }
    with choices("x"):
        expected = methods.merge_tensors(tensors, name, base_index=base, parameters={"weight": weight, **theirs})
    weight.insert(base, None)
    models = [{"x": tensor} for tensor in tensors]
    ours = arcmerge.merge_state_dicts(models, name, base=models[base], parameters={"weight": weight, **given})["x"]
    # Where weights nearly cancel, terms are larger than the result.
    scale = torch.stack(tensors).abs().sum(0) * (20 if min(weights) < 0 else 2)
    assert bool(((ours - expected).abs() <= 1e-6 * scale).all())


def test_every_method_of_mergekit_is_supported() -> None:
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    everywhere = {p.name for method in registry.registered_methods() for p in method.spec.parameters}
    for method in registry.registered_methods():
        ours = {p.name: p.scope for p in METHODS[method.spec.name].parameters if not p.extension}
        theirs = {p.name: p.scope.value for p in method.spec.parameters}
        # task_arithmetic reads density, rescale and int8_mask there, and does nothing with them.
        assert theirs.items() >= ours.items()
        assert method.spec.name == "task_arithmetic" or ours == theirs
        # The name of an extension must not occur in recipes for mergekit, for any method.
        assert not {p.name for p in METHODS[method.spec.name].parameters if p.extension} & everywhere
