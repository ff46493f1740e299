"""Tiny checkpoints with the same bits on every machine, for tests that need models of any size.

Weights come from numpy PCG64 streams keyed by a seed and the tensor's name, so they depend on no other library's
generator and on no order of construction. `make(name, folder)` writes one of `MODELS`; the parts it is made of
(`weights`, `write_checkpoint`, `write_safetensors`) serve tests that want a checkpoint of their own, or a broken one.

The pair gemma-a, gemma-b exercises one numeric branch of a spherical merge in each layer:

    layer 0   independent                                    an angle of about 90 degrees
    layer 1   b = a + 1 % noise                              cosine above 0.9995: the linear branch
    layer 2   b = a + 10 % noise                             a small angle
    layer 3   a zero tensor in a, another in b               a direction that does not exist
    layer 4   k_proj b = -a, v_proj b = a, q_proj near -a    antipodal, equal, cosine -0.995
    layer 5   independent, b three times as long             lengths that differ
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Weights = dict[str, Array]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
CHAT_TEMPLATE = "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"

_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Geometry:
    """The sizes in config.json."""

    hidden_size: int = 32
    intermediate_size: int = 64
    num_hidden_layers: int = 6
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 16
    vocab_size: int = 320


GEOMETRY = Geometry()
DEEP = Geometry(8, 16, 26, 2, 1, 4, 288)

# Dims of a layer's tensors: h hidden, i intermediate, q and k all query and key heads, d one head,
# a the fused query, key and value, g the fused gate and up projection.
_LLAMA = {
    "input_layernorm.weight": "h",
    "self_attn.q_proj.weight": "qh",
    "self_attn.k_proj.weight": "kh",
    "self_attn.v_proj.weight": "kh",
    "self_attn.o_proj.weight": "hq",
    "post_attention_layernorm.weight": "h",
    "mlp.gate_proj.weight": "ih",
    "mlp.up_proj.weight": "ih",
    "mlp.down_proj.weight": "hi",
}
_LAYERS = {
    "gemma2": {**_LLAMA, "pre_feedforward_layernorm.weight": "h", "post_feedforward_layernorm.weight": "h"},
    "llama": _LLAMA,
    "qwen2": {**_LLAMA, **{f"self_attn.{p}_proj.bias": d for p, d in {"q": "q", "k": "k", "v": "k"}.items()}},
    "qwen3": {**_LLAMA, "self_attn.q_norm.weight": "d", "self_attn.k_norm.weight": "d"},
    "phi3": {
        "input_layernorm.weight": "h",
        "self_attn.qkv_proj.weight": "ah",
        "self_attn.o_proj.weight": "hq",
        "post_attention_layernorm.weight": "h",
        "mlp.gate_up_proj.weight": "gh",
        "mlp.down_proj.weight": "hi",
    },
}


def shapes(family: str, geometry: Geometry = GEOMETRY, *, head: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, in the order of the forward pass."""
    size = {
        "h": geometry.hidden_size,
        "i": geometry.intermediate_size,
        "q": geometry.num_attention_heads * geometry.head_dim,
        "k": geometry.num_key_value_heads * geometry.head_dim,
        "d": geometry.head_dim,
    }
    size["a"] = size["q"] + 2 * size["k"]
    size["g"] = 2 * size["i"]
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (geometry.vocab_size, geometry.hidden_size)}
    for layer in range(geometry.num_hidden_layers):
        for name, dimensions in _LAYERS[family].items():
            found[f"model.layers.{layer}.{name}"] = tuple(size[letter] for letter in dimensions)
    found[NORM] = (geometry.hidden_size,)
    if head:
        found[HEAD] = found[EMBEDDING]
    return found


def normal(seed: int, name: str, shape: tuple[int, ...], scale: float) -> Array:
    """Normal numbers of deviation `scale` that depend on the seed and the name only."""
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    return (generator.standard_normal(shape) * scale).astype(np.float32)


def weights(seed: int, family: str = "gemma2", geometry: Geometry = GEOMETRY, *, head: bool = False) -> Weights:
    """Independent weights: matrices of deviation 0.05, vectors (norms, biases) of 0.2."""
    tensors = shapes(family, geometry, head=head).items()
    return {name: normal(seed, name, shape, 0.05 if len(shape) == 2 else 0.2) for name, shape in tensors}


def perturbed(original: Weights, seed: int, fraction: float) -> Weights:
    """`original` plus, in every tensor, noise of `fraction` of its own root mean square."""
    return {name: tensor + _noise(tensor, seed, name, fraction) for name, tensor in original.items()}


