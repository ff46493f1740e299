"""Checks of a merge of two tiny checkpoints of any architecture; each failure is one sentence."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

import architectures
import arcmerge
from architectures import Kind

torch.set_num_threads(1)

_LOADING = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
# Keys that transformers writes about the file and not about the network.
_ABOUT_THE_FILE = {"_name_or_path", "transformers_version"}
# Attributes that the code of a network derives from the index of a layer or from the depth: DiffLlama's,
# BigBird's, Gemma 4's, MiniCPM 3's.
_BY_NUMBER = re.compile(r"layer|_idx$|^(?:lambda_init|seed|store_full_length_kv|residual_scale)$")
# Families whose attention alternates by the index of the layer.
_ALTERNATING = ("gemma2", "gemma3", "gemma3_text")
_OTHER_LISTS = re.compile(r"architectures$|_ids$|languages$|vision|audio")
_PATHS = re.compile(r"/\S*(/[ab]\b)")
_HEADER = """# Architectures

Tiny models of every architecture that transformers {version} can build, two of a kind with random weights, merged by
`make architectures`: `slerp` at t = 0, 0.5 and 1, and a `passthrough` of the layers 0 to 3 and 1 to 3 again. Merged
means: at the ends every tensor is the parent's and so are the logits; config.json says what the weights are;
transformers loads the result without a missing, unexpected or mismatched key, and runs it; every layer of the deeper
model is set as the layer that it descends from, where Gemma-2 and Gemma-3 do not alternate by position; every tensor of
the parents is in the result or named.

{counts}

"""


Loading = dict[str, Any]
# Plain attributes of every module, by its name.
Settings = dict[str, dict[str, Any]]


@dataclass
class Outcome:
    """The result for one architecture. remarks: failed checks; refused: the message of a merge that was refused."""

    remarks: list[str] = field(default_factory=list)
    refused: str | None = None
    refused_depth: str | None = None
    told: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.remarks:
            return "wrong"
        if self.refused:
            return "refused"
        return "merged, other depths refused" if self.refused_depth else "merged"


class Loaded(NamedTuple):
    model: Any
    loading: Loading


def examine(kind: Kind, model_type: str, folder: Path) -> Outcome:
    """Merge two tiny models of an architecture at both ends, in the middle and in slices, and check the results."""
    outcome = Outcome()
    folder.mkdir(exist_ok=True)
    parents = architectures.write(kind, model_type, folder)
    tokens = architectures.tokens(model_type)
    own = [_load(parent) for parent in parents]
    settings = _settings(own[0].model)  # a forward pass may change them
    logits = [_output(one.model, tokens) for one in own]
    try:
        for t, like in ((0.0, 0), (1.0, 1), (0.5, None)):
            out = folder / f"t{t}"
            outcome.told = _merge(_slerp(parents, t), out)
            outcome.remarks += _compare_files(out, parents, like, outcome.told)
            if like is None:
                outcome.remarks += _compare_form(out, folder / "t0.0")
            else:
                outcome.remarks += _compare_model(out, "AB"[like], own[0].loading, tokens, logits[like])
    except arcmerge.ArcmergeError as error:
        outcome.refused = str(error)
    else:
        _examine_depth(parents[0], own[0].loading, settings, folder / "deep", tokens, outcome)
    return outcome


def _examine_depth(
    parent: Path, loading: Loading, settings: Settings, out: Path, tokens: Any, outcome: Outcome
) -> None:
    layers = [*range(architectures.DEPTH), *range(1, architectures.DEPTH)]
    ranges = ([first, architectures.DEPTH] for first in (0, 1))
    slices = [{"sources": [{"model": str(parent), "layer_range": one}]} for one in ranges]
    try:
        said = _merge({"slices": slices, "merge_method": "passthrough"}, out)
    except arcmerge.ArcmergeError as error:
        outcome.refused_depth = str(error)
        return
    alternating = _json(parent)["model_type"] in _ALTERNATING
    remarks = [*_lost(out, [parent], said), *_compare_layers(out, parent, layers)]
    if not alternating:
        remarks += _compare_lists(_json(parent), _json(out), layers)
    try:
        deep = _load(out)
        remarks += _loading_remarks(deep.loading, loading, numbered=True)
        if not alternating:
            remarks += _compare_settings(_settings(deep.model), settings, layers)
        _output(deep.model, tokens)
    except Exception as error:  # whatever transformers raises is a remark
        remarks.append(f"does not load and run: {_first_line(error)}")
    outcome.remarks += [f"deeper: {remark}" for remark in remarks]


def _slerp(parents: tuple[Path, Path], t: float) -> dict[str, Any]:
    a, b = map(str, parents)
    return {
        "models": [{"model": a}, {"model": b}],
        "merge_method": "slerp",
        "base_model": a,
        "parameters": {"t": t},
    }


def _merge(recipe: dict[str, Any], out: Path) -> list[str]:
    """The warnings of a merge."""
    said: list[str] = []
    report = arcmerge.merge(recipe, out, warn=said.append, threads=1)
    return [*said, str(report)]


def _load(path: Path) -> Loaded:
    """A model as transformers loads it, and its report about the keys."""
    cls = getattr(architectures.transformers, _json(path)["architectures"][0])
    with _quiet():
        model, loading = cls.from_pretrained(path, output_loading_info=True, local_files_only=True)
    return Loaded(model.eval(), loading)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _output(model: Any, tokens: Any) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head."""
    torch.manual_seed(0)
    with torch.inference_mode(), _quiet():
        result = model(**tokens(model))
    found = getattr(result, "logits", None)
    if found is None:
        found = result.last_hidden_state
    return found.float()


