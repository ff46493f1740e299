"""The small files that travel with the weights: read from the donor, written beside the result."""

from __future__ import annotations

from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
    "chat_template.jinja",
    "chat_template.json",
)
# True of the result whatever happens to the vocabulary.
KEPT_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def donor_files(donor: Path, *, tokenizer: bool) -> dict[str, bytes]:
    """The contents of those files that the folder `donor` has, by name. tokenizer: with those of its tokenizer."""
    names = (*TOKENIZER_FILES, *KEPT_FILES) if tokenizer else KEPT_FILES
    return {name: (donor / name).read_bytes() for name in names if (donor / name).is_file()}
