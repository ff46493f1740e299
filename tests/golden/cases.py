"""The golden cases: a config each, and the recorded result of mergekit 0.1.5 in expected.json.

A tensor is recorded as its type, shape, hash, norm and a sample of its values, with the parameters that mergekit
resolved for it and its input tensors. So the comparison needs neither mergekit nor its whole output.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import yaml

FOLDER = Path(__file__).parent
EXPECTED = FOLDER / "expected.json"
SAMPLED_VALUES = 12


@dataclass(frozen=True)
class Source:
    """An input tensor: a model of tests/helpers/tiny.py and a tensor's name in it."""

    model: str
    tensor: str


@dataclass(frozen=True)
class Recorded:
    """One tensor of mergekit's output. parameters: those shared by the inputs, and lists with one value an input."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str
    norm: float
    sample: torch.Tensor
    parameters: dict[str, Any]
    sources: tuple[Source, ...]

    def same_bits(self, tensor: torch.Tensor) -> bool:
        return digest(tensor) == self.sha256


@dataclass(frozen=True)
class Expected:
    """The result of mergekit for a config. An error may occur after the tensors were written."""

    error: str | None
    tensors: dict[str, Recorded]
    files: tuple[str, ...]
    config: dict[str, Any]
    vocabulary: str | None
    conversation: str | None


def names() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "configs").glob("*.yml"))


def config_text(case: str, models: Path) -> str:
    """The config of a case, with `models/NAME` spelled out as a folder under `models`."""
    return (FOLDER / "configs" / f"{case}.yml").read_text().replace("models/", f"{models}/")


@cache
def config(case: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FOLDER / "configs" / f"{case}.yml").read_text())
    return document


def load() -> dict[str, Expected]:
    """Every recorded case by name."""
    return {name: _decode_case(record) for name, record in json.loads(EXPECTED.read_text())["cases"].items()}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(raw(tensor)).hexdigest()[:12]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def sample(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """`count` evenly spaced values, the first and the last among them."""
    positions = np.linspace(0, tensor.numel() - 1, min(count, tensor.numel())).astype(np.int64)
    return tensor.flatten()[torch.from_numpy(positions)]


def sampled_values(name: str, shape: tuple[int, ...], *, aligned: bool) -> int:
    """One value from each row of an aligned vocabulary, a few from any other tensor."""
    return shape[0] if aligned and name in ("model.embed_tokens.weight", "lm_head.weight") else SAMPLED_VALUES


def vocabulary_digest(vocabulary: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:12]


def render(chat_template: str) -> str:
    """The text of one question and its answer, because different templates may give the same text."""
    conversation = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    template = jinja2.Template(chat_template, trim_blocks=True, lstrip_blocks=True)
    return str(template.render(messages=conversation, bos_token="<bos>", eos_token="<eos>"))


def encode_tensor(name: str, tensor: torch.Tensor, parameters: int, sources: int, *, aligned: bool) -> list[Any]:
    """The row of expected.json; parameters and sources are indices into the tables of the case."""
    values = sample(tensor, sampled_values(name, tuple(tensor.shape), aligned=aligned))
    return [
        str(tensor.dtype).removeprefix("torch."),
        list(tensor.shape),
        digest(tensor),
        float(f"{tensor.double().norm():.8g}"),
        base64.b64encode(raw(values)).decode(),
        parameters,
        sources,
    ]


def _decode_case(record: dict[str, Any]) -> Expected:
    return Expected(
        error=record.get("error"),
        tensors={name: _decode_tensor(name, row, record) for name, row in record.get("tensors", {}).items()},
        files=tuple(record.get("files", ())),
        config=record.get("config", {}),
        vocabulary=record.get("vocabulary"),
        conversation=record.get("conversation"),
    )


def _decode_tensor(name: str, row: list[Any], record: dict[str, Any]) -> Recorded:
    dtype, shape, sha256, norm, values, parameters, sources = row
    decoded = torch.frombuffer(bytearray(base64.b64decode(values)), dtype=getattr(torch, dtype))
    return Recorded(
        getattr(torch, dtype),
        tuple(shape),
        sha256,
        norm,
        decoded,
        record["parameters"][parameters],
        tuple(_decode_source(source, name) for source in record["sources"][sources]),
    )


def encode_source(source: Source) -> str:
    """`model`, or `model:layer` for a tensor of a layer."""
    parts = source.tensor.split(".")
    return f"{source.model}:{parts[2]}" if parts[1] == "layers" else source.model


def _decode_source(text: str, output_name: str) -> Source:
    model, _, layer = text.partition(":")
    parts = output_name.split(".")
    if layer:
        parts[2] = layer
    return Source(model, ".".join(parts))
