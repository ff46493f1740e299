"""arcmerge against mergekit 0.1.5 on golden/configs, and against float64 formulas of every method.

mergekit's results and its resolved parameters are recorded (golden/record.py). Each case checks three things: the same
files, names, dtypes, shapes and config; values within rounding of the exact formula; values as close to mergekit's as
mergekit's own arithmetic is exact. Tables list the intended differences.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

import arcmerge
import tiny
from golden import cases, formulas, selective, task_vectors
from golden.cases import Recorded, Source
from golden.compare import Tensors, assert_same_bits, is_rounded_from, load, magnitude, rank

EXPECTED = cases.load()

# Refused by both, with words that arcmerge's message must have.
REFUSED = {
    "depth-unequal-models": ("gemma-shallow", "4", "6"),
    "dtype-unknown": ("bf16", "bfloat16"),
    "family-mixed": ("LlamaForCausalLM", "Qwen2ForCausalLM"),
    "slerp-t-missing": ("'t'",),
    "slerp-t-only-under-models": ("'t'",),
    "slerp-t-without-fallback": ("'t'", "model.embed_tokens.weight"),
    "slerp-three-models": ("slerp", "2"),
    "slerp-without-base": ("base_model",),
    "vocabulary-mismatch": ("320", "336", "tokenizer"),
}

# Refused or not completed by mergekit, merged by arcmerge.
ACCEPTED = {
    "depth-deeper-slerp": "mergekit writes the weights, then fails on the length of layer_types",
    "depth-stack": "the same",
    "depth-stack-qwen2": "the same: transformers adds layer_types to qwen2",
    "shards-without-index": "the headers say which tensor lies where",
    "slerp-same-model-twice": "a copy, as in mergekit 0.1.4",
    "slerp-single-source-slice": "a copy, as in mergekit 0.1.4",
    "slerp-zero-length-tail": "a way to choose the final norm, as in mergekit 0.1.4",
}

# Entries that mergekit ignores without a warning.
IGNORED = {
    "slerp-t-under-models": ("models[1].parameters.t",),
    "slerp-unknown-keys": ("name", "parameters.strength"),
    "gradient-precedence": ("slices[0].sources[1].parameters.t",),
    "ties-not-normalized": ("models[0].parameters.weight", "models[0].parameters.density"),
}

# Keys of config.json that match the weights, while mergekit's do not.
CONFIG_DIFFERENCES: dict[str, dict[str, Any]] = {
    "dtype-none-mixed": {"dtype": "float32"},
    "dtype-none-mixed-half": {"dtype": "float32"},
    "dtype-torch-prefix": {"dtype": "bfloat16"},
    "head-tied-untied": {"tie_word_embeddings": False},
}

# Tensors of mergekit's output that arcmerge leaves out: a head that only repeats the embedding.
NOT_WRITTEN = {"head-spurious": {tiny.HEAD}}

# mergekit computes these in bf16, in which norms, angles and differences have two or three digits.
BF16_ARITHMETIC = {"nuslerp", "multislerp", "karcher", "model_stock", "task_arithmetic", "nearswap"}
BF16_ERROR = 0.05

# Methods that choose elements, whose second implementations choose the same.
CHOOSING = {*task_vectors.METHODS, *selective.METHODS}

# At a cosine of -0.995 sin(angle) is 0.1: rounding errors grow thirtyfold in f32. In bf16 the angle itself is lost.
NEAR_ANTIPODAL = "self_attn.q_proj.weight"
ANTIPODAL = "self_attn.k_proj.weight"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_all(tmp_path_factory.mktemp("golden") / "models")


@pytest.fixture(scope="session")
def read(models: Path) -> Callable[[str], Tensors]:
    """The tensors of a tiny model by its name."""
    known: dict[str, Tensors] = {}

    def tensors_of(model: str) -> Tensors:
        if model not in known:
            known[model] = load(models / model)
        return known[model]

    return tensors_of


@pytest.fixture(scope="session")
def merged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that arcmerge writes for a case, once for the session."""
    root = tmp_path_factory.mktemp("merged")

    def run(case: str) -> Path:
        out = root / case
        if not out.exists():
            recipe = root / f"{case}.yml"
            recipe.write_text(cases.config_text(case, models))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if case in IGNORED else "error", UserWarning)
                arcmerge.merge(recipe, out)
        return out

    return run


