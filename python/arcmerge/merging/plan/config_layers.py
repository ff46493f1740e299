"""The entries of config.json about layers: their number, and the kind of each.

A result with other layers than the donor has the same keys as the donor, with values that describe each layer as the
config.json of its own model does. A layer that a key cannot describe is a problem.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

Settings = Mapping[str, Any]
Level = TypeVar("Level", bound=Settings)
Kinds = tuple[Sequence[object], Sequence[object]]

DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
    "n_blocks",
    "num_transformer_layers",
    "num_transformer_blocks",
    "num_hidden_groups",  # ALBERT, whose layers share the weights of a group
    "layers",
)
# Sections with the settings of the decoder in models for several media.
_SECTIONS = ("text_config", "llm_config", "language_config", "language_model_config", "thinker_config", "vlm_config")
_PREDICTED = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")

# "The first n layers are ...": dense in a mixture of experts, or with full attention in a model with sliding windows.
_FIRST = (
    "first_k_dense_replace",
    "num_dense_layers",
    "n_dense_layers",
    "moe_layer_start_index",
    "moe_layer_num_skipped",
    "max_window_layers",
)
# The depth of the encoder that a decoder was trained with. Runtimes size the cache of a decoder without encoder by it.
_ENCODER_DEPTHS = {"encoder_layers": "decoder_layers", "num_encoder_layers": "num_decoder_layers"}
# Keys that scale a layer by its index or by the number of layers, and model types whose code does so without a key.
_SCALED = ("scale_depth", "scale_attn_by_inverse_layer_idx")
_SCALED_BY_CODE = ("diffllama",)
# Ranges of layers that are run repeatedly.
_FIXED = ("loop_layer_index_start", "loop_layer_index_end", "n_recurrent_layers")
# "Every n-th layer is ...", by the index of the layer.
_EVERY = re.compile(
    r"_every_n_layers$|_layer_period$|_layer_interval$|_layer_step$|_sparse_step$|_attention_interval$"
    r"|^_?sliding_window_pattern$|^layer_group_size$|^n_layers_per_|^moe_layer_freq$"
)
# Keys of `_EVERY` whose kinds of layers have the same tensors.
_SAME_TENSORS = re.compile(r"window|global_attn|rope")
# "Layers 2, 5 and 8 are ...".
_INDICES = re.compile(r"(?:^|_)layers?(?:_|$)|_idxs$|_indices$|_indexes$|^slstm_at$")
KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_layers")
# Keys of feed-forward networks, and the lists that runtimes read instead of them; other lists are about attention.
_FEED_FORWARD = re.compile("sparse|moe|expert|dense")
_FEED_FORWARD_LISTS = ("mlp_layer_types", "moe_layers", "moe_layer_freq")
_SPARSE_STEP, _DENSE_LAYERS = "decoder_sparse_step", "mlp_only_layers"
_NOT_OF_LAYERS = re.compile(r"token|_ids?$(?<!layer_ids)|vision|visual|image|audio|^mtp_|^architectures$")


@dataclass(frozen=True)
class Change:
    """The changes to one level of config.json.

    Args:
        values: new values by key.
        problems: keys that no value makes right, each as (key, rule, got) for the message "'key' must rule, got got".
        warnings: sentences about keys whose effect changes.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def levels(config: Settings) -> list[tuple[str, ...]]:
    """The paths of the objects in config.json that may describe the decoder, from the outermost."""
    found: list[tuple[str, ...]] = [()]
    level: Any = config
    while key := next((key for key in _SECTIONS if isinstance(level.get(key), dict)), None):
        found.append((*found[-1], key))
        level = level[key]
    return found


def at(config: Level, path: Sequence[str]) -> Level:
    """The object at a path of `levels`, or the innermost one that exists on the path."""
    level: Any = config
    for key in path:
        inner = level.get(key)
        level = inner if isinstance(inner, dict) else level
    return cast("Level", level)


def decoder_settings(config: Settings) -> dict[str, Any]:
    """The entries about the decoder at all levels of config.json."""
    return {key: value for path in levels(config) for key, value in at(config, path).items()}


def claimed_depths(config: Settings) -> dict[str, int]:
    """The numbers of layers that config.json gives for the decoder, by the path of the key."""
    return {
        ".".join((*path, key)): value
        for path in levels(config)
        for key, value in at(config, path).items()
        if key in DEPTHS and _is_count(value)
    }


def predicted_layers(config: Settings) -> int:
    """The number of layers for multi-token prediction in config.json."""
    settings = decoder_settings(config)
    return max((settings[key] for key in _PREDICTED if _is_count(settings.get(key))), default=0)


def change_layers(
    donor: Settings, depth: int, sources: Sequence[tuple[Settings, int]], kinds: Kinds | None = None
) -> Change:
    """Change one level of the donor's config.json for a result with the layers of `sources`.

    Args:
        donor: the level of the donor's config.json.
        depth: number of layers of the donor.
        sources: for each layer of the result, the same level of its model's config.json and its index there.
        kinds: the tensors of each layer of the donor and of the result. They show whether layers whose kind follows
            from their index get the right kind; None for no such check.
    """
    layers = _Layers(donor, depth, sources)
    if [layer for _, layer in sources] != list(range(depth)) or any(model != donor for model, _ in sources):
        for key, value in donor.items():
            layers.set(key, value)
        layers.set_sparse_step()
        layers.check_periods(kinds)
    return layers.change


