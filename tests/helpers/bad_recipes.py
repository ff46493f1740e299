"""Broken recipes, and the words that the message of each must have. tests/merging/test_bad_input.py runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

import tiny

Recipe = dict[str, Any]


@dataclass(frozen=True)
class Bad:
    """One case. recipe: a mapping or the text of recipe.yml; spoil: what to break in the working folder."""

    words: tuple[str, ...]
    recipe: Recipe | str | None = None
    spoil: Callable[[], object] = lambda: None
    call: tuple[str, ...] = ("merge", "recipe.yml", "out")
    code: int = 1


def recipe(**changes: Any) -> Recipe:
    """The recipe that works, with keys replaced, or left out where the value is None."""
    works = {
        "merge_method": "slerp",
        "base_model": "models/llama-a",
        "models": [{"model": "models/llama-a"}, {"model": "models/llama-b"}],
        "parameters": {"t": 0.3},
        "dtype": "bfloat16",
    }
    return {key: value for key, value in {**works, **changes}.items() if value is not None}


def models(*names: str, **parameters: float) -> list[Recipe]:
    return [{"model": f"models/{name}", **({"parameters": parameters} if parameters else {})} for name in names]


def sliced(*ranges: Any) -> Recipe:
    """llama-a and llama-b in one slice, each with its layer_range."""
    sources = [{"model": f"models/llama-{name}", "layer_range": r} for name, r in zip("ab", ranges, strict=True)]
    return recipe(models=None, slices=[{"sources": sources}])


def of_gemma(partner: str, **changes: Any) -> Recipe:
    return recipe(base_model="models/gemma-a", models=models("gemma-a", partner), **changes)


def three(method: str, base: str | None = "models/llama-a", **parameters: float) -> Recipe:
    of_three = models("llama-a", "llama-b", "llama-c", **parameters)
    return recipe(merge_method=method, base_model=base, models=of_three)


RECIPES = {
    "empty": Bad(("recipe", "merge_method"), ""),
    "no-yaml": Bad(("YAML", "line 1"), "merge_method: [slerp"),
    "a-list": Bad(("recipe", "mapping"), "- slerp"),
    "two-documents": Bad(("YAML", "one"), "merge_method: slerp\n---\nmerge_method: linear\n"),
    "key-twice": Bad(("dtype", "twice"), yaml.safe_dump(recipe()) + "dtype: float32\n"),
    "no-method": Bad(("merge_method",), recipe(merge_method=None)),
    "method-misspelt": Bad(("'slrep'", "mean `slerp`"), recipe(merge_method="slrep")),
    "method-unknown": Bad(("'quantize'", "slerp", "linear"), recipe(merge_method="quantize")),
    "density-in-percent": Bad(
        ("parameters.density", "50", "0.5"), recipe(merge_method="ties", parameters={"weight": 1, "density": 50})
    ),
    "density-not-a-number": Bad(
        ("parameters.density", "nan"), recipe(merge_method="dare_ties", parameters={"weight": 1, "density": ".nan"})
    ),
    "epsilon-above-density": Bad(
        ("'epsilon'", "0.15", "0.1"), recipe(merge_method="della", parameters={"weight": 1, "density": 0.1})
    ),
    "trimmed-without-base": Bad(
        ("'breadcrumbs'", "base_model"), recipe(merge_method="breadcrumbs", base_model=None, parameters={"weight": 1})
    ),
    "nothing-to-merge": Bad(("models", "slices", "modules"), recipe(models=None)),
    "models-and-slices": Bad(("models", "slices"), {**sliced([0, 3], [0, 3]), "models": models("llama-a", "llama-b")}),
    "no-models-listed": Bad(("models",), recipe(models=[])),
    "model-left-out": Bad(("models[1]", "model"), recipe(models=[{"model": "models/llama-a"}, {"weight": 1}])),
    "model-is-a-number": Bad(("models[1]", "7"), recipe(models=[{"model": "models/llama-a"}, {"model": 7}])),
    "slerp-of-three": Bad(("slerp", "1", "2"), three("slerp")),
    "no-base": Bad(("slerp", "base_model"), recipe(base_model=None)),
    "base-not-in-slice": Bad(("base_model", "llama-c"), {**sliced([0, 3], [0, 3]), "base_model": "models/llama-c"}),
    "t-missing": Bad(("'t'",), recipe(parameters=None)),
    "t-without-fallback": Bad(("'t'", tiny.EMBEDDING), recipe(parameters={"t": [{"filter": "mlp", "value": 0.5}]})),
    "t-under-a-model": Bad(("'t'",), recipe(parameters=None, models=models("llama-a", "llama-b", t=0.3))),
    "t-is-a-word": Bad(("parameters.t", "half"), recipe(parameters={"t": "half"})),
    "t-is-null": Bad(("parameters.t",), "\n".join([yaml.safe_dump(recipe(parameters=None)), "parameters: {t: null}"])),
    "t-is-empty": Bad(("parameters.t",), recipe(parameters={"t": []})),
    "t-is-nan": Bad(("parameters.t", "nan"), recipe(parameters={"t": float("nan")})),
    "gradient-with-a-word": Bad(("parameters.t", "high"), recipe(parameters={"t": [0, "high", 1]})),
    "filter-without-value": Bad(("parameters.t", "value"), recipe(parameters={"t": [{"filter": "mlp"}]})),
    "dtype-unknown": Bad(("dtype", "bf16", "bfloat16"), recipe(dtype="bf16")),
    "dtype-not-mergeable": Bad(("dtype", "int8", "bfloat16"), recipe(dtype="int8")),
    "out-dtype-unknown": Bad(("out_dtype", "fp8", "bfloat16"), recipe(out_dtype="fp8")),
    "layers-beyond-depth": Bad(("layer_range", "9", "3"), sliced([0, 9], [0, 9])),
    "layers-backwards": Bad(("layer_range", "2", "1"), sliced([2, 1], [2, 1])),
    "layers-negative": Bad(("layer_range", "-1"), sliced([-1, 2], [-1, 2])),
    "layers-of-one-number": Bad(("layer_range",), sliced([3], [3])),
    "layers-in-words": Bad(("layer_range", "all"), sliced("all", "all")),
    "layers-left-out": Bad(("layer_range",), recipe(models=None, slices=[{"sources": models("llama-a", "llama-b")}])),
    "slices-of-unequal-length": Bad(("2", "3"), sliced([0, 3], [0, 2])),
    "slice-without-sources": Bad(("sources",), recipe(models=None, slices=[{"layer_range": [0, 3]}])),
    "unknown-module": Bad(
        ("vision", "default"), recipe(models=None, modules={"vision": {"models": models("llama-a")}})
    ),
    "two-tokenizer-settings": Bad(
        ("tokenizer", "tokenizer_source"), recipe(tokenizer_source="base", tokenizer={"source": "union"})
    ),
    "tokenizer-of-nobody": Bad(("./absent",), recipe(tokenizer_source="./absent")),
    "token-of-nobody": Bad(
        ("<bos>", "./absent"),
        recipe(tokenizer={"source": "base", "tokens": {"<bos>": {"source": "./absent", "force": True}}}),
    ),
    "token-source-unknown": Bad(
        ("<bos>", "kind"), recipe(tokenizer={"source": "base", "tokens": {"<bos>": {"source": {"kind": "mean"}}}})
    ),
    "padding-of-nothing": Bad(
        ("pad_to_multiple_of", "0"), recipe(tokenizer={"source": "base", "pad_to_multiple_of": 0})
    ),
    "chat-template-unknown": Bad(("chat_template", "gemmma", "chatml"), recipe(chat_template="gemmma")),
    "weight-missing": Bad(("'weight'",), recipe(merge_method="linear")),
    "weights-add-up-to-zero": Bad(
        ("normalize", "0"),
        recipe(merge_method="linear", models=models("llama-a", weight=1) + models("llama-b", weight=-1)),
    ),
    "model-stock-of-two": Bad(("model_stock", "2"), recipe(merge_method="model_stock", parameters=None)),
    "nearswap-of-three": Bad(("nearswap", "1", "2"), three("nearswap")),
    "nuslerp-of-three": Bad(("nuslerp", "3"), three("nuslerp", base=None, weight=1)),
    "passthrough-of-two": Bad(("passthrough", "2"), recipe(merge_method="passthrough", base_model=None)),
    "aliases-that-multiply": Bad(
        ("YAML", "1,000,000", "aliases"),
        "z: [&a [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]"
        + "".join(f", &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefg", "bcdefgh", strict=True))
        + "]\nmerge_method: *h\n",
    ),
    "alias-of-itself": Bad(("YAML", "line 1", "itself"), "merge_method: &a [*a]\n"),
    "python-object": Bad(("YAML", "python/object"), "merge_method: !!python/object/apply:os.getcwd []\n"),
    "model-name-of-two-lines": Bad((r"a\nb",), recipe(base_model="a\nb")),
    "lora-adapter": Bad(
        ("LoRA", "models/llama-b+some/adapter"), recipe(models=models("llama-a", "llama-b+some/adapter"))
    ),
}
