"""config.json of the result: the donor's, changed where the merge changes the network.

The result has the keys of the donor and no others, except for keys without which a loader would build a network that
does not fit the weights: `num_hidden_layers`, `tie_word_embeddings` and `vocab_size`, if the donor leaves them to a
default and the merge changes the value.
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
    """Make config.json of the result.

    Args:
        donor: config.json of the donor.
        source_layers: for each layer of the result the index of the layer it comes from, whose entries it keeps.
        dtype: dtype of the stored weights.
        models: config.json of the model of each source layer; None if all are of the donor.
        depth: number of layers of the donor; None for the number in its config.json.
        vocab_size: number of rows of the embedding; None for that of the donor.
        tied: whether the head is the embedding; None for the donor's entry.
    """
    config = deepcopy({key: value for key, value in donor.items() if key != "_name_or_path"})
    claimed = claimed_depths(donor)
    depth = depth or next(iter(claimed.values()), len(source_layers))
    decoders = []
    for path in levels(donor):
        sources = [(at(model, path), i) for model, i in zip(models or repeat(donor), source_layers, strict=False)]
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
    """Set the keys of `keys` that an object has."""
    for entries in objects:
        entries.update((key, value) for key in keys if key in entries)


def _objects(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration and those of its parts, including towers: one recipe decides the dtype of all weights."""
    yield config
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield from _objects(value)


def _set_unclaimed_depth(decoder: dict[str, Any], depth: int, new: int) -> None:
    """Set the number of layers for a donor without any of the usual keys.

    Other keys with a matching name and value are set. If there are none, and no list has an entry for each layer (as in
    Nemotron-H), the donor has the default number of its class, and `num_hidden_layers` is added.
    """
    keys = [key for key, value in decoder.items() if _DEPTH.search(key) and type(value) is int and value == depth]
    decoder.update(dict.fromkeys(keys, new))
    if not keys and not any(isinstance(decoder.get(key), list) and len(decoder[key]) == new for key in KINDS):
        decoder["num_hidden_layers"] = new


def _alternate(decoder: dict[str, Any], depth: int) -> None:
    """Set `layer_types` of Gemma 2 and 3, in which every n-th layer has full attention and the others a window.

    Runtimes that do not read `layer_types` derive the type from the layer's index, so the list must agree with that.
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