def _compare_files(out: Path, parents: tuple[Path, Path], like: int | None, said: list[str]) -> list[str]:
    remarks = _lost(out, parents, said)
    if changed := _changed(_json(parents[0]), _json(out)):
        remarks.append(f"config.json: {changed}")
    if like is not None:
        theirs, ours = _tensors(parents[like]), _tensors(out)
        beside = _beside(theirs, ours, _tensors(parents[0]), like)
        named = "\n".join(said)
        differing = [name for name in ours if not _same(theirs.get(name), ours[name]) and name not in beside]
        if differing:
            remarks.append(f"t={like}: not {'AB'[like]}'s: {_some(differing)}")
        if silent := [name for name in beside if not _named(name, named)]:
            remarks.append(f"t={like}: of the base without a word: {_some(silent)}")
    return remarks


def _beside(theirs: Any, ours: Any, base: Any, like: int) -> list[str]:
    """Tensors that are copied from the base model although t = 1 asks for the other model's."""
    if like == 0:
        return []
    return [name for name in ours if not _same(theirs.get(name), ours[name]) and _same(base.get(name), ours[name])]


def _lost(out: Path, parents: Any, said: list[str]) -> list[str]:
    """Tensors of the parents that are neither in the output nor named."""
    ours = _tensors(out)
    named = "\n".join(said)
    lost = [name for parent in parents for name in _tensors(parent) if name not in ours and not _named(name, named)]
    return [f"vanished in silence: {_some(dict.fromkeys(lost))}"] if lost else []


def _named(name: str, text: str) -> bool:
    """Whether a text names a tensor or the part of the network that contains it."""
    parts = name.split(".")
    prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)] + [parts[-1], ".".join(parts[-2:])]
    return any(re.search(rf"(?<![\w]){re.escape(prefix)}(?![\w])", text) for prefix in prefixes if prefix != "model")


def _compare_model(out: Path, letter: str, own: Loading, tokens: Any, logits: torch.Tensor) -> list[str]:
    """The merge at an end loads as its model does and computes the same."""
    try:
        found = _load(out)
        got = _output(found.model, tokens)
    except Exception as error:  # whatever transformers raises is a remark
        return [f"does not load and run: {_first_line(error)}"]
    remarks = _loading_remarks(found.loading, own)
    if got.shape != logits.shape or not torch.equal(got.nan_to_num(), logits.nan_to_num()):
        remarks.append(f"logits are not those of {letter}")
    return remarks


def _compare_form(out: Path, end: Path) -> list[str]:
    """The merge in the middle has the tensors of the merge at an end, which was loaded."""
    ours, theirs = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in _tensors(path).items()} for path in (out, end)
    )
    return [f"t=0.5: other tensors than at t=0: {_some(dict(ours.items() ^ theirs.items()))}"] if ours != theirs else []


def _loading_remarks(loading: Loading, own: Loading, *, numbered: bool = False) -> list[str]:
    """The warnings of reloading that the model itself does not give. numbered: in any layer."""
    remarks = []
    for kind in _LOADING:
        before, after = (
            {_unnumbered(key) if numbered else key: key for key in map(str, one.get(kind, ()))}
            for one in (own, loading)
        )
        if new := sorted(after[key] for key in after.keys() - before.keys()):
            remarks.append(f"{kind} {_some(new)}")
    return remarks


