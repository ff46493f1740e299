"""The config.json of a Gemma-2, in the spelling of transformers 4 or 5."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcmerge.errors import ArcmergeError, Problems

# A rope table of this many rows takes 1 GB; Gemma-2 has 8,192.
_MAX_POSITIONS = 1 << 20
_ACTIVATION = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Gemma2Config:
    """The settings of a model, under their names in config.json.

    Attributes:
        attn_logit_softcapping, final_logit_softcapping: 0 for no cap.
        windows: per layer, how many keys a query sees, its own included; 0: all.
        eos_token_id: as in config.json; generation_config.json may list more.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    query_pre_attn_scalar: float
    attn_logit_softcapping: float
    final_logit_softcapping: float
    rms_norm_eps: float
    rope_theta: float
    windows: tuple[int, ...]
    bos_token_id: int
    eos_token_id: tuple[int, ...]
    pad_token_id: int
    tie_word_embeddings: bool

    @property
    def softmax_scale(self) -> float:
        """The factor of query-key products: not always 1 / sqrt(head_dim)."""
        return float(self.query_pre_attn_scalar**-0.5)

    @classmethod
    def read(cls, settings: Mapping[str, Any], path: Path) -> Gemma2Config:
        """Check the settings of a config.json.

        Args:
            settings: the parsed file; missing settings have transformers' defaults where it has one.
            path: of the file, for messages.

        Raises:
            ArcmergeError: naming every setting that is missing or has an impossible value.
        """
        return _Reader(settings, path).config()


