"""A tiny pair of trained models: one Gemma-2 trained on English text, and two fine-tunes of it on different halves.

    python examples/tiny_pair.py train .demo              train .demo/parent, .demo/first and .demo/second and write
                                                          .demo/validation.txt: about two minutes on two cores
    python examples/tiny_pair.py loss .demo/first ...     print the losses of models on text that none of them has seen

The text is the language reference that every Python ships for `help()` (`pydoc_data.topics`, about 460 kB), so nothing
is downloaded. The models are small enough to train in a demo, and each fine-tune is better than the other on its own
half, so that a merge has something to lose. One part of the text that no model is trained on (validation.txt) is for
choosing a merge, another part for judging the chosen merge. An existing pair is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import arcmerge

logging.disable_progress_bar()

SEED = 2
CONTEXT = 128
BATCH = 8
UNSEEN_EVERY = 10
STAGES = {"parent": (280, 8e-3), "first": (90, 3e-3), "second": (90, 3e-3)}  # steps, peak learning rate
ARCHITECTURE = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


# ---- the text


def halves() -> tuple[list[str], list[str]]:
    """The paragraphs of the language reference, in two halves of about the same size that share no topic.

    The reference repeats whole sections under several topics; a paragraph counts once, so that held-out text is new.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [part for part in text.split("\n\n") if part.strip() and part not in seen]
        seen.update(paragraphs)
        min(parts, key=lambda part: sum(map(len, part))).extend(paragraphs)
    return parts


def split(paragraphs: list[str]) -> tuple[str, str, str]:
    """The text for training, the text for choosing a merge, and the text held out from both.

    Every tenth run of eight paragraphs is not trained on. A run is long enough for a context, and the runs are spread
    over the whole text. They alternate between the second and the third part.
    """
    runs = ["\n\n".join(paragraphs[start : start + 8]) for start in range(0, len(paragraphs), 8)]
    unseen = runs[UNSEEN_EVERY - 1 :: UNSEEN_EVERY]
    seen = [run for run in runs if run not in unseen]
    return "\n\n".join(seen), "\n\n".join(unseen[1::2]), "\n\n".join(unseen[::2])


# ---- the models


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,048 tokens, with Gemma's four special tokens at Gemma's ids; it adds a BOS, as Gemma's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ARCHITECTURE["vocab_size"],
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    bos = ("<bos>", ARCHITECTURE["bos_token_id"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """The token ids of a text, without a BOS."""
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def batches(tokens: torch.Tensor, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """`steps` batches (BATCH, CONTEXT) of windows that start anywhere in `tokens`."""
    windows = tokens.unfold(0, CONTEXT, 1)
    for _ in range(steps):
        yield windows[torch.randint(len(windows), (BATCH,), generator=generator)]


def train(model: Gemma2ForCausalLM, tokens: torch.Tensor, name: str) -> None:
    """AdamW with a short warm-up and a cosine decay to zero; prints the loss at both ends."""
    steps, peak = STAGES[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    started, losses = time.monotonic(), []
    for batch in batches(tokens, steps, torch.Generator().manual_seed(SEED)):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    first, last = sum(losses[:5]) / 5, sum(losses[-20:]) / 20
    print(f"{name:>7}: loss {first:.3f} -> {last:.3f} in {steps} steps, {time.monotonic() - started:.0f} s", flush=True)


def save(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint folder with bf16 weights; `model` itself stays in float32."""
    rounded = Gemma2ForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_pair(folder: Path) -> None:
    """Train the parent on both halves, then one fine-tune on each, and save all three as bf16 safetensors folders."""
    recipe = {
        "seed": SEED,
        "unseen_every": UNSEEN_EVERY,
        "context": CONTEXT,
        "batch": BATCH,
        "stages": STAGES,
        "saved": ["parent", "first", "second"],
        "architecture": ARCHITECTURE,
    }
    recipe_text, recipe_file = json.dumps(recipe, indent=2), folder / "tiny_pair.json"
    if recipe_file.is_file() and recipe_file.read_text() == recipe_text:
        print(f"{folder}/first and {folder}/second exist already; remove {folder} to train them again")
        return

    torch.manual_seed(SEED)
    texts, validation, _ = zip(*map(split, halves()), strict=True)
    tokenizer = make_tokenizer("\n\n".join(texts))
    tokens = [encode(tokenizer, text) for text in texts]
    model = Gemma2ForCausalLM(Gemma2Config(**ARCHITECTURE, attn_implementation="eager"))
    print(f"a Gemma-2 of {model.num_parameters():,} parameters, {sum(map(len, tokens)):,} tokens of text", flush=True)
    train(model, torch.cat(tokens), "parent")
    save(model, tokenizer, folder / "parent")
    parent = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, half in zip(("first", "second"), tokens, strict=True):
        model.load_state_dict(parent)
        train(model, half, name)
        save(model, tokenizer, folder / name)
    (folder / "validation.txt").write_text("\n\n".join(validation), encoding="utf-8")
    recipe_file.write_text(recipe_text)


# ---- the losses


@torch.inference_mode()
def held_out_loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Mean cross-entropy in nats a token, over consecutive windows of CONTEXT tokens."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in windows.split(BATCH)]
    return sum(losses) / len(windows)


def print_losses(folders: list[Path]) -> None:
    """Print a table of held-out losses: a row for each model; on the first half, the second half, and both."""
    texts = [split(half)[-1] for half in halves()]
    print(f"{'held-out loss, nats a token':<32}{'first half':>12}{'second half':>12}{'both':>12}")
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        tokens = [encode(tokenizer, text) for text in texts]
        losses = [held_out_loss(model, part) for part in (*tokens, torch.cat(tokens))]
        print(f"{folder!s:<32}" + "".join(f"{loss:>12.3f}" for loss in losses))


@torch.inference_mode()
def print_perplexities(folders: list[Path]) -> None:
    """Print a table of perplexities on all held-out text: a row for each model; by arcmerge and by transformers.

    Both run in float32, in windows of CONTEXT tokens that each start with a BOS. Raises SystemExit if they differ by
    a relative 1e-4.
    """
    text = "\n\n".join(split(half)[-1] for half in halves())
    print(f"{'held-out perplexity':<32}{'arcmerge':>12}{'transformers':>14}")
    for folder in folders:
        tokens = encode(AutoTokenizer.from_pretrained(folder), text).tolist()
        ours = arcmerge.Gemma2.from_pretrained(folder, dtype=torch.float32).perplexity(tokens, window=CONTEXT)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        total = 0.0
        for start in range(0, len(tokens), CONTEXT - 1):
            window = torch.tensor([[ARCHITECTURE["bos_token_id"], *tokens[start : start + CONTEXT - 1]]])
            total += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
        theirs = math.exp(total / len(tokens))
        print(f"{folder!s:<32}{ours:>12.3f}{theirs:>14.3f}")
        if not abs(ours - theirs) <= 1e-4 * theirs:
            raise SystemExit(f"{folder}: the perplexities differ by more than 1e-4: {ours} and {theirs}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="make the pair").add_argument("folder", type=Path)
    commands.add_parser("loss", help="compare models").add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "train":
        make_pair(arguments.folder)
    else:
        print_losses(arguments.folders)
        print_perplexities(arguments.folders)


if __name__ == "__main__":
    main()
