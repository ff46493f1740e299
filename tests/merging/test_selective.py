"""The methods that compare the inputs element by element, at the limits of their parameters and against sorts."""

from __future__ import annotations

import random
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import arcmerge
import tiny
from arcmerge.merging.execution.cpu.native import measured
from arcmerge.merging.methods.measure import Counts, Divergences, Statistic
from arcmerge.merging.methods.method import Arguments
from arcmerge.merging.methods.registry import get
from arcmerge.merging.methods.rule import Consensus
from golden import selective
from golden.compare import is_rounded_from
from operands import BF16, F32, normal, operand, same_bits

BASED = (*selective.METHODS, "magmax")
METHODS = (*BASED, "median")
SETTINGS: dict[str, dict[str, Any]] = {"sce": {"select_topk": 0.3}}
SHAPE = (24, 40)
LENGTHS = (*range(1, 18), 33, 64, 1000)
KINDS = ("all equal", "all zero", "two values", "zeros and one value", "denormals", "wide range", "neighbours")


def inputs(method: str, dtype: torch.dtype = F32, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, list[Tensor]]:
    """A base and as many models near it as the method takes, up to three."""
    base = normal(*shape, dtype=F32, seed=100)
    count = 1 if method == "arcee_fusion" else 3
    return base.to(dtype), [(base + 0.1 * normal(*shape, dtype=F32, seed=n)).to(dtype) for n in range(count)]


def merged(method: str, base: Tensor | None, models: list[Tensor], **parameters: Any) -> Tensor:
    listed = [{"x": model} for model in models]
    return arcmerge.merge_state_dicts(
        listed, method, base=base if base is None else {"x": base}, parameters=parameters
    )["x"]


# ---- against sorts


def fill(kind: str, count: int, dtype: torch.dtype, draw: random.Random) -> Tensor:
    """Values, positive and negative, of which many are equal, zero, tiny or apart by one step."""
    # Products with weights are rounded to 2^-149, so that those of smaller numbers say nothing.
    tiny_step = 2.0**-133 if dtype == BF16 else 2.0**-141
    values = {
        "all equal": lambda: 0.375,
        "all zero": lambda: 0.0,
        "two values": lambda: draw.choice([0.5, 0.25]),
        "zeros and one value": lambda: draw.choice([0.0, 0.0, 1.5]),
        "denormals": lambda: tiny_step * draw.randrange(9),
        "wide range": lambda: 2.0 ** draw.randint(-20, 5) * (1 + draw.random()),
        "neighbours": lambda: 1 + draw.randrange(6) * torch.finfo(dtype).eps,
    }[kind]
    drawn = [values() * (1 if kind == "all equal" else draw.choice([1, -1])) for _ in range(count)]
    return torch.tensor(drawn, dtype=torch.float64).to(dtype)


def statistics(method: str, tensors: list[Tensor], arguments: Arguments) -> list[Statistic]:
    """What the measures that a method names find in a base and models."""
    found: list[Statistic] = []
    while (measure := get(method).measure(found, arguments)) is not None:
        count, columns = tensors[0].numel(), tensors[0].shape[-1]
        got = measured(measure, [operand(one) for one in tensors], 0, columns, 0, count)
        found.append(Statistic(measure, got, {0: got} if isinstance(got, Counts) else {}))
    return found


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["mergekit", "paper"])
@pytest.mark.parametrize("models", [1, 2, 3])
def test_sce_selects_the_largest_variances(models: int, variant: str, kind: str, dtype: torch.dtype) -> None:
    for count in LENGTHS:
        draw = random.Random(f"{kind} {count}")
        base, others = torch.zeros(count, dtype=dtype), [fill(kind, count, dtype, draw) for _ in range(models)]
        for select_topk in (0.1, 0.5, 0.97, 1.0):
            found = merged("sce", base, others, select_topk=select_topk, variant=variant)
            parameters = {"base": 0, "select_topk": select_topk, "variant": variant}
            exact = selective.merged("sce", [base, *others], parameters, rounded=dtype == BF16)
            # Weights divide what is rounded to 2^-149. No sum of votes is so small that rounding turns it.
            size = exact.size + 2.0**-121
            assert is_rounded_from(found, exact.exact, size, dtype), (count, select_topk)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_arcee_fusion_takes_what_is_above_the_exact_threshold(kind: str, dtype: torch.dtype) -> None:
    for count in LENGTHS:
        for rows in (1, 3):
            draw = random.Random(f"{kind} {count} {rows}")
            x, base = (fill(kind, rows * count, dtype, draw).reshape(rows, count) for _ in range(2))
            found = merged("arcee_fusion", base, [x])
            scales = torch.from_numpy(selective.divergences(x, base))
            own = torch.from_numpy(
                np.asarray(measured(Divergences(), [operand(base), operand(x)], 0, count, 0, x.numel()))
            )
            torch.testing.assert_close(own.double(), scales, rtol=1e-6, atol=1e-15)
            # Of the divergences in float32, every importance and every comparison is exact.
            importance = ((x.float() - base.float()).abs() * own.reshape(-1, 1)).numpy()
            taken = torch.from_numpy(importance.astype(np.float64) >= selective.threshold_of(importance))
            both = (base.float() + (x.float() - base.float())).to(dtype)
            assert torch.equal(found, torch.where(taken, both, base)), (count, rows)