class _Reader:
    """Reads settings and collects the problems, so that one message names them all."""

    def __init__(self, settings: Mapping[str, Any], path: Path) -> None:
        self._settings = settings
        self._path = path
        self._problems = Problems()

    def config(self) -> Gemma2Config:
        if self._settings.get("model_type") != "gemma2":
            found = self._settings.get("model_type")
            raise ArcmergeError(f"{self._path}: 'model_type' must be 'gemma2' to run the model, got {found!r:.80}")
        layers = self._count("num_hidden_layers")
        config = Gemma2Config(
            hidden_size=self._count("hidden_size"),
            num_hidden_layers=layers,
            num_attention_heads=self._count("num_attention_heads"),
            num_key_value_heads=self._count("num_key_value_heads"),
            head_dim=self._count("head_dim", 256),
            intermediate_size=self._count("intermediate_size"),
            vocab_size=self._count("vocab_size"),
            max_position_embeddings=self._count("max_position_embeddings", 8192, _MAX_POSITIONS),
            query_pre_attn_scalar=self._positive("query_pre_attn_scalar", 256),
            attn_logit_softcapping=self._softcap("attn_logit_softcapping", 50.0),
            final_logit_softcapping=self._softcap("final_logit_softcapping", 30.0),
            rms_norm_eps=self._positive("rms_norm_eps", 1e-6),
            rope_theta=self._theta(),
            windows=self._windows(layers),
            bos_token_id=self._tokens("bos_token_id", 2)[0],
            eos_token_id=self._tokens("eos_token_id", 1),
            pad_token_id=self._tokens("pad_token_id", 0)[0],
            tie_word_embeddings=self._tied(),
        )
        self._check(config)
        self._problems.raise_if_any()
        if config.query_pre_attn_scalar == 224 and config.head_dim == 256:
            # The first 9B uploads had 224, hidden_size / heads; the model was trained with 256.
            warnings.warn(
                f"{self._path}: 'query_pre_attn_scalar' is 224, a known mistake for 256 in the first 9B checkpoints; "
                "the model runs with 224; correct config.json if it is one of those",
                stacklevel=4,
            )
        return config

    def _check(self, config: Gemma2Config) -> None:
        # Not hidden_act: the first releases have "gelu" there and use the tanh approximation.
        activation = self._settings.get("hidden_activation", _ACTIVATION)
        if activation != _ACTIVATION:
            self._problems.add(
                f"{self._path}: 'hidden_activation' must be {_ACTIVATION!r} to run the model, got {activation!r:.80}"
            )
        if bias := self._settings.get("attention_bias"):
            self._problems.add(f"{self._path}: 'attention_bias' must be false, got {bias!r:.80}; no Gemma-2 has biases")
        if both := self._settings.get("use_bidirectional_attention"):
            self._problems.add(
                f"{self._path}: 'use_bidirectional_attention' must be false, got {both!r:.80}; generation is causal"
            )
        if config.num_attention_heads % config.num_key_value_heads:
            self._problems.add(
                f"{self._path}: 'num_attention_heads' must be a multiple of num_key_value_heads "
                f"{config.num_key_value_heads}, got {config.num_attention_heads}"
            )
        if config.head_dim < 16 or config.head_dim & (config.head_dim - 1):
            self._problems.add(f"{self._path}: 'head_dim' must be a power of two of 16 or more, got {config.head_dim}")

    def _count(self, key: str, default: int | None = None, limit: int = (1 << 31) - 1) -> int:
        value = self._settings.get(key, default)
        if type(value) is not int or not 0 < value <= limit:
            self._problems.add(f"{self._path}: '{key}' must be a whole number from 1 to {limit}, got {value!r:.80}")
            return 1
        return value

    def _positive(self, key: str, default: float, value: object = None) -> float:
        value = self._settings.get(key, default) if value is None else value
        # An int may exceed the range of a float, as 10**400 does.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            self._problems.add(f"{self._path}: '{key}' must be a number above 0, got {value!r:.80}")
            return 1.0
        return float(value)

    def _tied(self) -> bool:
        value = self._settings.get("tie_word_embeddings", True)
        if not isinstance(value, bool):
            self._problems.add(f"{self._path}: 'tie_word_embeddings' must be true or false, got {value!r:.80}")
        return bool(value)

    def _softcap(self, key: str, default: float) -> float:
        return 0.0 if self._settings.get(key, default) is None else self._positive(key, default)

    def _theta(self) -> float:
        parameters = self._settings.get("rope_parameters") or self._settings.get("rope_scaling") or {}
        if isinstance(parameters, dict):
            # transformers may store one set per kind of layer.
            per_kind = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
            types = [value.get("rope_type", value.get("type", "default")) for value in per_kind]
            first, *others = [value.get("rope_theta", self._settings.get("rope_theta", 10000.0)) for value in per_kind]
            if all(kind == "default" for kind in types) and all(theta == first for theta in others):
                return self._positive("rope_theta", 10000.0, first)
        self._problems.add(
            f"{self._path}: 'rope_parameters' must be of type 'default' with one rope_theta, got {parameters!r:.80}"
        )
        return 10000.0

    def _windows(self, layers: int) -> tuple[int, ...]:
        """Without layer_types, as in Google's files, layers 0, 2, 4, ... have a sliding window."""
        window = self._settings.get("sliding_window", 4096)
        default = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
        kinds = self._settings.get("layer_types") or default
        named = ("sliding_attention", "full_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in named for kind in kinds):
            self._problems.add(
                f"{self._path}: 'layer_types' must list 'sliding_attention' or 'full_attention' for each of the "
                f"{layers} layers, got {kinds!r:.80}"
            )
            kinds = default
        if window is None:
            return (0,) * layers
        window = self._count("sliding_window", 4096)
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)

    def _tokens(self, key: str, default: int) -> tuple[int, ...]:
        value = self._settings.get(key, default)
        value = default if value is None else value
        tokens = tuple(value) if isinstance(value, list) else (value,)
        if not tokens or not all(type(token) is int and token >= 0 for token in tokens):
            self._problems.add(f"{self._path}: '{key}' must be a token id or a list of token ids, got {value!r:.80}")
            return (default,)
        return tokens
