"""tokenizer.json as a merge needs it: the id of each token, and the files of a tokenizer with tokens added.

Token ids are those that transformers assigns on loading: the model's vocabulary as stored, then the added tokens in the
order of the file, then the special tokens that only tokenizer_config.json names. The merges are two thirds of a
tokenizer.json and are not needed here, so they are not decoded and are written back unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError, counted
from arcmerge.merging.recipe.tokenizer_block import MAX_IDS

# The flags of an added token in the file format of `tokenizers`, which say how it is matched.
PLAIN: Mapping[str, bool] = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}
_SPECIAL: Mapping[str, bool] = {**PLAIN, "normalized": False, "special": True}

_SPECIAL_KEYS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Files that transformers reads with tokenizer.json, and that stay valid if tokens are added.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
# Other forms of the same vocabulary, which are outdated if tokenizer.json changes.
_SAME_VOCABULARY = ("tokenizer.model", "added_tokens.json", "merges.txt", "vocab.json")

_MERGES = re.compile(rb'"merges"\s*:\s*(?=\[)')
_END_OF_FILE = re.compile(rb"\]\s*\}\s*\}\s*\Z")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.

    Args:
        folder: the folder of its files.
        document: tokenizer.json without its merges.
        merges: the merges as JSON; None for a model without merges.
        config: tokenizer_config.json, with missing entries from special_tokens_map.json.
        ids: the id of each token.
        added: the flags of the added tokens, which are matched before the model reads the text.
        changed: whether tokens have been added or removed since it was read.
    """

    folder: Path
    document: dict[str, Any]
    merges: bytes | None
    config: dict[str, Any]
    ids: dict[str, int]
    added: dict[str, Mapping[str, bool]]
    changed: bool = False

    @classmethod
    def read(cls, folder: Path) -> Tokenizer | None:
        """Read the tokenizer of a checkpoint folder; None if it has none.

        Raises:
            ArcmergeError: for a tokenizer that is not valid or is stored in another form than tokenizer.json.
        """
        file = folder / "tokenizer.json"
        if not file.exists():
            if other := next((name for name in _SAME_VOCABULARY if (folder / name).exists()), None):
                raise ArcmergeError(
                    f"{folder}: 'tokenizer.json' must exist, got only {other}; convert it with "
                    "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
                )
            return None
        try:
            document, merges = _decode(file)
            config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
            tokenizer = cls(folder, document, merges, config, *_ids(document))
            return replace(tokenizer.with_tokens(_listed(config))._with_named_tokens(), changed=False)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ArcmergeError(
                f"'{file}' must be a tokenizer of the `tokenizers` library, got {type(error).__name__} in reading it: "
                f"{error}; download the file again"
            ) from None

    def first(self, limit: int) -> Tokenizer:
        """This tokenizer without the tokens with ids of `limit` or more, for which the model has no rows.

        Special tokens that tokenizer_config.json names get new ids, as transformers assigns them on loading.
        """
        left_out = {token for token, token_id in self.ids.items() if token_id >= limit}
        if not left_out:
            return self
        model = dict(self.document["model"])
        merges = self.merges
        if left_out & _vocabulary(model).keys():
            if merges is None:
                raise ArcmergeError(
                    f"{self.folder}: 'tokenizer.json' must be a BPE tokenizer, because the model has no rows for the "
                    f"{counted(len(left_out), 'token')} with ids of {limit} or more, got {model.get('type')}; "
                    "resize the model's embedding to its tokenizer first"
                )
            model["vocab"] = {token: token_id for token, token_id in model["vocab"].items() if token_id < limit}
            merges = _encode([merge for merge in json.loads(merges) if not _makes_any(merge, left_out)])
        kept = replace(
            self,
            document={**self.document, "model": model},
            merges=merges,
            ids={token: token_id for token, token_id in self.ids.items() if token_id < limit},
            added={token: flags for token, flags in self.added.items() if token not in left_out},
            changed=True,
        )
        return kept._with_named_tokens()

    def with_tokens(self, tokens: Mapping[str, Mapping[str, bool]]) -> Tokenizer:
        """This tokenizer with `tokens` (text: flags) added. Tokens that it has keep their ids and flags."""
        tokens = {token: flags for token, flags in tokens.items() if token not in self.added}
        if not tokens:
            return self
        ids, added = dict(self.ids), dict(self.added)
        _add(tokens, ids, added, len(_vocabulary(self.document["model"])))
        return replace(self, ids=ids, added=added, changed=True)

    def _with_named_tokens(self) -> Tokenizer:
        return self.with_tokens({token: flags for token, flags in _named(self.config).items() if token not in self.ids})

    def files(self) -> dict[str, bytes]:
        """The files of the tokenizer by name, which transformers loads with the same ids."""
        names = _SETTINGS if self.changed else ("tokenizer.json", *_SETTINGS, *_SAME_VOCABULARY)
        files = {name: (self.folder / name).read_bytes() for name in names if (self.folder / name).exists()}
        if self.changed:
            files["tokenizer.json"] = self._tokenizer_json()
            stored = _read_json(self.folder / "tokenizer_config.json")
            if "added_tokens_decoder" in stored:
                stored["added_tokens_decoder"] = {str(self.ids[token]): entry for token, entry in self._entries()}
                files["tokenizer_config.json"] = _encode(stored, indent=2)
        return files

    def _tokenizer_json(self) -> bytes:
        entries = [{"id": self.ids[token], **entry} for token, entry in self._entries()]
        text = _encode({**self.document, "added_tokens": entries})
        if self.merges is None:
            return text
        before, key, after = text.rpartition(b'"merges": []')
        return before + key[:-2] + self.merges + after

    def _entries(self) -> Iterable[tuple[str, dict[str, Any]]]:
        for token in sorted(self.added, key=self.ids.__getitem__):
            yield token, {"content": token, **self.added[token]}


