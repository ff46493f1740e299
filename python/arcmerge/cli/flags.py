"""The flags that several commands share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from arcmerge.cli.terminal import print_note
from arcmerge.errors import ArcmergeError

# Flags of mergekit-yaml for what arcmerge does anyway, or has no use for. They are accepted with a note.
_SWITCHES_WITHOUT_EFFECT = {
    "--low-cpu-memory": "memory is bounded anyway",
    "--lazy-unpickle": "safetensors files are always read lazily",
    "--read-to-gpu": "weights are streamed to the device when they are needed",
    "--multi-gpu": "a merge runs on one device",
    "--async-write": "writing always overlaps with computing",
    "--clone-tensors": "tensors that share memory are written once each",
    "--trust-remote-code": "code from checkpoints is never run",
}
_VALUES_WITHOUT_EFFECT = {
    "--lora-merge-cache": "LoRA adapters are not supported",
    "--lora-merge-dtype": "LoRA adapters are not supported",
    "--write-threads": "the number of writers is chosen for the disk",
}
_SWITCH = argparse.BooleanOptionalAction


def add_merge_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the commands that read parents: merge, plan and inspect."""
    parser.add_argument("--device", type=device, default="auto", help="auto (the CPU), cpu, cuda or cuda:N")
    parser.add_argument("--cuda", action=_SWITCH, default=None, help="same as --device cuda, or cpu")
    parser.add_argument("--gpu-rich", action=_SWITCH, default=None, help="same as --cuda")
    _add_threads(parser)
    parser.add_argument("--allow-crimes", action=_SWITCH, default=False, help="allow mixing architectures")
    parser.add_argument(
        "--unsafe-truncate-embeddings",
        action=_SWITCH,
        default=False,
        help="truncate embeddings to the smallest vocabulary",
    )
    parser.add_argument("--transformers-cache", metavar="DIR", help="folder of files from the hub")
    parser.add_argument("--random-seed", metavar="N", type=seed, help="seed of random methods (default: the recipe's)")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="accepted; warnings are always shown")
    parser.add_argument("--quiet", "-q", action=_SWITCH, default=False, help="no progress bar and no summary")
    for flag, why in _SWITCHES_WITHOUT_EFFECT.items():
        parser.add_argument(flag, action=_SWITCH, default=None, help=f"accepted; {why}")
    for flag, why in _VALUES_WITHOUT_EFFECT.items():
        parser.add_argument(flag, metavar="VALUE", help=f"accepted; {why}")


def merge_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a merge by name. Prints a note for each flag without effect."""
    from arcmerge.merging.options import Options

    for flag, why in {**_SWITCHES_WITHOUT_EFFECT, **_VALUES_WITHOUT_EFFECT}.items():
        if getattr(arguments, flag[2:].replace("-", "_")) not in (None, False):
            print_note(f"{flag} has no effect: {why}")
    cuda = arguments.cuda if arguments.cuda is not None else arguments.gpu_rich
    if cuda is not None and arguments.device == "auto":
        arguments.device = "cuda" if cuda else "cpu"
    return {name: value for name, value in vars(arguments).items() if name in Options.__dataclass_fields__}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the commands that run a model: sweep, generate and chat."""
    parser.add_argument("--device", type=device, default="auto", help="auto (a GPU, else the CPU), cpu, cuda or cuda:N")
    _add_threads(parser)
    parser.add_argument("--numerics", choices=["default", "hf"], default="default", help="hf rounds like transformers")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress and no summary")


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-j", "--num-threads", "--threads", metavar="N", type=count, dest="threads", help="CPU threads")


def count(text: str) -> int:
    from arcmerge._C import MAX_THREADS

    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_THREADS:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MAX_THREADS}, got '{text}'")
    return int(text)


def seed(text: str) -> int:
    from arcmerge.merging.recipe.seed import read_seed

    try:
        return read_seed(int(text) if re.fullmatch("[0-9]{1,19}", text) else text, "random_seed")
    except ArcmergeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got '{text}'")
    return text


def picture(text: str) -> Path:
    file = Path(text)
    if file.suffix not in (".png", ".pdf", ".svg", ".jpg"):
        raise argparse.ArgumentTypeError(f"must be a .png, .pdf, .svg or .jpg file, got '{text}'")
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder that exists, got '{text}'; create {file.parent} first")
    return file


def shard_size(text: str) -> int:
    from arcmerge.checkpoint.layout import parse_size

    try:
        return parse_size(text)
    except ArcmergeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
