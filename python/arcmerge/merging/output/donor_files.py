"""The small files that are copied from the donor.

They include the Python files that `auto_map` names, with which transformers runs models that it does not have itself.
They are copied as bytes and are never run or imported here.
"""

from __future__ import annotations

import re
from pathlib import Path

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
)
# Files that stay valid if the vocabulary changes.
KEPT_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def donor_files(donor: Path, *, tokenizer: bool) -> dict[str, bytes]:
    """Read the small files that a folder has, by name. tokenizer: include the files of the tokenizer."""
    names = (*TOKENIZER_FILES, *KEPT_FILES) if tokenizer else KEPT_FILES
    return {name: (donor / name).read_bytes() for name in names if (donor / name).is_file()}


# A class in the model's own folder, such as `modeling_x.XForCausalLM`. Others are `owner/repository--file.Class`.
_CLASS = re.compile(r"(?P<module>[A-Za-z_]\w*)\.[A-Za-z_]\w*", re.ASCII)
_IMPORT = re.compile(
    r"^[ \t]*(?:from|import)[ \t]+\.(?P<module>[\w.]*)(?:[ \t]+import[ \t(]+(?P<names>[\w, \t]+))?", re.M
)


def code_files(donor: Path, *, tokenizer: bool) -> tuple[dict[str, bytes], list[str]]:
    """Read the Python files that `auto_map` names, and the files that they import from their folder.

    Args:
        donor: the folder of the model.
        tokenizer: include the files of the tokenizer.

    Returns:
        The contents of the files by name, and a warning for each file that cannot be copied.
    """
    found: dict[str, bytes] = {}
    warnings: list[str] = []
    waiting: list[tuple[str, str]] = []
    for file in ("config.json", *KEPT_FILES, *(["tokenizer_config.json"] if tokenizer else [])):
        for reference in _references(donor / file):
            if match := _CLASS.fullmatch(reference):
                waiting.append((match["module"], f"auto_map of {file}"))
            elif "--" in reference:
                warnings.append(f"auto_map of {file} names code of another repository, '{reference}'; not copied")
            else:
                warnings.append(
                    f"auto_map of {file} must name a file of its folder, got {reference!r:.120}; not copied"
                )
    while waiting:
        module, user = waiting.pop()
        path = donor / f"{module}.py"
        if path.name in found:
            continue
        if "." in module or not path.is_file():
            warnings.append(f"{path.name}, which {user} needs, is not in {donor}; the result may not load without it")
            continue
        found[path.name] = path.read_bytes()
        for match in _IMPORT.finditer(found[path.name].decode(errors="replace")):
            waiting += [(name, path.name) for name in _imported(match, donor)]
    return found, list(dict.fromkeys(warnings))


def _references(path: Path) -> list[str]:
    """The classes that `auto_map` of a file names; none if the file does not exist or cannot be read."""
    try:
        auto_map = parse_object(path.read_bytes(), path).get("auto_map")
    except (OSError, ArcmergeError):
        return []
    entries = auto_map.values() if isinstance(auto_map, dict) else []
    classes = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    return list(dict.fromkeys(name for name in classes if isinstance(name, str)))


def _imported(match: re.Match[str], folder: Path) -> list[str]:
    """The modules of an import from the file's own folder: `from .x import y`, or `from . import x` for a file x.py."""
    if match["module"]:
        return [match["module"]]
    names = [name.split()[0] for name in (match["names"] or "").split(",") if name.strip()]
    return [name for name in names if (folder / f"{name}.py").is_file()]