@pytest.mark.parametrize("rows", range(4, 12))
def test_the_threshold_is_rounded_up(rows: int) -> None:
    base, (x,) = inputs("arcee_fusion", shape=(rows, 40))
    arguments = Arguments(2, 0, {}, {}, tensor="x", elements=x.numel())
    rule = get("arcee_fusion").rule(statistics("arcee_fusion", [base, x], arguments), arguments)
    assert isinstance(rule, Consensus)
    (cut,) = rule.selection.cuts
    threshold = struct.unpack("f", struct.pack("I", cut[2]))[0]
    scales = np.asarray(rule.selection.row_scales, np.float32).reshape(-1, 1)
    importance = (x - base).abs().numpy() * scales
    exact = selective.threshold_of(importance)
    assert float(np.nextafter(np.float32(threshold), np.float32(0))) < exact <= threshold


# ---- against mergekit


MERGEKIT: list[tuple[str, int, int, dict[str, Any]]] = [
    ("sce", 3, 0, {}),
    ("sce", 4, 2, {"select_topk": 0.3}),
    ("sce", 3, 1, {"select_topk": 0.0}),
    ("sce", 2, 0, {"select_topk": 0.5}),
    ("ram", 3, 0, {}),
    ("ram", 4, 3, {"epsilon": 0.5}),
    ("ramplus_tl", 3, 0, {"epsilon": 0.5}),
    ("ramplus_tl", 4, 1, {"epsilon": 1.0, "r": 2.0, "alpha": 0.7}),
    ("ramplus_tl", 4, 0, {"epsilon": 0.5, "r": -0.5, "alpha": -0.3}),
    ("ramplus_tl", 2, 0, {"epsilon": 0}),
    ("arcee_fusion", 2, 0, {}),
    ("arcee_fusion", 2, 1, {}),
]


@pytest.mark.parametrize(("name", "count", "base", "parameters"), MERGEKIT)
@pytest.mark.parametrize("shape", [(5, 7), (40, 30), (33,), (2, 3, 4)], ids=str)
def test_agrees_with_mergekit(
    name: str, count: int, base: int, parameters: dict[str, Any], shape: tuple[int, ...]
) -> None:
    methods = pytest.importorskip("mergekit.merge_methods.api")
    tensors = [normal(*shape, dtype=F32, seed=seed) for seed in range(count)]
    expected = methods.merge_tensors(tensors, name, base_index=base, parameters=parameters)
    found = merged(name, tensors[base], [x for index, x in enumerate(tensors) if index != base], **parameters)
    defaults = {one.name: one.default for one in get(name).parameters}
    exact = selective.merged(name, tensors, {**defaults, **parameters, "base": base}, rounded=False)
    clear = exact.margin > selective.NEAR
    assert bool(((found - expected).abs() <= 1e-6 * exact.size)[clear].all())
    assert bool(((found - exact.exact).abs() <= 1e-6 * exact.size)[clear].all())
    assert int((~clear).sum()) <= 2 + clear.numel() // 50