def _noise(tensor: Array, seed: int, name: str, fraction: float) -> Array:
    return normal(seed, name, tensor.shape, float(np.sqrt(np.mean(tensor**2))) * fraction)


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _gemma_a() -> Weights:
    tensors = weights(1)
    tensors["model.layers.3.post_feedforward_layernorm.weight"][:] = 0
    return tensors


def _gemma_b() -> Weights:
    a, other = weights(1), weights(2)
    b = {name: a[name] + _noise(a[name], 3, name, 0.05) if name == EMBEDDING else other[name] for name in a}
    for name in a:
        if ".layers.1." in name:
            b[name] = a[name] + _noise(a[name], 3, name, 0.01)
        elif ".layers.2." in name:
            b[name] = a[name] + _noise(a[name], 3, name, 0.1)
        elif ".layers.5." in name:
            b[name] = other[name] * 3
    b["model.layers.3.post_attention_layernorm.weight"][:] = 0
    attention = "model.layers.4.self_attn."
    b[attention + "k_proj.weight"] = -a[attention + "k_proj.weight"]
    b[attention + "v_proj.weight"] = a[attention + "v_proj.weight"].copy()
    near_antipodal = attention + "q_proj.weight"
    b[near_antipodal] = -a[near_antipodal] + _noise(a[near_antipodal], 3, near_antipodal, 0.1)
    return b


def _head(seed: int) -> Weights:
    return {HEAD: normal(seed, HEAD, (GEOMETRY.vocab_size, GEOMETRY.hidden_size), 0.05)}


def _longer_embedding(tensors: Weights, rows: int) -> Weights:
    extra = normal(9, "extra rows", (rows, tensors[EMBEDDING].shape[1]), 0.05)
    return tensors | {EMBEDDING: np.concatenate([tensors[EMBEDDING], extra])}


@dataclass(frozen=True)
class Model:
    """A model for `make`: its weights (made on demand), and how they are stored and described."""

    weights: Callable[[], Weights]
    family: str = "gemma2"
    geometry: Geometry = GEOMETRY
    dtype: str = "BF16"
    tied: bool = True
    shards: int = 1
    index: bool = True
    extra_tokens: int = 0
    reversed_tokens: bool = False


def _pair(name: str, seed: int, *, tied: bool) -> dict[str, Model]:
    small = replace(GEOMETRY, num_hidden_layers=3)
    return {
        f"{name}-{letter}": Model(partial(weights, number, name, small, head=not tied), name, small, tied=tied)
        for letter, number in {"a": seed, "b": seed + 1}.items()
    }


_DEEP_P = Model(lambda: weights(21, geometry=DEEP), geometry=DEEP, dtype="F32")

MODELS: Mapping[str, Model] = {
    "gemma-a": Model(_gemma_a),
    "gemma-b": Model(_gemma_b),
    "gemma-c": Model(lambda: perturbed(_gemma_a(), 5, 0.1)),
    "gemma-d": Model(lambda: perturbed(_gemma_a(), 6, 0.2)),
    "gemma-b-f32": Model(_gemma_b, dtype="F32"),
    "gemma-b-f16": Model(_gemma_b, dtype="F16"),
    "gemma-b-vocabulary": Model(
        lambda: _longer_embedding(_gemma_b(), 16), geometry=replace(GEOMETRY, vocab_size=336), extra_tokens=16
    ),
    "gemma-b-reversed": Model(_gemma_b, reversed_tokens=True),
    "gemma-b-untied": Model(lambda: _gemma_b() | _head(11), tied=False),
    "gemma-a-untied": Model(lambda: _gemma_a() | _head(12), tied=False),
    "gemma-b-spurious-head": Model(lambda: _gemma_b() | {HEAD: _gemma_b()[EMBEDDING]}),
    "gemma-shallow": Model(
        lambda: weights(7, geometry=replace(GEOMETRY, num_hidden_layers=4)),
        geometry=replace(GEOMETRY, num_hidden_layers=4),
    ),
    "gemma-wide": Model(
        lambda: weights(8, geometry=replace(GEOMETRY, hidden_size=48)), geometry=replace(GEOMETRY, hidden_size=48)
    ),
    "deep-p": _DEEP_P,
    "deep-q": Model(lambda: weights(22, geometry=DEEP), geometry=DEEP, dtype="F32"),
    "deep-p-sharded": replace(_DEEP_P, shards=3),
    "deep-p-sharded-without-index": replace(_DEEP_P, shards=3, index=False),
    **_pair("llama", 31, tied=False),
    **_pair("qwen2", 33, tied=True),
    **_pair("qwen3", 35, tied=True),
    **_pair("phi3", 37, tied=False),
}


