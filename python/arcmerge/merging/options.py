"""How to merge, beside what the recipe says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.workers import MOST_THREADS
from arcmerge.merging.recipe.yaml_document import shown
from arcmerge.threads import get_num_threads

# What CUDA's driver shows on Linux and in Windows' subsystem for it.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")


@dataclass(frozen=True)
class Options:
    """How to merge, beside what the recipe says.

    device: "auto" takes CUDA if there is one, else "cpu"; "cuda" or "cuda:N" ask for it.
    threads: compute threads, None for arcmerge.get_num_threads(). out_shard_size: bytes, as a number or like "5B".
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

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Options:
        """Options from their names. Raises ArcmergeError for an unknown name or a value of a wrong type."""
        if unknown := fields.keys() - cls.__dataclass_fields__.keys():
            raise ArcmergeError(f"unknown option '{min(unknown)}'; there are {', '.join(cls.__dataclass_fields__)}")
        options = cls(**fields)
        for name, value in vars(options).items():
            if isinstance(getattr(cls, name), bool) and not isinstance(value, bool):
                raise ArcmergeError(f"option '{name}' must be True or False, got {shown(value)}")
        threads = options.threads
        if threads is not None and not (type(threads) is int and 1 <= threads <= MOST_THREADS):
            raise ArcmergeError(
                f"option 'threads' must be a whole number from 1 to {MOST_THREADS} or None, got {shown(threads)}"
            )
        if not isinstance(options.device, str):
            raise ArcmergeError(f"option 'device' must be auto, cpu, cuda or cuda:N, got {shown(options.device)}")
        return options

    @property
    def thread_count(self) -> int:
        return self.threads or get_num_threads()

    @property
    def resolved_device(self) -> str:
        """The device that "auto" stands for. Raises ArcmergeError for one that is not there."""
        if self.device == "cpu" or (self.device == "auto" and not any(Path(name).exists() for name in _DRIVERS)):
            return "cpu"  # torch is not even imported where there is no driver
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if not self.device.startswith("cuda"):
            raise ArcmergeError(f"device must be auto, cpu, cuda or cuda:N, got '{self.device}'")
        number = self.device.removeprefix("cuda").removeprefix(":") or "0"
        if not number.isdigit() or int(number) >= torch.cuda.device_count():
            raise ArcmergeError(
                f"device '{self.device}' must be one of the {torch.cuda.device_count()} CUDA devices of this machine; "
                "use device 'cpu'"
            )
        return self.device