# ---- limits of the parameters, and inputs that are alike


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_models_that_equal_the_base_give_the_base(method: str, dtype: torch.dtype) -> None:
    base, models = inputs(method, dtype)
    settings = [{}, *({"sce": [{"select_topk": 0.3}, {"variant": "paper"}], "ram": [{"epsilon": 0}]}.get(method, []))]
    for parameters in settings:
        assert same_bits(merged(method, base, [base.clone() for _ in models], **parameters), base)


@pytest.mark.parametrize("variant", ["mergekit", "paper"])
def test_sce_at_the_limits_of_select_topk(variant: str) -> None:
    base, models = inputs("sce")
    everything = merged("sce", base, models, variant=variant)
    assert same_bits(merged("sce", base, models, select_topk=1, variant=variant), everything)
    # Nothing is selected: the weights of the paper are then equal, while those of mergekit have nothing to weigh.
    found, equal = merged("sce", base, models, select_topk=0, variant=variant), merged("sce", base, models)
    if variant == "mergekit":
        assert same_bits(found, base)
    else:
        torch.testing.assert_close(found, equal, rtol=0, atol=0.1)
        assert not same_bits(found, base)


def test_one_model_has_no_variance() -> None:
    base, models = inputs("sce")
    # mergekit selects none of the elements, whose variance is 0; the paper adds what it does not select.
    assert same_bits(merged("sce", base, models[:1], select_topk=0.5), base)
    for parameters in ({}, {"variant": "paper"}, {"variant": "paper", "select_topk": 0.5}):
        torch.testing.assert_close(merged("sce", base, models[:1], **parameters), models[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("sce", "ramplus_tl")])
def test_one_model_and_a_base(method: str) -> None:
    base, (model, *_) = inputs(method)
    found = merged(method, base, [model])
    if method == "ram":
        active = (model - base).abs() > float(np.float32(1e-5))
        torch.testing.assert_close(found, torch.where(active, model, base), rtol=2**-23, atol=1e-7)
    elif method == "magmax":
        torch.testing.assert_close(found, model, rtol=2**-23, atol=1e-7)
    elif method == "arcee_fusion":
        assert bool(((found == base) | (found - model).abs().le(2**-23)).all())
    else:
        torch.testing.assert_close(found, (base + model) / 2)


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
@pytest.mark.parametrize("epsilon", [0, 1e-320, 1e-46, 1e-5, 3.5e38, 1e300])
def test_limits_of_epsilon(method: str, epsilon: float) -> None:
    base, models = inputs(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = merged(method, base, models, epsilon=epsilon)
    if epsilon > 1e38:  # no difference is as large
        assert same_bits(found, base)
    else:
        parameters = {"base": 0, "epsilon": epsilon, "r": 0.1, "alpha": 0.2}
        exact = selective.merged(method, [base, *models], parameters, rounded=False)
        assert is_rounded_from(found, exact.exact, exact.size, F32)


def test_a_difference_of_epsilon_is_no_change() -> None:
    base, x = torch.zeros(3), torch.tensor([0.5, -0.5, 0.75])
    for method in ("ram", "ramplus_tl"):
        assert merged(method, base, [x], epsilon=0.5).tolist() == [0, 0, 0.75]


def test_an_epsilon_above_the_count_divides_the_overlap() -> None:
    models = [torch.tensor([20.0, 20, 20, 0]), torch.tensor([0.0, 20, 20, 20])]
    found = merged("ramplus_tl", torch.zeros(4), models, epsilon=10, r=1, alpha=10)
    torch.testing.assert_close(found, torch.tensor([24.0, 20, 20, 24]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (7, 1), (0,), (3, 0)], ids=str)
def test_tensors_of_few_elements_and_of_none(method: str, shape: tuple[int, ...]) -> None:
    base, models = inputs(method, shape=shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = merged(method, base, models, **SETTINGS.get(method, {}))
    assert found.shape == base.shape
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("select_topk", 1.5, "'select_topk' must be between 0 and 1, got 1.5"),
        ("select_topk", -0.1, "'select_topk' must be between 0 and 1, got -0.1"),
        ("select_topk", float("nan"), "'select_topk' must be a finite number, got nan"),
        ("int8_mask", 3, "'int8_mask' must be true or false, got 3"),
        ("variant", "fusechat", "'variant' must be mergekit or paper, got 'fusechat'"),
        ("epsilon", -1e-5, "'epsilon' must be 0 or more, got -1e-05"),
        ("epsilon", float("nan"), "'epsilon' must be a finite number, got nan"),
        ("r", float("inf"), "'r' must be a finite number, got inf"),
        ("alpha", "x", "'alpha' must be a finite number, got 'x'"),
        ("lambda", float("nan"), "'lambda' must be a finite number, got nan"),
    ],
)
def test_values_out_of_range_are_one_sentence(method: str, name: str, value: Any, rule: str) -> None:
    known = [parameter.name for parameter in get(method).parameters]
    base, models = inputs(method)
    if name in known:
        with pytest.raises(arcmerge.ArcmergeError) as caught:
            merged(method, base, models, **{name: value})
        assert str(caught.value) == rule


