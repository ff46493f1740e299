"""The methods that trim or mask differences at the limits of their parameters, and as their authors wrote them."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import arcmerge
import tiny
from arcmerge.merging.methods.masks import mask_key
from arcmerge.merging.options import Options
from arcmerge.merging.prepare import prepare
from golden import task_vectors
from operands import BF16, F32, normal, same_bits

METHODS = tuple(task_vectors.METHODS)
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")
ELECTING = ("ties", "dare_ties", "breadcrumbs_ties", "della")
SHAPE = (24, 40)


def inputs(dtype: torch.dtype = F32, count: int = 2, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, list[Tensor]]:
    """A base and models near it."""
    base = normal(*shape, dtype=F32, seed=100)
    return base.to(dtype), [(base + 0.1 * normal(*shape, dtype=F32, seed=n)).to(dtype) for n in range(count)]


def merged(
    method: str, base: Tensor | None, models: list[Tensor], seed: int | None = None, **parameters: Any
) -> Tensor:
    found = arcmerge.merge_state_dicts(
        [{"x": model} for model in models],
        method,
        base=None if base is None else {"x": base},
        parameters={"weight": 1.0, **{"lambda" if name == "scale" else name: v for name, v in parameters.items()}},
        random_seed=seed,
    )
    return found["x"]


# ---- limits of the parameters


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_density_0_gives_the_base(method: str, dtype: torch.dtype) -> None:
    base, models = inputs(dtype)
    assert same_bits(merged(method, base, models, density=0), base)


@pytest.mark.parametrize("method", METHODS)
def test_density_1_keeps_everything(method: str) -> None:
    base, models = inputs()
    found = merged(method, base, models, density=1, normalize=False)
    if method in ELECTING:
        total = sum((model.double() - base.double() for model in models), torch.zeros(SHAPE, dtype=torch.float64))
        agree = [torch.where((m.double() - base.double()) * total > 0, m.double() - base.double(), 0) for m in models]
        torch.testing.assert_close(found.double(), base.double() + sum(agree), rtol=1e-6, atol=1e-6)
    else:
        assert same_bits(found, merged("task_arithmetic", base, models))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_models_that_equal_the_base_give_the_base(method: str, dtype: torch.dtype) -> None:
    base, _ = inputs(dtype)
    for settings in ({}, {"rescale": True, "normalize": True}, {"scale": -2.5}):
        assert same_bits(merged(method, base, [base.clone(), base.clone()], density=0.5, **settings), base)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_zero_and_weights_that_cancel(method: str) -> None:
    base, models = inputs()
    for normalize in (True, False):
        found = merged(method, base, models, weight=[0, 0], density=0.5, normalize=normalize)
        assert same_bits(found, base)
        found = merged(method, base, models, weight=[1, -1], density=0.5, normalize=normalize)
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (7, 1), (0,), (3, 0)], ids=str)
def test_tensors_of_few_elements_and_of_none(method: str, shape: tuple[int, ...]) -> None:
    base, models = inputs(shape=shape)
    for density in (0.16 if "della" in method else 0.01, 0.5, 0.84):
        found = merged(method, base, models, density=density)
        assert found.shape == base.shape
        assert bool(found.isfinite().all())
    if method == "ties" and base.numel() == 1:  # one element stays, so that this is the mean of those that agree
        assert not torch.equal(found, base)


def test_a_row_of_one_element_has_the_density_as_its_probability() -> None:
    base, models = inputs(shape=(5000, 1))
    assert same_bits(
        merged("della", base, models, density=0.4), merged("dare_ties", base, models, density=0.4, normalize=True)
    )


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_limits_of_gamma(method: str) -> None:
    base, models = inputs(count=1)
    # Nothing is removed at the top: these are the elements of ties. Too large a gamma keeps the smallest elements.
    largest = merged("ties", base, models, density=0.3, normalize=False)
    assert same_bits(merged(method, base, models, density=0.3, gamma=0), largest)
    size = int(0.3 * base.numel())
    smallest = (models[0] - base).abs().flatten().sort().indices[:size]
    found = merged(method, base, models, density=0.3, gamma=1)
    assert sorted(torch.nonzero((found != base).flatten()).flatten().tolist()) == sorted(smallest.tolist())


@pytest.mark.parametrize("method", METHODS)
def test_the_base_may_be_listed_and_a_single_model_is_copied(method: str) -> None:
    base, models = inputs()
    state, others = {"x": base}, [{"x": model} for model in models]
    parameters = {"weight": 0.7, "density": 0.5}
    listed = arcmerge.merge_state_dicts([state, *others], method, base=state, parameters=parameters)
    added = arcmerge.merge_state_dicts(others, method, base=state, parameters=parameters)
    assert same_bits(listed["x"], added["x"])
    for one, of in (([state], state), ([others[0]], None)):
        assert same_bits(arcmerge.merge_state_dicts(one, method, base=of, parameters=parameters)["x"], one[0]["x"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("density", 2, "'density' must be between 0 and 1, got 2"),
        ("density", 50, "'density' must be between 0 and 1, got 50; write 0.5 for 50 %"),
        ("density", -1, "'density' must be between 0 and 1, got -1"),
        ("density", float("nan"), "'density' must be a finite number, got nan"),
        ("density", "half", "'density' must be a finite number, got 'half'"),
        ("weight", float("inf"), "'weight' must be a finite number, got inf"),
        ("lambda", "x", "'lambda' must be a finite number, got 'x'"),
        ("normalize", 3, "'normalize' must be true or false, got 3"),
        ("gamma", 1.5, "'gamma' must be between 0 and 1, got 1.5"),
        ("epsilon", -0.1, "'epsilon' must be 0 or more, got -0.1"),
        ("variant", "papers", "'variant' must be mergekit or paper, got 'papers'; did you mean `paper`?"),
    ],
)
def test_values_out_of_range_are_one_sentence(method: str, name: str, value: Any, rule: str) -> None:
    base, models = inputs()
    known = [parameter.name for parameter in arcmerge.merging.methods.registry.get(method).parameters]
    if name not in known:
        rule = f"'parameters' must be among {', '.join(known)}, got '{name}'"
    with pytest.raises(arcmerge.ArcmergeError) as caught:
        merged(method, base, models, **{name: value})
    assert str(caught.value) == rule


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.15, 0.15), (0.95, 0.1), (0.5, 0.5), (0.9, 5)])
def test_an_epsilon_that_gives_no_probabilities_is_refused(method: str, density: float, epsilon: float) -> None:
    base, models = inputs()
    with pytest.raises(arcmerge.ArcmergeError) as caught:
        merged(method, base, models, density=density, epsilon=[epsilon, epsilon])
    assert str(caught.value) == (
        f"'x': 'epsilon' must be less than the density and than 1 - density, got {epsilon:g} with a density of "
        f"{density:g}; lower it, or set density to 0.5"
    )
    # Where nothing is drawn, epsilon has no effect.
    assert same_bits(merged(method, base, models, density=0, epsilon=epsilon), base)


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_without_a_base_is_refused(method: str) -> None:
    _, models = inputs()
    with pytest.raises(
        arcmerge.ArcmergeError, match=rf"^'x': '{method}' must have one of its 2 models as the base, got"
    ):
        merged(method, None, models)


# ---- NaN and infinity


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_what_is_not_finite_stays_where_it_is(method: str, bad: float, dtype: torch.dtype) -> None:
    base, models = inputs(dtype)
    clean = merged(method, base, models, density=0.5)
    models[0][3, 5] = models[0][11, 30] = bad
    base[7, 7] = bad
    for settings in ({}, {"rescale": True}):
        found = merged(method, base, models, density=0.5, **settings)
        where = torch.nonzero(~found.isfinite()).tolist()
        assert where == [[3, 5], [7, 7], [11, 30]]
    assert bool(clean.isfinite().all())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("gemma-a", "gemma-c", "gemma-d"):
        tiny.make(name, folder)
    broken = tiny.make("gemma-b", folder) / "model.safetensors"
    tensors = load_file(broken)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken, metadata={"format": "pt"})
    return folder


def recipe(models: Path, method: str, *names: str, **parameters: Any) -> dict[str, Any]:
    listed = [{"model": str(models / name)} for name in names]
    parameters = {"weight": 0.5, "density": 0.5, **parameters}
    base = str(models / "gemma-a")
    return {"merge_method": method, "base_model": base, "models": listed, "parameters": parameters, "dtype": "bfloat16"}


@pytest.mark.parametrize("method", METHODS)
def test_a_parent_with_nan_is_named_or_merged_as_it_is(models: Path, tmp_path: Path, method: str) -> None:
    config = recipe(models, method, "gemma-b", "gemma-c")
    with pytest.raises(arcmerge.ArcmergeError, match=r"up_proj.*NaN or infinity \(1 in .*gemma-b\)"):
        arcmerge.merge(config, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    arcmerge.merge(config, tmp_path / "out", device="cpu", allow_nonfinite=True)
    where = {
        name: torch.nonzero(~tensor.isfinite()).tolist()
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
    }
    assert {name: places for name, places in where.items() if places} == {"model.layers.2.mlp.up_proj.weight": [[3, 5]]}


# ---- warnings


@pytest.mark.parametrize("method", METHODS)
def test_a_density_of_1_everywhere_is_a_warning(models: Path, method: str) -> None:
    def warnings_of(density: Any) -> list[str]:
        found: list[str] = []
        config = recipe(models, method, "gemma-c", "gemma-d", density=density)
        if density is None:
            del config["parameters"]["density"]
        prepare(config, Options(device="cpu", threads=1), found.append)
        return found

    sentence = f"'density' is 1 for every tensor, so {method} keeps all differences; set density, such as 0.5"
    assert warnings_of(None) == warnings_of(1) == [sentence]
    assert warnings_of(0.5) == warnings_of([{"filter": "up_proj", "value": 0.5}, {"value": 1}]) == []


# ---- variant: paper


def paper_ties(
    base: dict[str, Tensor], models: list[dict[str, Tensor]], density: float, scale: float
) -> dict[str, Any]:
    """TIES as its authors describe it, on one vector of the whole model.

    All magnitudes that are at least the k-th largest stay; the sign is that of the plain sum, or of the majority of all
    signs where the sum is 0; what agrees is averaged over the number of models that agree.
    """
    start = np.concatenate([tensor.double().numpy().ravel() for tensor in base.values()])
    rows = []
    for model in models:
        row = np.concatenate([model[name].double().numpy().ravel() for name in base]) - start
        kth = np.sort(np.abs(row))[::-1][int(density * len(row)) - 1]
        rows.append(np.where(np.abs(row) >= kth, row, 0))
    sums = np.sum(rows, axis=0)
    majority = np.sign(np.sign(sums).sum())
    signs = np.where(sums == 0, majority, np.sign(sums))
    agree = [np.where(row * signs > 0, row, 0) for row in rows]
    count = np.maximum(np.sum([part != 0 for part in agree], axis=0), 1)
    result, found, first = start + scale * np.sum(agree, axis=0) / count, {}, 0
    for name, tensor in base.items():
        found[name] = torch.from_numpy(result[first : first + tensor.numel()]).reshape(tensor.shape)
        first += tensor.numel()
    return found


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("lean", [0.05, -0.05])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_of_the_paper(dtype: torch.dtype, lean: float, density: float) -> None:
    # On a grid: many magnitudes are equal, and sums of 0 are frequent. `lean` decides on the majority of the signs.
    shapes = {"x": (30, 20), "small": (17,), "large": (40, 50)}
    spread = {"x": 4, "small": 1, "large": 8}
    base = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    models = [
        {
            name: ((normal(*shape, dtype=F32, seed=seed) * spread[name] + lean * 20).round() / 16).to(dtype)
            for name, shape in shapes.items()
        }
        for seed in (1, 2, 3, 4)
    ]
    parameters = {"weight": 1, "density": density, "variant": "paper", "lambda": 0.75}
    found = arcmerge.merge_state_dicts(models, "ties", base=base, parameters=parameters)
    expected = paper_ties(base, models, density, 0.75)
    for name in shapes:
        wanted = expected[name].to(dtype)
        assert bool(((found[name].double() - wanted.double()).abs() <= 2.0**-23 * wanted.double().abs()).all()), name
    # The threshold is not that of each tensor, and zero sums follow the majority.
    alone = arcmerge.merge_state_dicts(models, "ties", base=base, parameters={**parameters, "variant": "mergekit"})
    if density < 1:
        assert not torch.equal(found["small"], alone["small"])
    else:  # nothing is trimmed, and mergekit gives a sum of 0 the positive sign
        assert torch.equal(found["large"], alone["large"]) == (lean > 0)


def test_the_vote_of_the_paper_is_not_weighted() -> None:
    base = torch.zeros(4)
    models = [torch.tensor([1.0, 4, 1, 1]), torch.tensor([-2.0, -3, 2, -1])]
    found = merged("ties", base, models, weight=[10, 1], density=0.99, variant="paper", normalize=False)
    assert found.tolist()[:3] == [-2, 40, 12]
    assert merged("ties", base, models, weight=[10, 1], density=0.99, normalize=False).tolist()[:3] == [10, 40, 12]


def test_tensors_of_other_densities_are_a_model_of_their_own() -> None:
    base, models = inputs()
    state = {name: base[part] for name, part in (("a", slice(0, 8)), ("b", slice(8, 16)), ("c", slice(16, 24)))}
    others = [{name: model[8 * n : 8 * n + 8] for n, name in enumerate(state)} for model in models]

    def density(name: str) -> float:
        return 0.2 if name == "c" else 0.6

    parameters: dict[str, Any] = {"weight": 1, "density": density, "variant": "paper"}
    found = arcmerge.merge_state_dicts(others, "ties", base=state, parameters=parameters)
    for names in (("a", "b"), ("c",)):
        part = [{name: one[name] for name in names} for one in (state, *others)]
        alone = arcmerge.merge_state_dicts(part[1:], "ties", base=part[0], parameters=parameters)
        assert all(same_bits(found[name], alone[name]) for name in names)


@pytest.mark.parametrize("method", RANDOM)
def test_the_paper_divides_by_the_probability(method: str) -> None:
    base, models = inputs(count=1)
    found = merged(method, base, models, density=0.4, variant="paper", seed=5, normalize=False)
    difference = (models[0] - base).double()
    epsilon = 0.15 if "della" in method else 0.0
    probability = task_vectors.probabilities((models[0] - base).abs(), 0.4, epsilon)
    mask = task_vectors.drawn(probability, mask_key(5, "x", 0))
    expected = base.double() + torch.where(mask, difference / torch.from_numpy(probability), 0.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    plain = merged(method, base, models, density=0.4, variant="paper", rescale=False, seed=5, normalize=False)
    torch.testing.assert_close(plain.double(), base.double() + torch.where(mask, difference, 0.0), rtol=1e-6, atol=1e-7)


# ---- random masks


@pytest.mark.parametrize("method", RANDOM)
def test_masks_follow_from_the_seed_and_are_nested(method: str) -> None:
    base, models = inputs(count=1)
    settings = {"epsilon": 0.1} if "della" in method else {}

    def kept(density: float, seed: int) -> Tensor:
        return merged(method, base, models, density=density, seed=seed, rescale=False, **settings) != base

    assert torch.equal(kept(0.5, 1), kept(0.5, 1))
    assert not torch.equal(kept(0.5, 1), kept(0.5, 2))
    masks = [kept(density, 1) for density in (0.2, 0.35, 0.5, 0.8)]
    for fewer, more in pairwise(masks):
        assert not bool((fewer & ~more).any())
        assert int(more.sum()) > int(fewer.sum())


@pytest.mark.parametrize("method", RANDOM)
def test_each_model_and_each_tensor_has_a_mask_of_its_own(method: str) -> None:
    zeros, ones = torch.zeros(SHAPE), torch.ones(SHAPE)
    parameters = {"weight": 1, "density": 0.5, "rescale": False, "normalize": False}
    found = arcmerge.merge_state_dicts(
        [{"x": ones, "y": ones}, {"x": 2 * ones, "y": 2 * ones}], method, base={"x": zeros, "y": zeros},
        parameters=parameters,
    )  # fmt: skip
    shares = [float((found["x"] == value).double().mean()) for value in (0, 1, 2, 3)]
    assert all(0.2 < share < 0.3 for share in shares)
    assert not torch.equal(found["x"], found["y"])


def test_no_warning_of_numpy() -> None:
    base, models = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in METHODS:
            merged(method, base, [base, base], density=0.5, rescale=True)
            merged(method, base, models, density=0.5, rescale=True, weight=[1, -1])