class _Layers:
    def __init__(self, donor: Settings, depth: int, sources: Sequence[tuple[Settings, int]]) -> None:
        self._donor = donor
        self._depth = depth
        self._sources = sources
        self.change = Change()

    def set(self, key: str, value: Any) -> None:
        values = self.change.values
        if key in DEPTHS and _is_count(value):
            if value == self._depth:
                values[key] = len(self._sources)
            elif not any(self._donor.get(other) == self._depth for other in DEPTHS):
                self.change.problems.append((key, f"be the number of layers, {self._depth}", str(value)))
        elif (decoder_key := _ENCODER_DEPTHS.get(key)) and value == self._depth == self._donor.get(decoder_key):
            values[key] = len(self._sources)
        elif (key in _SCALED and value) or (key == "model_type" and value in _SCALED_BY_CODE):
            if len(self._sources) != self._depth or key != "scale_depth":
                self.change.warnings.append(
                    f"`{key}: {value}` scales each layer by its index or by the number of layers, which these slices "
                    "change"
                )
        elif key in _FIXED and value:
            self.change.problems.append((key, "not select layers by index, which these slices change", str(value)))
        elif key in _FIRST:
            self._set_first(key, value, 0)
        elif key == "moe_layer_end_index":  # an index of the last layer, not a count
            self._set_first(key, value, 1)
        elif key == "num_kv_shared_layers":
            self._set_last(key, value)
        elif key == "linear_attn_config" and isinstance(value, dict):
            self._set_indices_of(key, value)
        elif isinstance(value, dict) and value and "layer" in key and all(str(name).isdecimal() for name in value):
            entries = [self._own(model, key, value).get(str(layer)) for model, layer in self._sources]
            values[key] = {str(i): entry for i, entry in enumerate(entries) if entry is not None}
        elif key == "attention_types":
            kinds = _expanded(value)
            if len(kinds) == self._depth:
                values[key] = [[[kinds[layer % self._depth] for _, layer in self._sources], 1]]
        elif isinstance(value, str) and len(value) == self._depth and key.endswith("_override_pattern"):
            values[key] = "".join(_entry(list(self._own(m, key, value)), layer, value) for m, layer in self._sources)
        elif isinstance(value, list) and not _NOT_OF_LAYERS.search(key):
            self._set_list(key, value)

    def _set_list(self, key: str, value: list[Any]) -> None:
        """Set a list of layer indices, or a list with an entry for each layer and for layers that predict."""
        if _are_layers(value, self._depth) and _INDICES.search(key) and key != "no_rope_layers":
            self.change.values[key] = self._indices(key, value, self._sources, 0)
        elif "source" in key and len(value) == self._depth:
            rule = "not give each layer the index of another one, which these slices change"
            self.change.problems.append((key, rule, f"{len(value)} indices"))
        elif len(value) == self._depth or (len(value) > self._depth and key in KINDS):
            entries = [_entry(model.get(key), layer, value) for model, layer in self._sources]
            self.change.values[key] = entries + value[self._depth :]
        elif value and key == "block_types":  # RecurrentGemma repeats them
            self.change.values[key] = [value[layer % len(value)] for _, layer in self._sources]

    def _set_indices_of(self, key: str, value: Settings) -> None:
        """Set an object of lists of layer indices that start at 1, as in Kimi Linear."""
        lists = {name: entry for name, entry in value.items() if isinstance(entry, list) and name.endswith("_layers")}
        first = int(0 not in {index for entry in lists.values() for index in entry if _is_count(index)})
        sources = [(self._own(model, key, value), layer) for model, layer in self._sources]
        new = {name: self._indices(name, entry, sources, first) for name, entry in lists.items()}
        self.change.values[key] = {**value, **new}

    def _indices(self, key: str, given: list[Any], sources: Sequence[tuple[Settings, int]], first: int) -> list[int]:
        own = [self._own(model, key, given) for model, _ in sources]
        return [i + first for i, (_, layer) in enumerate(sources) if layer + first in own[i]]

    def _set_first(self, key: str, value: Any, more: int) -> None:
        off = key == "max_window_layers" and not self._donor.get("use_sliding_window")
        if not _is_count(value) or (off and value != self._depth):
            return
        are_first = [layer < self._own(model, key, value) + more for model, layer in self._sources]
        count = sum(are_first)
        if are_first == sorted(are_first, reverse=True):
            exceeds = value + more > self._depth
            self.change.values[key] = value if exceeds and count == len(self._sources) else count - more
        else:
            self._misplaced(key, value, "first")

    def _set_last(self, key: str, value: Any) -> None:
        if not _is_count(value) or not value:
            return
        are_last = [layer >= self._depth - self._own(model, key, value) for model, layer in self._sources]
        if are_last == sorted(are_last):
            self.change.values[key] = sum(are_last)
        else:
            self._misplaced(key, value, "last")

    def _misplaced(self, key: str, value: int, which: str) -> None:
        if not self._is_listed(key):
            rule = f"describe the {which} layers of the result"
            self.change.problems.append((key, rule, f"{value} with slices that put other layers there"))

    def _is_listed(self, key: str) -> bool:
        """Whether a list gives the kind of each layer. Runtimes then read the list and not `key`."""
        of_attention = [kinds for kinds in KINDS if kinds not in _FEED_FORWARD_LISTS]
        lists = _FEED_FORWARD_LISTS if _FEED_FORWARD.search(key) else of_attention
        return key != "num_kv_shared_layers" and any(isinstance(self._donor.get(kinds), list) for kinds in lists)

    def set_sparse_step(self) -> None:
        """Set the sparse layers of Qwen's mixtures: every n-th layer, except for a list of dense layers.

        If the step does not give the layers their kinds, the list has all layers with a dense network.
        """
        if not self._says_sparse():
            return
        dense = [i for i, (model, layer) in enumerate(self._sources) if self._is_dense(model, layer)]
        now = {**self._donor, **self.change.values}
        if dense != [i for i in range(len(self._sources)) if self._is_dense(now, i)]:
            self.change.values.update({_SPARSE_STEP: 1, _DENSE_LAYERS: dense})

    def _says_sparse(self) -> bool:
        return _DENSE_LAYERS in self._donor and _is_count(self._donor.get(_SPARSE_STEP))

    def _is_dense(self, model: Settings, layer: int) -> bool:
        listed, step = model.get(_DENSE_LAYERS), self._own(model, _SPARSE_STEP, self._donor[_SPARSE_STEP])
        return (isinstance(listed, list) and layer in listed) or (layer + 1) % max(step, 1) != 0

    def check_periods(self, kinds: Kinds | None) -> None:
        """Check keys that give every n-th layer its kind: each layer must have the kind that follows from its index."""
        periods = {
            key: _period(value)
            for key, value in self._donor.items()
            if _EVERY.search(key) and not self._is_listed(key) and not (key == _SPARSE_STEP and self._says_sparse())
        }
        moved = [
            key for key, n in periods.items() if any(i % n != layer % n for i, (_, layer) in enumerate(self._sources))
        ]
        if not moved:
            return
        key, value = moved[0], self._donor[moved[0]]
        whole = math.lcm(*periods.values())
        same_tensors = all(_SAME_TENSORS.search(key) for key in moved)
        now = {**self._donor, **self.change.values}
        for i, kind in enumerate(kinds[1] if kinds else ()):
            # Layers of the donor at the same index modulo the period that have the same kind in all lists.
            alike = [
                kinds[0][n]
                for n in range(i % whole, self._depth, whole)
                if kinds and _listed(self._donor, n) == _listed(now, i)
            ]
            if not (kind in alike if alike else same_tensors):
                got = f"{value}, which gives layer {i} another kind"
                self.change.problems.append((key, "give each layer the kind of its tensors", got))
                return
        if not all(map(_FEED_FORWARD.search, moved)):  # the tensors show the kind of a feed-forward network
            self.change.warnings.append(
                f"`{key}: {value}` gives each layer its kind by its index, and these slices change the kind of layers"
            )

    @staticmethod
    def _own(model: Settings, key: str, donor_value: Any) -> Any:
        """The entry of a layer's own model, if it has the type of the donor's entry; else the donor's."""
        own = model.get(key)
        return own if type(own) is type(donor_value) else donor_value


