"""config.json of the result: the donor's, with what the merge has changed. It has the keys of the donor and no other.

The exceptions are keys without which a loader would build another network than the weights are of: `num_hidden_layers`
where the donor leaves its depth to a default and the merge has another, `tie_word_embeddings` where it leaves that to a
default and the merge has made or left out the head, `vocab_size` where it does so and the rows are others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import repeat
from typing import Any

from arcmerge.dtypes import DType
from arcmerge.merging.plan.config_layers import KINDS, at, change_layers, claimed_depths, levels

_DEPTH = re.compile("layers?(_num|_count)?$|blocks?$|depth")
_SLIDING, _FULL = "sliding_attention", "full_attention"


def output_config(
    donor: Mapping[str, Any],
    source_layers: Sequence[int],
    *,
    dtype: DType,
    models: Sequence[Mapping[str, Any]] | None = None,
    depth: int | None = None,
    vocab_size: int | None = None,
    tied: bool | None = None,
) -> dict[str, Any]:
    """The configuration of a checkpoint whose weights are stored as `dtype`.

    source_layers: for each layer of the result the layer it descends from, of which it keeps what config.json says.
    models: the configuration of the model of each of these, None for the donor's. depth: layers that the donor has,
    None for as many as it claims. vocab_size: rows of the embedding, None for as many as the donor's. tied: whether
    the head is the embedding, None for as the donor says.
    """
    config = deepcopy({key: value for key, value in donor.items() if key != "_name_or_path"})
    claimed = claimed_depths(donor)
    depth = depth or next(iter(claimed.values()), len(source_layers))
    decoders = []
    for path in levels(donor):
        sources = [(at(model, path), n) for model, n in zip(models or repeat(donor), source_layers, strict=False)]
        decoders.append(decoder := at(config, path))
        decoder.update(change_layers(at(donor, path), depth, sources).values)
        if "layer_types" in decoder and list(source_layers) != list(range(depth)):
            _alternate(decoder, len(source_layers))
    if not claimed and len(source_layers) != depth:
        _set_unclaimed_depth(decoders[-1], depth, len(source_layers))
    if vocab_size is not None:
        _set(decoders, ("vocab_size", "padded_vocab_size"), vocab_size)
        if not any("vocab_size" in decoder for decoder in decoders):
            decoders[-1]["vocab_size"] = vocab_size
    if tied is not None:
        _set(decoders, ("tie_word_embeddings",), tied)
        if not any("tie_word_embeddings" in decoder for decoder in decoders):
            config["tie_word_embeddings"] = tied
    for entries in _objects(config):
        typed = [key for key in ("dtype", "torch_dtype") if entries.get(key) is not None or entries is config]
        _set([entries], typed, dtype.name)
    return config


def _set(objects: Iterable[dict[str, Any]], keys: Sequence[str], value: Any) -> None:
    """Set those of `keys` that an object has."""
    for entries in objects:
        entries.update((key, value) for key in keys if key in entries)


def _objects(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration and those of its parts, towers included: all weights are stored by one recipe."""
    yield config
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield from _objects(value)


def _set_unclaimed_depth(decoder: dict[str, Any], depth: int, new: int) -> None:
    """Of a donor that has none of the usual keys: any that speaks of as many layers; or a list that has an entry for
    each, as with Nemotron-H, has been set by then; else the donor left its depth to the default of its class.
    """
    keys = [key for key, value in decoder.items() if _DEPTH.search(key) and type(value) is int and value == depth]
    decoder.update(dict.fromkeys(keys, new))
    if not keys and not any(isinstance(decoder.get(key), list) and len(decoder[key]) == new for key in KINDS):
        decoder["num_hidden_layers"] = new


def _alternate(decoder: dict[str, Any], depth: int) -> None:
    """Gemma 2 and 3: every n-th layer attends to everything and the others to a window, by position.

    Runtimes that do not read `layer_types` derive it from the layer's number, so the list must agree with them.
    """
    match decoder.get("model_type"):
        case "gemma2":
            n = 2
        case "gemma3" | "gemma3_text":
            patterns = (decoder.get("sliding_window_pattern"), decoder.get("_sliding_window_pattern"), 6)
            n = next(value for value in patterns if isinstance(value, int) and value > 0)
        case _:
            return
    decoder["layer_types"] = [_SLIDING if (i + 1) % n else _FULL for i in range(depth)]
