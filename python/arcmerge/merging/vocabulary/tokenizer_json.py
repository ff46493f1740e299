"""A tokenizer, as far as a merge needs it: which token has which number, and how to write it out with tokens added.

Numbers are those that transformers gives on loading: the model's vocabulary as stored, then the added tokens in the
order of the file, then the special tokens that only tokenizer_config.json names. Merges are two thirds of a
tokenizer.json and nothing here looks into them, so they stay undecoded and are written back as they came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.tokenizer_block import MAX_IDS

# How `tokenizers` matches an added token, by the flags of its file format.
PLAIN: Mapping[str, bool] = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}
_SPECIAL: Mapping[str, bool] = {**PLAIN, "normalized": False, "special": True}

_SPECIAL_KEYS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Read by transformers beside tokenizer.json, and still true of a tokenizer that has gained tokens.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
# Other forms of the same vocabulary, which are out of date once tokenizer.json has changed.
_SAME_VOCABULARY = ("tokenizer.model", "added_tokens.json", "merges.txt", "vocab.json")

_MERGES = re.compile(rb'"merges"\s*:\s*(?=\[)')
_END_OF_FILE = re.compile(rb"\]\s*\}\s*\}\s*\Z")


@dataclass(frozen=True)
class Tokenizer:
    """What the files in `folder` say.

    document: tokenizer.json with its merges taken out; merges: these, as JSON, None for a model without any.
    config: tokenizer_config.json, with special_tokens_map.json under it.
    ids: the number of each token; added: the flags of those that are matched before the model sees the text.
    changed: whether tokens have been added or left out since it was read.
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
        """The tokenizer of a checkpoint folder, None if there is none.

        Raises ArcmergeError for one that is stored in another form than tokenizer.json, or is not valid.
        """
        file = folder / "tokenizer.json"
        if not file.exists():
            if other := next((name for name in _SAME_VOCABULARY if (folder / name).exists()), None):
                raise ArcmergeError(
                    f"{folder}: a tokenizer is needed as tokenizer.json, found only {other}; convert it once with "
                    "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
                )
            return None
        try:
            document, merges = _decode(file)
            config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
            tokenizer = cls(folder, document, merges, config, *_numbers(document))
            return replace(tokenizer.with_tokens(_listed(config))._with_named_tokens(), changed=False)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ArcmergeError(
                f"{file}: a tokenizer of the `tokenizers` library is needed, reading it fails with "
                f"{type(error).__name__}: {error}; fetch the file again"
            ) from None

    def first(self, limit: int) -> Tokenizer:
        """This tokenizer without the tokens numbered `limit` and up, for which the model has no rows.

        Special tokens that tokenizer_config.json names are numbered anew, as transformers does on loading.
        """
        left_out = {token for token, number in self.ids.items() if number >= limit}
        if not left_out:
            return self
        model = dict(self.document["model"])
        merges = self.merges
        if left_out & _vocabulary(model).keys():
            if merges is None:
                raise ArcmergeError(
                    f"{self.folder}: only a BPE tokenizer can lose the tokens that its model has no rows for "
                    f"({len(left_out)} from number {limit}), got {model.get('type')}; "
                    "resize the model's embedding to its tokenizer first"
                )
            model["vocab"] = {token: number for token, number in model["vocab"].items() if number < limit}
            merges = _encode([merge for merge in json.loads(merges) if not _makes_any(merge, left_out)])
        kept = replace(
            self,
            document={**self.document, "model": model},
            merges=merges,
            ids={token: number for token, number in self.ids.items() if number < limit},
            added={token: flags for token, flags in self.added.items() if token not in left_out},
            changed=True,
        )
        return kept._with_named_tokens()

    def with_tokens(self, tokens: Mapping[str, Mapping[str, bool]]) -> Tokenizer:
        """This tokenizer with `tokens` (text: flags) added. One that it knows keeps its number, and flags it has."""
        tokens = {token: flags for token, flags in tokens.items() if token not in self.added}
        if not tokens:
            return self
        ids, added = dict(self.ids), dict(self.added)
        _add(tokens, ids, added, len(_vocabulary(self.document["model"])))
        return replace(self, ids=ids, added=added, changed=True)

    def _with_named_tokens(self) -> Tokenizer:
        return self.with_tokens({token: flags for token, flags in _named(self.config).items() if token not in self.ids})

    def files(self) -> dict[str, bytes]:
        """The tokenizer as files by name, which transformers loads with the same numbers."""
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
    """tokenizer.json without its merges, and the merges as they stand in it."""
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
    """The model's own tokens. Unigram stores a list of (token, score), the others a mapping.

    Raises ValueError unless tokens are text and their ids whole numbers from 0 to below MAX_IDS.
    """
    vocab = model["vocab"]
    ids = vocab if isinstance(vocab, dict) else {token: number for number, (token, _) in enumerate(vocab)}
    if not ids:
        raise ValueError("its vocabulary must have a token, has none")
    for token, number in ids.items():
        if not isinstance(token, str) or type(number) is not int or not 0 <= number < MAX_IDS:
            rule = f"a whole number from 0 to {MAX_IDS - 1}"
            raise ValueError(f"the id of a token must be {rule}, got {number!r:.40} for {token!r:.40}")
    return ids


def _numbers(document: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Mapping[str, bool]]]:
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
    """Number `tokens` as `tokenizers` does, whatever number the file gives them: after the highest added token, but not
    before the end of the model's vocabulary."""
    after = max([vocabulary_size, *(ids[token] + 1 for token in added)])
    for token, flags in tokens.items():
        if token not in ids:
            ids[token] = after
        after = max(after, ids[token] + 1)
        added[token] = flags


def _listed(config: Mapping[str, Any]) -> dict[str, Mapping[str, bool]]:
    """The added tokens of tokenizer_config.json, where releases of transformers before 5 repeat them."""
    decoder = config.get("added_tokens_decoder") or {}
    return {decoder[number]["content"]: _flags(decoder[number], PLAIN) for number in sorted(decoder, key=int)}


def _named(config: Mapping[str, Any]) -> dict[str, Mapping[str, bool]]:
    """The tokens that have a role in tokenizer_config.json; transformers adds those that are missing."""
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
    """Whether a merge has one of `tokens` as a part or as its result."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return "".join(parts) in tokens or not tokens.isdisjoint(parts)