def make(name: str, folder: Path) -> Path:
    """Write the model `name` as folder/name, unless it is there already, and return that path."""
    path = folder / name
    if not path.exists():
        write_checkpoint(path, MODELS[name])
    return path


def make_all(folder: Path) -> Path:
    """Write every model under `folder` (about 3 MB) and return it."""
    for name in MODELS:
        make(name, folder)
    return folder


def write_checkpoint(path: Path, model: Model) -> None:
    """A folder that transformers loads: weights, config.json, generation_config.json and the tokenizer's files."""
    path.mkdir(parents=True)
    _write_weights(path, model)
    _write_json(path / "config.json", config(model))
    generation = {"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0, "_name_or_path": path.name}
    _write_json(path / "generation_config.json", generation)
    write_tokenizer(path, model.geometry.vocab_size - model.extra_tokens, model.extra_tokens, model.reversed_tokens)


def _write_weights(path: Path, model: Model) -> None:
    tensors = model.weights()
    if model.shards == 1:
        write_safetensors(path / "model.safetensors", tensors, model.dtype)
        return
    names = list(tensors)
    length = -(-len(names) // model.shards)
    weight_map = {}
    for number in range(model.shards):
        file = f"model-{number + 1:05d}-of-{model.shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number * length : (number + 1) * length]}
        write_safetensors(path / file, part, model.dtype)
        weight_map.update(dict.fromkeys(part, file))
    if model.index:
        total = sum(len(stored(tensor, model.dtype)) for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(path / "model.safetensors.index.json", index)


def stored(tensor: Array, dtype: str) -> bytes:
    """The bytes of a tensor as safetensors stores it, rounded to the nearest even bf16 or f16."""
    if dtype == "F16":
        return tensor.astype("<f2").tobytes()
    if dtype == "BF16":
        bits = tensor.astype("<f4").view("<u4")
        rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return rounded.tobytes()
    return tensor.astype("<f4").tobytes()


def write_safetensors(path: Path, tensors: Weights, dtype: str) -> None:
    """One safetensors file, every tensor stored as `dtype` (BF16, F16 or F32)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blobs = []
    end = 0
    for name, tensor in tensors.items():
        blob = stored(tensor, dtype)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + len(blob)]}
        end += len(blob)
        blobs.append(blob)
    write_raw_safetensors(path, header, b"".join(blobs))


def write_raw_safetensors(path: Path, header: Mapping[str, object], data: bytes) -> None:
    """A safetensors file of exactly this header and data, consistent or not."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def config(model: Model) -> dict[str, object]:
    """config.json, written by hand: only what a loader needs and what a merge must keep or change."""
    architecture = {"gemma2": "Gemma2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"}
    found: dict[str, object] = {
        "architectures": [f"{architecture[model.family]}ForCausalLM"],
        "model_type": model.family,
        **asdict(model.geometry),
        "max_position_embeddings": 128,
        "tie_word_embeddings": model.tied,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        # Checkpoints of transformers before version 5 have torch_dtype.
        "dtype" if model.family == "gemma2" else "torch_dtype": _DTYPE_NAMES[model.dtype],
    }
    if model.family == "gemma2":
        alternating = ("sliding_attention", "full_attention")
        found["layer_types"] = [alternating[layer % 2] for layer in range(model.geometry.num_hidden_layers)]
        found["sliding_window"] = 32
        found["query_pre_attn_scalar"] = model.geometry.head_dim
    return found


def vocabulary(size: int, *, reverse: bool = False) -> list[str]:
    """Special tokens, the 256 bytes, pairs of letters; `reverse` reverses the ids of the pairs and adds one."""
    from tokenizers import pre_tokenizers

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [first + second for first in "etaoinshrdlu" for second in "etaoinshrdlu"][: size - len(tokens)]
    return [*tokens, *([*pairs[-2::-1], "zz"] if reverse else pairs)]


def write_tokenizer(path: Path, size: int, extra: int = 0, reverse: bool = False) -> None:
    """tokenizer.json (byte-level BPE of `size` tokens and `extra` added ones), its config and the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = vocabulary(size, reverse=reverse)
    merges = [(token[0], token[1]) for token in tokens[len(SPECIAL_TOKENS) :] if len(token) == 2]
    numbers = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(f"<extra_{number}>", normalized=False) for number in range(extra)])
    tokenizer.save(str(path / "tokenizer.json"))
    named = {f"{token[1:-1]}_token": token for token in SPECIAL_TOKENS[:4]}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128, **named}
    _write_json(path / "tokenizer_config.json", tokenizer_config)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