def _entry(own: Any, layer: int, donor_value: Sequence[Any]) -> Any:
    """The entry of a layer in its own model's list, or else in the donor's list, repeated."""
    return own[layer] if isinstance(own, list) and layer < len(own) else donor_value[layer % len(donor_value)]


def _listed(settings: Settings, layer: int) -> list[Any]:
    """The kinds of a layer in all lists of kinds."""
    lists = [settings[kinds] for kinds in KINDS if isinstance(settings.get(kinds), list) and settings[kinds]]
    return [kinds[layer % len(kinds)] for kinds in lists]


def _period(value: Any) -> int:
    if isinstance(value, str):  # "LLLG"
        return max(len(value), 1)
    return value if _is_count(value) and value else 1


def _expanded(value: Any) -> list[Any]:
    """GPT-Neo's [[["global", "local"], 12]] as a list of 24 kinds."""
    if not isinstance(value, list) or not all(
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list) and _is_count(entry[1])
        for entry in value
    ):
        return []
    return [kind for kinds, times in value for kind in kinds * min(times, 10**4)]


def _are_layers(value: Sequence[Any], depth: int) -> bool:
    """Whether a list has layer indices: whole numbers in ascending order, of layers that exist.

    Defaults of a class may have indices of more layers; a list with an entry for each layer is not one of indices.
    """
    rising = all(map(_is_count, value)) and all(value[i - 1] < value[i] for i in range(1, len(value)))
    return rising and (not value or value[0 if len(value) != depth else -1] < depth)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
