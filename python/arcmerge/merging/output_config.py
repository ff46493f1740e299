"""config.json of the result: the donor's, with what the merge has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arcmerge.dtypes import DType

_SLIDING, _FULL = "sliding_attention", "full_attention"


def output_config(
    donor: Mapping[str, Any],
    source_layers: Sequence[int],
    *,
    dtype: DType,
    models: Sequence[Mapping[str, Any]] | None = None,
    vocab_size: int | None = None,
    tied: bool | None = None,
) -> dict[str, Any]:
    """The configuration of a checkpoint whose weights are stored as `dtype`.

    source_layers: for each layer of the result the layer it descends from, whose entries it keeps in lists that have
    one for each layer. models: the configuration of the model of each of these, None for the donor's.
    vocab_size: rows of the embedding, None for as many as the donor's. tied: whether the head is the embedding, None
    for as the donor says.
    """
    config = {key: value for key, value in donor.items() if key != "_name_or_path"}
    # A model for text and images keeps the settings of its decoder one level down.
    nested = "text_config" in config
    decoder = dict(config["text_config"]) if nested else config
    sources = models if models is not None else [donor] * len(source_layers)
    _set_layers(decoder, [(_decoder(model), layer) for model, layer in zip(sources, source_layers, strict=True)])
    if vocab_size is not None:
        decoder["vocab_size"] = vocab_size
    if nested:
        config["text_config"] = decoder
    for level in {id(config): config, id(decoder): decoder}.values():
        for key in ("dtype", "torch_dtype"):
            if key in level:
                level[key] = dtype.name
        if tied is not None and "tie_word_embeddings" in level:
            level["tie_word_embeddings"] = tied
    # Where the donor is silent: the names that every release of transformers reads.
    if "dtype" not in config:
        config.setdefault("torch_dtype", dtype.name)
    if tied is not None:
        config["tie_word_embeddings"] = tied
    return config


def _decoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    decoder: Mapping[str, Any] = config.get("text_config", config)
    return decoder


def _set_layers(config: dict[str, Any], sources: Sequence[tuple[Mapping[str, Any], int]]) -> None:
    depth = config.get("num_hidden_layers", len(sources))
    config["num_hidden_layers"] = len(sources)
    if [layer for _, layer in sources] == list(range(depth)):
        return
    for key, value in config.items():
        if isinstance(value, list) and len(value) == depth and _is_per_layer(key):
            config[key] = [_entry(model.get(key), layer, value) for model, layer in sources]
    if "layer_types" in config and (pattern := _full_attention_every(config)):
        config["layer_types"] = [_SLIDING if (i + 1) % pattern else _FULL for i in range(len(sources))]


def _entry(own: Any, layer: int, donors: Sequence[Any]) -> Any:
    """The entry of a layer in its own model's list, or in the donor's, over and over, where that model has none."""
    return own[layer] if isinstance(own, list) and layer < len(own) else donors[layer % len(donors)]


def _is_per_layer(key: str) -> bool:
    """Whether a list as long as the network is deep has an entry for each layer, and not by chance."""
    return key != "architectures" and not key.endswith(("_token_id", "_ids"))


def _full_attention_every(config: Mapping[str, Any]) -> int | None:
    """n where every n-th layer attends to everything and the others to a window, by position whatever the weights.

    Runtimes that do not read `layer_types` derive it from the layer's number, so the list must agree with them.
    """
    match config.get("model_type"):
        case "gemma2":
            return 2
        case "gemma3" | "gemma3_text":
            return int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    return None
