"""The command `arcmerge`: parse, call, print."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from arcmerge import __version__, interrupts
from arcmerge.errors import ArcmergeError
from arcmerge.sweeping.command import add_arguments as add_sweep_arguments
from arcmerge.terminal import accept_any_text, complain, note, print_json, progress_bar, read_text, warn

# Flags of mergekit-yaml that ask for what arcmerge does anyway or has no use for: accepted with a note.
_WITHOUT_EFFECT = {
    "--low-cpu-memory": "memory is bounded anyway",
    "--lazy-unpickle": "safetensors are always read lazily",
    "--read-to-gpu": "weights are streamed to the device as they are needed",
    "--multi-gpu": "one device serves the merge",
    "--async-write": "writing always overlaps",
    "--clone-tensors": "tensors that share memory are written once each",
    "--trust-remote-code": "no code from checkpoints is ever run",
}
_VALUES_WITHOUT_EFFECT = {
    "--lora-merge-cache": "LoRA adapters are not supported",
    "--lora-merge-dtype": "LoRA adapters are not supported",
    "--random-seed": "nothing here is random",
    "--write-threads": "the writers are chosen to keep the disk busy",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _WrongCall(f"{message}; see '{self.prog} --help'")


class _WrongCall(Exception):
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, 1 for work that failed, 2 for a wrong call."""
    try:
        arguments = _parser().parse_args(argv)
    except _WrongCall as error:
        complain(str(error))
        return 2
    try:
        interrupts.say(_WHAT_AN_INTERRUPT_LEAVES[arguments.call])
        arguments.call(arguments)
        sys.stdout.flush()
    except ArcmergeError as error:
        if arguments.debug:
            raise
        for problem in error.problems:
            complain(problem)
        return 1
    except KeyboardInterrupt:
        interrupts.tell(complain)
        return 130
    except BrokenPipeError:  # the reader of a table has seen enough
        sys.stderr.close()
    except OSError as error:
        if arguments.debug:
            raise
        complain(f"{error.filename or 'the system'}: {error.strerror or error}")
        return 1
    except Exception as error:  # a fault of ours: no traceback on a user who cannot mend it
        if arguments.debug:
            raise
        complain(f"unexpected {type(error).__name__}: {error}; please report it with the output of --debug")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="arcmerge", description="Merge language models at the speed of the disk.")
    parser.add_argument("--version", action="version", version=f"arcmerge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    merge = commands.add_parser("merge", help="merge models as a mergekit configuration says")
    merge.set_defaults(call=_merge)
    merge.add_argument("config", metavar="CONFIG", help="mergekit YAML file, or its text")
    merge.add_argument("out", metavar="OUT", type=Path, help="folder of the merged checkpoint")
    _add_model_options(merge)
    _add_output_options(merge)

    plan = commands.add_parser("plan", help="show the resolved parameters and the branch of every tensor")
    plan.set_defaults(call=_plan)
    plan.add_argument("config", metavar="CONFIG", help="mergekit YAML file, or its text")
    plan.add_argument("--json", action="store_true", help="print every tensor as JSON")
    plan.add_argument("--plot", metavar="FILE", type=_picture, help="draw the curve over the layers, as curve.png")
    _add_model_options(plan)

    inspect = commands.add_parser("inspect", help="compare two checkpoints: angles and lengths of their tensors")
    inspect.set_defaults(call=_inspect)
    inspect.add_argument("a", metavar="A", help="folder or hub name")
    inspect.add_argument("b", metavar="B", help="folder or hub name")
    inspect.add_argument("--json", action="store_true", help="print every tensor as JSON")
    inspect.add_argument("--plot", metavar="FILE", type=_picture, help="draw the angles as a heat map, as angles.png")
    _add_model_options(inspect)

    sweep = commands.add_parser("sweep", help="score many candidates of a merge without writing any")
    sweep.set_defaults(call=_sweep)
    add_sweep_arguments(sweep)
    _add_common_options(sweep)

    generate = commands.add_parser("generate", help="continue a prompt with a Gemma-2 model")
    generate.set_defaults(call=_generate)
    generate.add_argument("model", metavar="MODEL", help="folder or hub name")
    generate.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads standard input")
    generate.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    _add_running_options(generate)

    chat = commands.add_parser("chat", help="talk with an instruction-tuned Gemma-2 model")
    chat.set_defaults(call=_chat)
    chat.add_argument("model", metavar="MODEL", help="folder or hub name")
    _add_running_options(chat)

    doctor = commands.add_parser("doctor", help="show versions, processors and which backend serves what")
    doctor.set_defaults(call=_doctor)
    doctor.add_argument("--json", action="store_true", help="print as JSON")
    doctor.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N (default: CUDA if there is one)"
    )
    parser.add_argument("--cuda", action=switch, default=None, help="same as --device cuda, or cpu")
    parser.add_argument("--gpu-rich", action=switch, default=None, help="same as --cuda")
    parser.add_argument("-j", "--num-threads", "--threads", type=_count, dest="threads", help="compute threads")
    parser.add_argument("--allow-crimes", action=switch, default=False, help="let different architectures meet")
    parser.add_argument(
        "--unsafe-truncate-embeddings", action=switch, default=False, help="cut vocabularies to their common rows"
    )
    parser.add_argument("--transformers-cache", metavar="DIR", help="where the hub's files are kept")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="accepted; warnings are always shown")
    parser.add_argument("--quiet", "-q", action=switch, default=False, help="no progress bar, no closing line")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for flag, why in _WITHOUT_EFFECT.items():
        parser.add_argument(flag, action=switch, default=None, help=f"accepted; {why}")
    for flag, why in _VALUES_WITHOUT_EFFECT.items():
        parser.add_argument(flag, metavar="VALUE", help=f"accepted; {why}")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--out-shard-size",
        metavar="SIZE",
        type=_shard_size,
        default="5B",
        help="bytes a file, as 5B, 500M (default 5B)",
    )
    parser.add_argument(
        "--allow-nonfinite", action=switch, default=False, help="merge tensors that hold NaN or infinity"
    )
    parser.add_argument("--copy-tokenizer", action=switch, default=True, help="copy the base's tokenizer files")
    parser.add_argument("--write-model-card", action=switch, default=True, help="write README.md and the recipe")
    parser.add_argument("--safe-serialization", action=switch, default=True, help="must stay on: only safetensors")