def _with_tensors() -> list[str]:
    return [name for name, expected in EXPECTED.items() if expected.tensors]


def _chooses_elements(case: str) -> bool:
    """Whether the method chooses elements, so that the rounding of a vote exchanges some of them for others."""
    return cases.config(case)["merge_method"] in CHOOSING


def _complete() -> list[str]:
    return [name for name, expected in EXPECTED.items() if expected.error is None]


def test_every_config_is_recorded_and_every_error_accounted_for() -> None:
    assert set(EXPECTED) == set(cases.names())
    assert {name for name, expected in EXPECTED.items() if expected.error} == {*REFUSED, *ACCEPTED}


@pytest.mark.filterwarnings("ignore:.*ignored:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_mergekit_refuses_are_refused_with_a_message(case: str, models: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(cases.config_text(case, models))
    with pytest.raises(arcmerge.ArcmergeError) as caught:
        arcmerge.merge(recipe, tmp_path / "out")
    assert all(word in str(caught.value) for word in REFUSED[case]), str(caught.value)
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize("case", _complete())
def test_files(case: str, merged: Callable[[str], Path], models: Path) -> None:
    out = merged(case)
    # mergekit loses generation_config.json if it loads the tokenizer.
    assert {path.name for path in out.iterdir()} == {*EXPECTED[case].files, "generation_config.json"}
    assert (out / "mergekit_config.yml").read_text() == cases.config_text(case, models)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("case", _complete())
def test_config_and_tokenizer(case: str, merged: Callable[[str], Path]) -> None:
    out, expected = merged(case), EXPECTED[case]
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = config.get("dtype", config.get("torch_dtype"))
    config["layer_types"] = len(config.get("layer_types", ()))
    wanted = {**expected.config, **CONFIG_DIFFERENCES.get(case, {})}
    if wanted["model_type"] != "gemma2":  # transformers adds layer_types on saving; arcmerge keeps the base's keys
        wanted["layer_types"] = 0
    assert {key: config.get(key) for key in wanted} == wanted
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert cases.vocabulary_digest(tokenizer.get_vocab(with_added_tokens=True)) == expected.vocabulary
    assert cases.render((out / "chat_template.jinja").read_text()) == expected.conversation


@pytest.mark.parametrize("case", _with_tensors())
def test_names_types_shapes_and_copies(case: str, merged: Callable[[str], Path]) -> None:
    tensors = load(merged(case))
    expected = {k: v for k, v in EXPECTED[case].tensors.items() if k not in NOT_WRITTEN.get(case, ())}
    assert {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()} == {
        k: (v.dtype, v.shape) for k, v in expected.items()
    }
    changed = [name for name, one in expected.items() if _is_copy(case, one) and not one.same_bits(tensors[name])]
    assert not changed


def _is_copy(case: str, one: Recorded) -> bool:
    method = cases.config(case)["merge_method"]
    return (method == "slerp" and one.parameters["t"] in (0, 1)) or method == "passthrough"


@pytest.mark.parametrize("case", _with_tensors())
def test_values_are_those_of_the_formula(
    case: str, merged: Callable[[str], Path], read: Callable[[str], Tensors]
) -> None:
    tensors = load(merged(case))
    config = cases.config(case)
    for name, one in EXPECTED[case].tensors.items():
        if name in NOT_WRITTEN.get(case, ()) or _is_aligned(case, name):
            continue
        inputs = [_input(source, config.get("dtype"), read) for source in one.sources]
        if config["merge_method"] in CHOOSING:
            one_by_one = _chosen(config["merge_method"], name, one, inputs)
            exact, size = one_by_one.exact, 2 * one_by_one.size
        else:
            exact = formulas.merged(config["merge_method"], [x.double() for x in inputs], one.parameters)
            size = _gain(config["merge_method"], name) * magnitude(inputs)
        assert is_rounded_from(tensors[name], exact, size, _promoted(inputs)), name


def _chosen(method: str, name: str, one: Recorded, inputs: list[Tensor]) -> task_vectors.Merged:
    rounded = _promoted(inputs) == torch.bfloat16
    if method in selective.METHODS:
        return selective.merged(method, inputs, one.parameters, rounded=rounded)
    return task_vectors.merged(method, inputs, one.parameters, name, rounded=rounded)


def _input(source: Source, dtype: str | None, read: Callable[[str], Tensors]) -> Tensor:
    """An input tensor, rounded to `dtype` if there is one; a tied head is the embedding."""
    tensors = read(source.model)
    tensor = tensors[source.tensor] if source.tensor in tensors else tensors[tiny.EMBEDDING]
    return tensor.to(getattr(torch, dtype.removeprefix("torch."))) if dtype else tensor


def _is_aligned(case: str, name: str) -> bool:
    """Whether rows of the inputs were aligned to a common vocabulary before the merge."""
    config = cases.config(case)
    return name in (tiny.EMBEDDING, tiny.HEAD) and ("tokenizer" in config or "tokenizer_source" in config)


def _gain(method: str, name: str) -> float:
    """How much larger than the inputs' own rounding errors those of the result may be.

    Next to the antipode coefficients are 1 / sin(angle), up to 30 for rows of 32 values, and an error of the angle
    counts as many times again.
    """
    antipodal = name.endswith((ANTIPODAL, NEAR_ANTIPODAL))
    return 300.0 if antipodal and method in ("slerp", "nuslerp") else 2.0


def _promoted(tensors: list[Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


@pytest.mark.parametrize("case", _with_tensors())
def test_values_are_close_to_those_of_mergekit(case: str, merged: Callable[[str], Path]) -> None:
    tensors = load(merged(case))
    method = cases.config(case)["merge_method"]
    differ = total = 0
    for name, one in EXPECTED[case].tensors.items():
        if name in NOT_WRITTEN.get(case, ()) or (_chooses_elements(case) and not _is_aligned(case, name)):
            continue
        if method == "nuslerp" and name.endswith((f"4.{ANTIPODAL}", f"4.{NEAR_ANTIPODAL}")) and len(one.sources) == 2:
            continue  # mergekit derives the angle from a bf16 cosine, in which -0.999 is -1
        ours = cases.sample(tensors[name], len(one.sample))
        difference = (ours.double() - one.sample.double()).abs()
        size = one.norm / tensors[name].numel() ** 0.5
        allowed = _tolerance(case, method, name, one)
        assert float(difference.square().mean().sqrt()) <= allowed * size, name
        assert abs(float(tensors[name].double().norm()) - one.norm) <= allowed * one.norm, name
        if allowed <= 2.0**-8 and one.dtype != torch.float32:
            assert bool((((rank(ours) - rank(one.sample)).abs() <= 1) | (difference <= 2e-4 * size)).all()), name
            differ += int((difference > 0).sum())
            total += len(ours)
    # Sums with decimal weights are often ties, which may be rounded either way.
    assert differ <= 1 + total // (50 if method == "linear" else 100)


# mergekit rounds the difference, its product with a restored norm, the weight, its product, the sum, the divisor, the
# quotient, its product with lambda and the result to bf16, each by 2^-9, and both norms, by which it divides.
BF16_ROUNDINGS = 11 * 2.0**-9


@pytest.mark.parametrize("case", [case for case in _with_tensors() if _chooses_elements(case)])
def test_every_element_differs_from_mergekit_by_its_rounding_alone(
    case: str, merged: Callable[[str], Path], read: Callable[[str], Tensors]
) -> None:
    tensors, config = load(merged(case)), cases.config(case)
    error = BF16_ROUNDINGS if config["dtype"] == "bfloat16" else 1e-6
    turned = total = 0
    for name, one in EXPECTED[case].tensors.items():
        if _is_aligned(case, name):
            continue
        exact = _chosen(config["merge_method"], name, one, [_input(x, config["dtype"], read) for x in one.sources])
        ours, theirs, wanted, size, margin = (
            cases.sample(tensor, len(one.sample)).double()
            for tensor in (tensors[name], one.sample, exact.exact, exact.size, exact.margin)
        )
        # A vote that its rounding turns gives another sum, of other terms; so does a comparison with a threshold.
        elected = margin > error
        assert bool(((theirs - wanted).abs() <= error * size)[elected].all()), name
        assert bool(((ours - theirs).abs() <= error * size)[elected].all()), name
        rounding = torch.finfo(one.dtype).eps / 2 * wanted.abs() + 2.0**-22 * size
        assert bool(((ours - wanted).abs() <= torch.maximum((theirs - wanted).abs(), rounding)).all()), name
        turned, total = turned + int((~elected).sum()), total + len(theirs)
    assert turned <= 0.15 * total


def _tolerance(case: str, method: str, name: str, one: Recorded) -> float:
    """The error of mergekit's arithmetic, relative to the root mean square of the tensor."""
    if method in BF16_ARITHMETIC:
        return BF16_ERROR
    if one.dtype != torch.float32 or "bfloat16" in str(cases.config(case).get("dtype")):
        return 2.0**-8
    return 1e-4 if name.endswith(NEAR_ANTIPODAL) else 1e-6


@pytest.mark.parametrize(("case", "ignored"), IGNORED.items())
def test_ignored_entries_give_a_warning(case: str, ignored: tuple[str, ...], models: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(cases.config_text(case, models))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        arcmerge.merge(tmp_path / "recipe.yml", tmp_path / "out")
    sentences = [str(warning.message) for warning in caught]
    assert len(sentences) == len(ignored)
    assert all(any(name in sentence for sentence in sentences) for name in ignored)


# Results that mergekit does not have, derived from the inputs.


def test_a_model_with_itself_is_a_copy(merged: Callable[[str], Path], read: Callable[[str], Tensors]) -> None:
    assert_same_bits(load(merged("slerp-same-model-twice")), read("gemma-a"))


def test_a_slice_of_one_source_is_copied(merged: Callable[[str], Path], read: Callable[[str], Tensors]) -> None:
    found, both, b = load(merged("slerp-single-source-slice")), load(merged("slerp-models")), read("gemma-b")
    from_b = {k for k in b if k == tiny.NORM or k.startswith(("model.layers.3", "model.layers.4", "model.layers.5"))}
    assert_same_bits(found, {name: b[name] if name in from_b else both[name] for name in b})


def test_a_slice_of_no_layers_gives_the_final_norm(
    merged: Callable[[str], Path], read: Callable[[str], Tensors]
) -> None:
    expected = {**load(merged("slerp-models")), tiny.NORM: read("gemma-b")[tiny.NORM]}
    assert_same_bits(load(merged("slerp-zero-length-tail")), expected)


def test_shards_need_no_index(models: Path, merged: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = cases.config_text("shards-without-index", models).replace("deep-p-sharded-without-index", "deep-p")
    (tmp_path / "recipe.yml").write_text(recipe)
    arcmerge.merge(tmp_path / "recipe.yml", tmp_path / "out")
    assert_same_bits(load(merged("shards-without-index")), load(tmp_path / "out"))


def test_without_a_base_the_first_model_gives_config_and_tokenizer(merged: Callable[[str], Path]) -> None:
    """mergekit picks one by the hash of its name, which differs between processes."""
    generation = json.loads((merged("linear-three") / "generation_config.json").read_text())
    assert generation["_name_or_path"] == "gemma-b"


def test_generation_config_is_the_base_models(merged: Callable[[str], Path]) -> None:
    for case, base in {"slerp-base-is-second": "gemma-b", "vocabulary-union": "gemma-a"}.items():
        assert json.loads((merged(case) / "generation_config.json").read_text())["_name_or_path"] == base


@pytest.mark.parametrize(
    ("case", "layers"), {"slerp-models": 6, "depth-deeper-slerp": 8, "depth-stack": 8, "depth-stack-qwen2": 5}.items()
)
def test_the_result_runs_in_transformers(case: str, layers: int, merged: Callable[[str], Path]) -> None:
    model, tokenizer = _transformers(merged(case))
    assert model.config.num_hidden_layers == len(model.model.layers) == layers
    if model.config.model_type == "gemma2":
        assert model.config.layer_types == ["sliding_attention", "full_attention"] * (layers // 2)
    logits = model(torch.tensor([tokenizer("the tale of a stone").input_ids])).logits
    assert logits.shape[-1] == 320
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(
    ("case", "rows", "tied"),
    [("head-tied-untied", 320, False), ("head-spurious", 320, True), ("vocabulary-padded", 384, True)],
)
def test_the_head_is_tied_as_the_config_says(case: str, rows: int, tied: bool, merged: Callable[[str], Path]) -> None:
    model, _ = _transformers(merged(case))
    tensors = load(merged(case))
    assert torch.equal(model.lm_head.weight.bfloat16(), tensors[tiny.EMBEDDING if tied else tiny.HEAD])
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    assert len(model.lm_head.weight) == rows


def _transformers(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model.eval(), AutoTokenizer.from_pretrained(folder)