@pytest.mark.parametrize("method", BASED)
def test_a_merge_without_a_base_is_refused(method: str) -> None:
    base, models = inputs(method)
    with pytest.raises(
        arcmerge.ArcmergeError, match=rf"^'x': '{method}' must have one of its \d models as the base, got"
    ):
        merged(method, None, [base, *models])


@pytest.mark.parametrize("method", BASED)
def test_a_base_alone_and_a_model_alone_are_copied(method: str) -> None:
    base, (model, *_) = inputs(method)
    assert same_bits(merged(method, base, [base]), base)
    assert same_bits(merged(method, None, [model]), model)


def test_median_needs_no_base() -> None:
    base, models = inputs("median")
    assert torch.equal(merged("median", None, models), torch.stack(models).median(0).values)
    middle = torch.stack([base, *models]).double().sort(0).values[1:3].mean(0)
    assert is_rounded_from(merged("median", None, [base, *models]), middle, middle.abs(), F32)


def test_magmax_takes_the_farthest_and_of_equal_ones_the_first() -> None:
    base = torch.zeros(4)
    models = [torch.tensor([1.0, -2, 0, 3]), torch.tensor([-1.0, 2, 0, -4])]
    assert merged("magmax", base, models).tolist() == [1, -2, 0, -4]
    assert merged("magmax", base, models[::-1], **{"lambda": 0.5}).tolist() == [-0.5, 1, 0, -2]
    assert merged("magmax", base, models, **{"lambda": 0}).tolist() == [0, 0, 0, 0]


# ---- NaN, infinity and the largest numbers


@pytest.mark.parametrize("method", METHODS)
def test_a_parent_with_nan_is_named_or_merged_as_it_is(tmp_path: Path, method: str) -> None:
    models = tiny.make_all(tmp_path / "models")
    file = models / "gemma-b" / "model.safetensors"
    tensors, name = load_file(file), "model.layers.2.mlp.up_proj.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    others = ["gemma-b"] if method == "arcee_fusion" else ["gemma-b", "gemma-c"]
    listed, base = [{"model": str(models / one)} for one in others], str(models / "gemma-a")
    config = {"merge_method": method, "models": listed, "dtype": "bfloat16", "parameters": SETTINGS.get(method, {})}
    config |= {"base_model": base}
    with pytest.raises(arcmerge.ArcmergeError, match=r"up_proj.*NaN or infinity \(1 in .*gemma-b\)"):
        arcmerge.merge(config, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    arcmerge.merge(config, tmp_path / "out", device="cpu", allow_nonfinite=True)
    places = {
        one: torch.nonzero(~tensor.isfinite()).tolist()
        for one, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
        if not bool(tensor.isfinite().all())
    }
    assert places.keys() == {name}
    # The weights of sce are those of all elements, so that all of the tensor is lost.
    assert method == "sce" or places == {name: [[3, 5]]}


@pytest.mark.parametrize("method", METHODS)
def test_infinity_is_no_warning_of_numpy(method: str) -> None:
    base, models = inputs(method)
    models[0][3, 5] = torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not bool(merged(method, base, models, **SETTINGS.get(method, {})).isfinite().all())


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1.0, 1e18, 1e20, 1e36])
@pytest.mark.parametrize("method", METHODS)
def test_finite_models_give_finite_values(method: str, size: float, dtype: torch.dtype) -> None:
    base, models = inputs(method)
    tensors = [(one * size).to(dtype) for one in (base, *models)]
    assert all(bool(one.isfinite().all()) for one in tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for parameters in ({}, SETTINGS.get(method, {})):
            assert bool(merged(method, tensors[0], tensors[1:], **parameters).isfinite().all())