def _add_running_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="most tokens of an answer (256)")
    parser.add_argument(
        "--sample", dest="do_sample", action=argparse.BooleanOptionalAction, help="draw tokens; else the likeliest"
    )
    parser.add_argument("--temperature", type=float, help="of the draw, which it implies; 0 takes the likeliest")
    parser.add_argument("--top-k", metavar="K", type=int, help="draw from the K likeliest; implies --sample")
    parser.add_argument("--top-p", metavar="P", type=float, help="draw from the likeliest that make up P; as above")
    parser.add_argument("--min-p", metavar="P", type=float, help="draw from those of at least P times the likeliest")
    parser.add_argument("--seed", type=int, help="of the draw (another each time)")
    parser.add_argument("--repetition-penalty", metavar="R", type=float, help="above 1 shuns repetition")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", help="end before this text or special token; repeatable"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32", "auto"], default="bfloat16", help="of the weights in use"
    )
    parser.epilog = "What is not given is as the model's generation_config.json says, or else as in brackets."
    _add_common_options(parser)


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("-j", "--num-threads", "--threads", type=_count, dest="threads", help="compute threads")
    parser.add_argument("--numerics", choices=["default", "hf"], default="default", help="hf rounds as transformers do")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress, no closing line")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _count(text: str) -> int:
    from arcmerge.merging.execution.workers import MOST_THREADS

    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MOST_THREADS}, got '{text}'")
    return int(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got '{text}'")
    return text


def _picture(text: str) -> Path:
    file = Path(text)
    if file.suffix not in (".png", ".pdf", ".svg", ".jpg"):
        raise argparse.ArgumentTypeError(f"must be a .png, .pdf, .svg or .jpg file, got '{text}'")
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of '{text}' must exist; create {file.parent} first")
    return file


def _shard_size(text: str) -> int:
    from arcmerge.checkpoint.layout import parse_size

    try:
        return parse_size(text)
    except ArcmergeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    from arcmerge.merging.options import Options

    for flag, why in {**_WITHOUT_EFFECT, **_VALUES_WITHOUT_EFFECT}.items():
        if getattr(arguments, flag[2:].replace("-", "_")) not in (None, False):
            note(f"{flag} has no effect: {why}")
    cuda = arguments.cuda if arguments.cuda is not None else arguments.gpu_rich
    if cuda is not None and arguments.device == "auto":
        arguments.device = "cuda" if cuda else "cpu"
    names = Options.__dataclass_fields__
    return {name: value for name, value in vars(arguments).items() if name in names}


def _merge(arguments: argparse.Namespace) -> None:
    from arcmerge.merging.merge import merge

    if not arguments.safe_serialization:
        raise ArcmergeError("--no-safe-serialization is not supported: pickle files can run code; leave the flag out")
    with progress_bar(arguments.quiet, "merging") as progress:
        report = merge(arguments.config, arguments.out, progress=progress, warn=warn, **_options(arguments))
    if not arguments.quiet:
        print(report)


def _plan(arguments: argparse.Namespace) -> None:
    from arcmerge.merging.inspect import tables
    from arcmerge.merging.merge import preview
    from arcmerge.merging.options import Options

    options = Options.of({**_options(arguments), "allow_nonfinite": True})
    with progress_bar(arguments.quiet, "measuring") as progress:
        prepared, grams = preview(arguments.config, options, progress=progress, warn=warn)
    rows = tables.plan_rows(prepared.plan, grams)
    print_json(rows) if arguments.json else tables.plan_table(prepared.plan, rows)
    if arguments.plot:
        from arcmerge.merging.inspect.plots import plot_curve

        plot_curve(rows, arguments.plot)
        note(f"drew {arguments.plot}")


def _inspect(arguments: argparse.Namespace) -> None:
    from arcmerge.merging.inspect import tables
    from arcmerge.merging.inspect.relations import as_json, pairs_of
    from arcmerge.merging.merge import preview
    from arcmerge.merging.options import Options

    options = Options.of({**_options(arguments), "allow_nonfinite": True})
    with progress_bar(arguments.quiet, "measuring") as progress:
        recipe = tables.pair_recipe(arguments.a, arguments.b)
        # Nothing comes of this recipe, so what its result would lack is no news.
        prepared, grams = preview(recipe, options, progress=progress, warn=lambda sentence: None)
    pairs = pairs_of(prepared.plan, grams)
    print_json(as_json(pairs)) if arguments.json else tables.inspect_table(arguments.a, arguments.b, pairs)
    if arguments.plot:
        from arcmerge.merging.inspect.plots import plot_angles

        plot_angles(pairs, arguments.plot)
        note(f"drew {arguments.plot}")


def _generate(arguments: argparse.Namespace) -> None:
    accept_any_text()
    prompt = _well_formed(read_text() if arguments.prompt == "-" else arguments.prompt)
    session = _session(arguments)
    _close(arguments, session.ask(prompt, chat=arguments.chat, show=_show))


def _chat(arguments: argparse.Namespace) -> None:
    accept_any_text()
    session = _session(arguments)
    session.require_template()
    if not arguments.quiet:
        note("Ctrl-D ends; /new forgets what was said")
    while True:
        try:
            said = _well_formed(input("> ")).strip()
        except EOFError:
            print()
            return
        if said == "/new":
            session.forget()
        elif said:
            try:
                _close(arguments, session.say(said, show=_show))
            except ArcmergeError as error:  # of this turn alone: the conversation goes on without it
                for problem in error.problems:
                    complain(problem)


def _session(arguments: argparse.Namespace) -> Any:
    from arcmerge.gemma2.generation.chat import Session

    return Session(_model(arguments), _running_options(arguments))


def _well_formed(said: str) -> str:
    from arcmerge.gemma2.text.tokenizer import well_formed

    if (text := well_formed(said)) != said:
        warn("the prompt has bytes that are not UTF-8; each is read as U+FFFD")
    return text


def _close(arguments: argparse.Namespace, answer: Any) -> None:
    """What comes below an answer."""
    print()
    for sentence in answer.notes:
        note(sentence)
    if not arguments.quiet:
        note(answer.summary())


def _sweep(arguments: argparse.Namespace) -> None:
    from arcmerge.sweeping.command import run
    from arcmerge.threads import use_threads

    use_threads(arguments.threads)
    said = run(arguments)
    if not arguments.quiet:
        print(said)


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _model(arguments: argparse.Namespace) -> Any:
    from arcmerge.gemma2.model import Gemma2
    from arcmerge.threads import use_threads

    use_threads(arguments.threads)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Gemma2.from_pretrained(arguments.model, arguments.device, arguments.dtype, arguments.numerics)
    for warning in caught:
        warn(str(warning.message))
    return model


def _running_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of Gemma2.generate; what shapes a draw asks for one, where --sample says nothing."""
    shapes = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    same = {name: getattr(arguments, name) for name in ("max_new_tokens", "seed", "repetition_penalty", "stop")}
    asked = True if any(value is not None for value in shapes.values()) else None
    return {**same, **shapes, "do_sample": asked if arguments.do_sample is None else arguments.do_sample}


def _doctor(arguments: argparse.Namespace) -> None:
    from arcmerge.doctor import examine, print_findings

    findings = examine()
    print_json(findings) if arguments.json else print_findings(findings)


_WHAT_AN_INTERRUPT_LEAVES = {
    _merge: "an older output is as it was",
    _plan: "nothing was merged",
    _inspect: "nothing was written",
    _sweep: "what was scored is kept, and the same command goes on from there",
    _generate: "the answer is incomplete",
    _chat: "the conversation is over",
    _doctor: "nothing was written",
}


if __name__ == "__main__":
    sys.exit(main())
