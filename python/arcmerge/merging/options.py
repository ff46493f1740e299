"""Options of a merge that are not part of the recipe, and the callbacks that a caller can pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from arcmerge._C import MAX_THREADS
from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.seed import read_seed
from arcmerge.merging.recipe.yaml_document import shown
from arcmerge.threads import get_num_threads

# Files of the CUDA driver: on Linux, and in the Windows Subsystem for Linux.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")

Warn = Callable[[str], None]
"""Warning callback: called with one sentence for each warning."""


class Progress(Protocol):
    """Progress callback: called with the bytes that are done and the bytes in total."""

    def __call__(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Options:
    """Options of a merge that are not part of the recipe.

    Args:
        device: "cpu", "cuda", "cuda:N", or "auto": see `merge_device` and `resolved_device`.
        threads: number of compute threads; None for `arcmerge.get_num_threads()`.
        out_shard_size: maximum bytes of a file of weights, as a number or as text such as "5B" or "500M".
        copy_tokenizer: copy the tokenizer files of the base model.
        write_model_card: write README.md and mergekit_config.yml.
        allow_nonfinite: accept NaN and infinity in the weights.
        allow_crimes: accept models of different architectures.
        unsafe_truncate_embeddings: truncate vocabularies of different sizes to the smallest one.
        transformers_cache: cache folder for models from the hub; None for the one of huggingface_hub.
        random_seed: seed of methods that draw random numbers; None for that of the recipe.

    Raises:
        ArcmergeError: for a value of the wrong type or out of range.
    """

    device: str = "auto"
    threads: int | None = None
    out_shard_size: str | int = "5B"
    copy_tokenizer: bool = True
    write_model_card: bool = True
    allow_nonfinite: bool = False
    allow_crimes: bool = False
    unsafe_truncate_embeddings: bool = False
    transformers_cache: str | None = None
    random_seed: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(getattr(Options, name), bool) and not isinstance(value, bool):
                raise ArcmergeError(f"'{name}' must be True or False, got {shown(value)}")
        if self.threads is not None and not (type(self.threads) is int and 1 <= self.threads <= MAX_THREADS):
            raise ArcmergeError(
                f"'threads' must be a whole number from 1 to {MAX_THREADS} or None, got {shown(self.threads)}"
            )
        read_seed(self.random_seed, "random_seed")
        if not isinstance(self.device, str):
            raise ArcmergeError(f"'device' must be auto, cpu, cuda or cuda:N, got {shown(self.device)}")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Options:
        """Make options from a mapping of names to values; ArcmergeError for an unknown name."""
        if unknown := fields.keys() - cls.__dataclass_fields__.keys():
            raise ArcmergeError(f"'options' must be among {', '.join(cls.__dataclass_fields__)}, got '{min(unknown)}'")
        return cls(**fields)

    @property
    def thread_count(self) -> int:
        return self.threads or get_num_threads()

    @property
    def merge_device(self) -> str:
        """The device that reads checkpoints and merges them to disk: `resolved_device`, but "auto" is the CPU.

        On the way through a GPU the CPU copies every byte of the parents twice and every byte of the result once, which
        takes it longer than computing the result.
        """
        return "cpu" if self.device == "auto" else self.resolved_device

    @property
    def resolved_device(self) -> str:
        """The device of a model in memory, "cpu" or "cuda:N".

        "auto" is the current CUDA device of the calling thread, or the CPU if there is none; "cuda" is the current one.
        A name without an index would mean another device in another thread.

        Raises:
            ArcmergeError: the device does not exist.
        """
        if self.device == "cpu" or (self.device == "auto" and not any(Path(name).exists() for name in _DRIVERS)):
            return "cpu"  # without a driver, torch is not even imported
        import torch

        if self.device == "auto" and not torch.cuda.is_available():
            return "cpu"
        named = re.fullmatch(r"auto|cuda(?::(\d+))?", self.device)
        if named is None:
            raise ArcmergeError(f"'device' must be auto, cpu, cuda or cuda:N, got '{self.device}'")
        count = torch.cuda.device_count()
        if int(named[1] or 0) >= count:
            raise ArcmergeError(
                f"'device' must be one of the {count} CUDA devices of this machine, got '{self.device}'; use device "
                "'cpu'"
            )
        return f"cuda:{torch.cuda.current_device() if named[1] is None else int(named[1])}"