def _changed(donor: Any, ours: Any, path: str = "") -> str:
    """The differences between two configurations."""
    found = []
    for key in sorted(set(donor) | set(ours)):
        if key in _ABOUT_THE_FILE:
            continue
        before, after = donor.get(key, "absent"), ours.get(key, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            if inner := _changed(before, after, f"{path}{key}."):
                found.append(inner)
        elif before != after:
            found.append(f"{path}{key} {before!r:.60} became {after!r:.60}")
    return ", ".join(found)


def _compare_layers(out: Path, parent: Path, layers: list[int]) -> list[str]:
    """Every tensor of a layer is that of its source layer."""
    theirs, ours = _tensors(parent), _tensors(out)
    new = {match["prefix"] for name in ours if name not in theirs and (match := _numbered(name))}
    wrong = []
    for name, tensor in ours.items():
        match = _numbered(name)
        origin = name
        if match and match["prefix"] in new and int(match["number"]) < len(layers):
            origin = f"{match['prefix']}{layers[int(match['number'])]}.{match['rest']}"
        if not _same(theirs.get(origin), tensor):
            wrong.append(name)
    remarks = [f"not those of the parent's layers: {_some(wrong)}"] if wrong else []
    if not new and len(set(layers)) != len(layers):
        remarks.append("no layer was added")
    return remarks


def _compare_lists(before: dict[str, Any], after: dict[str, Any], layers: list[int]) -> list[str]:
    """Lists of config.json with an entry for each layer still have one, that of its source layer."""
    remarks = []
    now = dict(_lists(after))
    for path, value in _lists(before):
        if len(value) != architectures.DEPTH or _OTHER_LISTS.search(path):
            continue
        if value == list(range(len(value))):  # not entries of layers but the numbers of all of them
            continue
        if len(now[path]) != len(layers):
            remarks.append(f"config.json: {path} has {len(now[path])} entries for {len(layers)} layers")
        elif now[path] != (want := [value[layer] for layer in layers]):
            remarks.append(f"config.json: {path} is {now[path]}, the layers were {want}")
    return remarks


def _lists(config: dict[str, Any], path: str = "") -> Iterator[tuple[str, list[Any]]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _lists(value, f"{path}{key}.")
        elif isinstance(value, list):
            yield path + key, value


def _settings(model: Any) -> Settings:
    return {
        name: {
            "class": type(module).__name__,
            **{
                key: value
                for key, value in vars(module).items()
                if isinstance(value, int | float | str | tuple | None) and not _BY_NUMBER.search(key)
            },
        }
        for name, module in model.named_modules()
    }


def _compare_settings(ours: Settings, theirs: Settings, layers: list[int]) -> list[str]:
    """The modules of a layer have the attributes of those of its source layer."""
    new = {match["prefix"] for name in ours if name not in theirs and (match := _numbered(f"{name}."))}
    differing: list[str] = []
    for name, settings in ours.items():
        match = _numbered(f"{name}.")
        if not match or match["prefix"] not in new or int(match["number"]) >= len(layers):
            continue
        origin = theirs.get(f"{match['prefix']}{layers[int(match['number'])]}.{match['rest']}".rstrip("."), {})
        if changed := _changed(origin, settings):
            differing.append(f"{name}.{changed}")
    return [f"layers compute other things: {_some(differing)}"] if differing else []


def _numbered(name: str) -> re.Match[str] | None:
    return re.match(r"^(?P<prefix>(?:[^.]+\.)*?)(?P<number>[0-9]+)\.(?P<rest>.*)$", name)


def _unnumbered(name: str) -> str:
    return re.sub(r"\.[0-9]+\.", ".N.", name)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _json(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def table(outcomes: dict[str, Outcome | str]) -> str:
    """docs/architectures.md: the result for each architecture."""
    rows = ["| class | model type | whole models | another depth |", "|---|---|---|---|"]
    for name, outcome in outcomes.items():
        kind, model_type = name.split("/")
        if isinstance(outcome, str):
            cells = [f"not tried: {outcome}", ""]
        elif outcome.remarks:
            cells = ["**wrong**: " + "; ".join(outcome.remarks), ""]
        else:
            cells = [_cell(outcome.refused), "" if outcome.refused else _cell(outcome.refused_depth)]
        rows.append(f"| {kind} | {model_type} | {cells[0]} | {cells[1]} |")
    verdicts = Counter("not tried" if isinstance(one, str) else one.verdict for one in outcomes.values())
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return _HEADER.format(version=architectures.transformers.__version__, counts=counts) + "\n".join(rows) + "\n"


def _cell(refusal: str | None) -> str:
    if not refusal:
        return "merged"
    return "refused: " + _PATHS.sub(r"\1", refusal.splitlines()[0]).removeprefix("/a: ").replace("|", "\\|")
