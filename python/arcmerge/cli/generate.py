"""The command `arcmerge generate`."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

from arcmerge.cli.flags import add_model_flags
from arcmerge.cli.terminal import accept_any_text, print_note, print_piece, print_warning, read_text

NAME = "generate"
SUMMARY = "continue a prompt with a Gemma-2 model"
INTERRUPTED = "the answer is incomplete"
EPILOG = """\
example:
  arcmerge generate merged/ "The capital of France is" --max-new-tokens 40
  arcmerge generate merged/ "Name three rivers." --chat --sample --seed 1

The defaults are those of the model's generation_config.json, or else those in brackets."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub name")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    add_generation_flags(parser)


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that generate and chat share."""
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="maximum number of new tokens (256)")
    parser.add_argument(
        "--sample", dest="do_sample", action=argparse.BooleanOptionalAction, help="sample instead of greedy decoding"
    )
    parser.add_argument("--temperature", type=float, help="sampling temperature; implies --sample, 0 is greedy")
    parser.add_argument("--top-k", metavar="K", type=int, help="sample from the K most probable tokens")
    parser.add_argument(
        "--top-p", metavar="P", type=float, help="sample from the most probable tokens with a total of P"
    )
    parser.add_argument("--min-p", metavar="P", type=float, help="sample from tokens with p >= P * p_max")
    parser.add_argument("--seed", type=int, help="seed of the samples (a new one for each run)")
    parser.add_argument("--repetition-penalty", metavar="R", type=float, help="values above 1 penalize repeated tokens")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", help="stop before this text or special token; repeatable"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32", "auto"], default="bfloat16", help="dtype of the weights"
    )
    add_model_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    accept_any_text()
    text = well_formed(read_text() if arguments.prompt == "-" else arguments.prompt)
    prompt = [{"role": "user", "content": text}] if arguments.chat else text
    model = load(arguments)
    print_answer(arguments, model, lambda: model.generate(prompt, stream=print_piece, **options(arguments)))


def load(arguments: argparse.Namespace) -> Any:
    """The model. Its warnings are printed."""
    from arcmerge.gemma2.model import Gemma2
    from arcmerge.threads import use_threads

    use_threads(arguments.threads)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Gemma2.from_pretrained(arguments.model, arguments.device, arguments.dtype, arguments.numerics)
    for warning in caught:
        print_warning(str(warning.message))
    return model


def well_formed(text: str) -> str:
    """The text with U+FFFD for bytes that are not UTF-8, and a warning about them."""
    from arcmerge.gemma2.text.tokenizer import well_formed

    if (read := well_formed(text)) != text:
        print_warning("the prompt has bytes that are not UTF-8; each is read as U+FFFD")
    return read


def print_answer(arguments: argparse.Namespace, model: Any, call: Callable[[], object]) -> None:
    """Let a call print an answer; then print its warnings and the timing below it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    print()
    for warning in caught:
        print_note(str(warning.message))
    if not arguments.quiet:
        print_note(model.last_generated.summary(model.network.weights))


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of Gemma2.generate. An option of sampling implies --sample, unless --no-sample is given."""
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    others = {name: getattr(arguments, name) for name in ("max_new_tokens", "seed", "repetition_penalty", "stop")}
    implied = True if any(value is not None for value in sampling.values()) else None
    return {**others, **sampling, "do_sample": implied if arguments.do_sample is None else arguments.do_sample}