def _decode(file: Path) -> tuple[dict[str, Any], bytes | None]:
    """tokenizer.json without its merges, and the merges as bytes."""
    data = file.read_bytes()
    start = _MERGES.search(data)
    end = _END_OF_FILE.search(data, max(len(data) - 64, 0))
    if start is not None and end is not None and start.end() < end.start():
        first, last = start.end(), end.start() + 1
        return parse_object(data[:first] + b"[]" + data[last:], file), data[first:last]
    document = parse_object(data, file)
    if "merges" not in document["model"]:
        return document, None
    merges = _encode(document["model"]["merges"])
    document["model"]["merges"] = []
    return document, merges


def _encode(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=indent).encode()


def _read_json(file: Path) -> dict[str, Any]:
    return parse_object(file.read_bytes(), file) if file.exists() else {}


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the model's own tokens. Unigram stores a list of (token, score), other models store a mapping.

    Raises:
        ValueError: unless tokens are text and their ids are whole numbers from 0 to MAX_IDS - 1.
    """
    vocab = model["vocab"]
    ids = vocab if isinstance(vocab, dict) else {token: token_id for token_id, (token, _) in enumerate(vocab)}
    if not ids:
        raise ValueError("'vocab' must have tokens, got none")
    for token, token_id in ids.items():
        if not isinstance(token, str) or type(token_id) is not int or not 0 <= token_id < MAX_IDS:
            rule = f"a whole number from 0 to {MAX_IDS - 1}"
            raise ValueError(f"'vocab' must give each token {rule} as its id, got {token_id!r:.40} for {token!r:.40}")
    return ids


def _ids(document: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Mapping[str, bool]]]:
    vocabulary = _vocabulary(document["model"])
    ids = dict(vocabulary)
    added: dict[str, Mapping[str, bool]] = {}
    entries = document.get("added_tokens") or ()
    _add({entry["content"]: _flags(entry, PLAIN) for entry in entries}, ids, added, len(vocabulary))
    return ids, added


def _add(
    tokens: Mapping[str, Mapping[str, bool]],
    ids: dict[str, int],
    added: dict[str, Mapping[str, bool]],
    vocabulary_size: int,
) -> None:
    """Assign ids to `tokens` as `tokenizers` does, whatever ids the file has: after the highest added token, and after
    the model's vocabulary."""
    after = max([vocabulary_size, *(ids[token] + 1 for token in added)])
    for token, flags in tokens.items():
        if token not in ids:
            ids[token] = after
        after = max(after, ids[token] + 1)
        added[token] = flags


def _listed(config: Mapping[str, Any]) -> dict[str, Mapping[str, bool]]:
    """The added tokens of tokenizer_config.json, where transformers before version 5 repeats them."""
    decoder = config.get("added_tokens_decoder") or {}
    return {decoder[token_id]["content"]: _flags(decoder[token_id], PLAIN) for token_id in sorted(decoder, key=int)}


def _named(config: Mapping[str, Any]) -> dict[str, Mapping[str, bool]]:
    """The tokens with a role in tokenizer_config.json. transformers adds those that are missing."""
    tokens: dict[str, Mapping[str, bool]] = {}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    extra = extra.values() if isinstance(extra, dict) else extra
    other = [key for key in config if key.endswith("_token") and key not in _SPECIAL_KEYS]
    for value in (*(config.get(key) for key in (*_SPECIAL_KEYS, *other)), *extra):
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            tokens.setdefault(value["content"], _flags(value, _SPECIAL))
        elif isinstance(value, str) and value:
            tokens.setdefault(value, _SPECIAL)
    return tokens


def _flags(entry: Mapping[str, Any], default: Mapping[str, bool]) -> Mapping[str, bool]:
    return {name: bool(entry.get(name, value)) for name, value in default.items()}


def _makes_any(merge: str | list[str], tokens: set[str]) -> bool:
    """Whether one of `tokens` is a part of a merge or its result."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return "".join(parts) in tokens or not tokens.isdisjoint(parts)
