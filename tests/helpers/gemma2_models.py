"""Small Gemma-2 models of transformers with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM

# The released sizes, scaled down. Softmax scales and groups of heads are those of the originals; sizes are odd where
# the architecture allows, and almost every prompt exceeds the window of 8.
SHAPES: dict[str, dict[str, Any]] = {
    "2.6B": dict(hidden_size=72, num_attention_heads=2, num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256),
    "9B": dict(hidden_size=100, num_attention_heads=4, num_key_value_heads=2, head_dim=256, query_pre_attn_scalar=256),
    "27B": dict(hidden_size=152, num_attention_heads=8, num_key_value_heads=4, head_dim=128, query_pre_attn_scalar=144),
}


def settings(shape: str, **changes: Any) -> dict[str, Any]:
    """Settings of config.json without transformers' defaults."""
    return {
        "vocab_size": 1003,
        "intermediate_size": 211,
        "num_hidden_layers": 4,
        "sliding_window": 8,
        "max_position_embeddings": 512,
        **SHAPES[shape],
        **changes,
    }


def build(folder: Path, shape: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Gemma2ForCausalLM:
    """A model of transformers, saved to `folder`. The weights are large enough for both softcaps to matter."""
    torch.manual_seed(7)
    model = Gemma2ForCausalLM(Gemma2Config(**settings(shape, **changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(0.0, 0.3)
            else:
                spread = 2.0 if ".q_proj" in name or ".k_proj" in name else 1.0
                parameter.normal_(0.0, spread * parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    # Not the model itself: to() also rounds RoPE's frequencies, which from_pretrained keeps in float32.
    return Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer.json whose 259 tokens are <pad>, <eos>, <bos> and the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate(["<pad>", "<eos>", "<bos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    tokenizer.save(str(folder / "tokenizer.json"))


TURNS = """\
{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{{ m['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
# A vocabulary like Gemma's: special tokens, byte fallback, characters.
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
_CHARACTERS = [*map(chr, range(33, 127)), "\u2581", "\n", "\N{REPLACEMENT CHARACTER}", "\u2581the"]
TOKENS = {name: number for number, name in enumerate([*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *_CHARACTERS])}


def save_fallback_tokenizer(folder: Path) -> None:
    """A tokenizer like Gemma's with the vocabulary TOKENS."""
    tokenizer = Tokenizer(models.BPE(TOKENS, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))


def build_chain(folder: Path, chain: list[int], **changes: Any) -> None:
    """A model with the vocabulary TOKENS whose greedy answer follows a chain of different tokens.

    The hidden state of a token is one-hot, and the MLP shifts it by one.
    """
    save_fallback_tokenizer(folder)
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    shape |= {"intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": len(TOKENS), "eos_token_id": 1}
    build(folder, "2.6B", torch.float32, **{**shape, **changes})
    (file,) = folder.glob("*.safetensors")
    weights = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
    mlp = "model.layers.0.mlp."
    for place, token in enumerate(chain):
        weights["model.embed_tokens.weight"][token, place] = 1
        if place:
            weights[mlp + "gate_proj.weight"][place - 1, place - 1] = 1
            weights[mlp + "up_proj.weight"][place - 1, place - 1] = 1
            weights[mlp + "down_proj.weight"][place, place - 1] = 1
    weights["model.layers.0.post_feedforward_layernorm.weight"][:] = 20
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})
    (folder / "generation_config.json").unlink(missing_ok=True)
