"""Ctrl-C and SIGTERM at every moment give exit code 130 or 143 and one sentence, and leave no temporary files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

import gemma2_models
import tiny
from arcmerge.interrupts import Interrupted, check, held
from arcmerge.merging.execution.workers import Workers

ENTRY = "from arcmerge.__main__ import run; run()"


@pytest.fixture
def call(tmp_path: Path) -> list[str]:
    """The arguments of a merge."""
    a, b = tiny.make("gemma-a", tmp_path), tiny.make("gemma-b", tmp_path)
    recipe = {"merge_method": "slerp", "base_model": str(a), "models": [{"model": str(a)}, {"model": str(b)}]}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump({**recipe, "parameters": {"t": 0.4}}))
    return ["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out")]


def run(code: str, *arguments: str) -> tuple[int, str]:
    """The exit code and the standard error of Python code."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def interrupt_in(function: str, number: str = "SIGINT", times: int = 1) -> str:
    """Code that sends itself a signal whenever the command comes to a function, the first so many times."""
    module, _, path = function.partition(":")
    owner, _, name = path.rpartition(".")
    return (
        f"import os, signal, {module}\n"
        f"owner, left = {module}{'.' + owner if owner else ''}, [{times}]\n"
        f"def interrupted(*given, original=owner.{name}, **named):\n"
        "    while left[0] > 0:\n"
        f"        left[0] -= 1; os.kill(os.getpid(), signal.{number})\n"
        "    return original(*given, **named)\n"
        f"owner.{name} = interrupted\n{ENTRY}\n"
    )


MOMENTS = {
    "argument parsing": ("argparse:ArgumentParser.parse_args", "nothing was written"),
    "reading the recipe": ("arcmerge.merging.merge:prepare", "an older output is as it was"),
    "making the folder": ("pathlib:Path.mkdir", "an older output is as it was"),
    "allocation": ("os:posix_fallocate", "an older output is as it was"),
    "native code": ("arcmerge.merging.execution.cpu.processor:CpuProcessor.measure", "an older output is as it was"),
    "finishing files": ("arcmerge.checkpoint.writer:ShardFile.finish", "an older output is as it was"),
    "the rename": ("pathlib:Path.rename", "the output is complete"),
    "the last step": ("arcmerge.checkpoint.output_folder:OutputFolder.commit", "the output is complete"),
    "clearing": ("arcmerge.checkpoint.output_folder:OutputFolder._clear", "the output is complete"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_merge_ends_with_130_and_a_sentence_that_is_true(call: list[str], tmp_path: Path, moment: str) -> None:
    function, consequence = MOMENTS[moment]
    code, said = run(interrupt_in(function, times=2), *call)
    assert (code, said) == (130, f"arcmerge: interrupted; {consequence}\n")
    assert (tmp_path / "out").exists() == (consequence == "the output is complete")
    assert not list(tmp_path.glob(".out*"))


def test_an_interrupt_while_the_command_is_loaded_waits_for_its_handler() -> None:
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'arcmerge.interrupts':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.meta_path.insert(0, Finder())\n{ENTRY}"
    )
    assert run(code) == (130, "arcmerge: interrupted; nothing was written\n")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_other_ends_tidy_up_too(call: list[str], tmp_path: Path, name: str, code: int) -> None:
    found, said = run(interrupt_in("arcmerge.merging.execution.cpu.processor:CpuProcessor.measure", name), *call)
    assert (found, said) == (code, f"arcmerge: ended by {name}; an older output is as it was\n")
    assert not list(tmp_path.glob("*out*"))


def test_an_ignored_signal_stays_ignored(call: list[str], tmp_path: Path) -> None:
    code = interrupt_in("arcmerge.merging.execution.cpu.processor:CpuProcessor.measure", "SIGHUP")
    assert run(f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{code}", *call)[0] == 0
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("pause", [0.0, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.3])
def test_an_interrupt_at_any_moment_is_a_130_or_done(call: list[str], tmp_path: Path, pause: float) -> None:
    code = f"import arcmerge.interrupts as i; i.end_at_once('nothing was written'); print(flush=True); {ENTRY}"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *call, "-q"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(pause)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode in (0, 130)
    assert said.count("\n") == (child.returncode == 130)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("handler", ["default", "own"])
def test_a_program_gets_its_interrupt_when_the_threads_have_ended(handler: str) -> None:
    before, came = signal.getsignal(signal.SIGINT), []
    if handler == "own":
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    ended = threading.Event()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        ended.set()

    try:
        if handler == "own":
            Workers().run(lambda: None, (work, 1))
            assert came == [signal.SIGINT]
        else:
            with pytest.raises(KeyboardInterrupt):
                Workers().run(lambda: None, (work, 1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.is_set()


def test_an_interrupt_waits_in_a_held_block() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117, the order is what is tested
        with held():
            with held():
                signal.raise_signal(signal.SIGINT)
            steps.append("inner")
            with pytest.raises(Interrupted):
                check()
            steps.append("end")
    assert steps == ["inner", "end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_threads_that_the_system_does_not_give_stop_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def scarce(self: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    workers = Workers()

    def work() -> None:
        while workers.failure is None:
            time.sleep(0.01)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    with pytest.raises(RuntimeError, match="new thread"):
        workers.run(lambda: None, (work, 3))
    started[0].join(5)
    assert not started[0].is_alive()


EXIT = """
import sys, threading, time, numpy
from arcmerge import _C
x = numpy.zeros(1 << 22, numpy.float32)
def work():
    while True:
        _C.count_nonfinite(_C.Operand(x.ctypes.data, 2), 0, x.size)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
sys.exit(3)
"""


def test_a_process_may_end_while_a_daemon_thread_computes() -> None:
    for _ in range(3):
        assert run(EXIT) == (3, "")


GENERATING = """
import sys, threading, time, arcmerge
model = arcmerge.Gemma2.from_pretrained(sys.argv[1])
def work():
    while True:
        model.generate([2, 7], max_new_tokens=50)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.5)
"""


CALLING = """
import threading, time, torch
from arcmerge import ops
def work():
    while True:
        ops.rmsnorm(torch.ones(4, 64), torch.zeros(64), eps=1e-6)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
"""


def test_a_process_may_end_while_a_daemon_thread_calls_an_op() -> None:
    for _ in range(3):
        assert run(CALLING) == (0, "")


def test_a_process_may_end_while_a_daemon_thread_generates(tmp_path: Path) -> None:
    gemma2_models.build(
        tmp_path, "2.6B", torch.float32, num_hidden_layers=1, vocab_size=259, max_position_embeddings=64
    )
    for _ in range(3):
        assert run(GENERATING, str(tmp_path)) == (0, "")


TOLD = """
import arcmerge.cli.doctor, os, signal, time
from arcmerge import interrupts
def call(arguments):
    {start}
def remove(*_, **named):
    os.kill(os.getpid(), signal.SIGINT)
interrupts.shutil.rmtree = remove
interrupts.remove_at_end("folder")
arcmerge.cli.doctor.run, arcmerge.cli.doctor.INTERRUPTED = call, "x"
tell = interrupts.tell
interrupts.tell = lambda complain: [tell(complain), os.kill(os.getpid(), signal.SIGINT), time.sleep(1)]
"""


@pytest.mark.parametrize("start", ["raise KeyboardInterrupt", "os.kill(os.getpid(), signal.SIGINT); time.sleep(1)"])
def test_a_second_interrupt_has_no_second_sentence(start: str) -> None:
    assert run(TOLD.format(start=start) + ENTRY, "doctor") == (130, "arcmerge: interrupted; x\n")


HOSTS = {
    "lm_eval": "the evaluation is incomplete",
    "mergekit": "nothing was written",
}


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_ends_with_130_and_a_sentence(tmp_path: Path, host: str) -> None:
    (tmp_path / f"{host}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += f"import runpy; runpy.run_module('arcmerge.integrations.{host}', run_name='__main__')"
    assert run(code) == (130, f"arcmerge: interrupted; {HOSTS[host]}\n")


CHAT = f"""
import arcmerge.cli.chat, arcmerge.gemma2.generation.chat
arcmerge.cli.chat.load = lambda arguments: None
arcmerge.gemma2.generation.chat.Chat = lambda model, **options: None
{ENTRY}
"""


def test_ctrl_c_at_the_prompt_of_a_chat_ends_it_and_leaves_the_terminal_as_it_was() -> None:
    main, terminal = os.openpty()
    before = termios.tcgetattr(terminal)
    # The terminal of a session of its own, to whose processes Ctrl-C goes.
    code = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{CHAT}"
    command = [sys.executable, "-c", code, "chat", "model"]
    child = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    said = b""
    while not said.endswith(b"> "):
        said += os.read(main, 1000)
    for _ in range(100):  # one that comes between the prompt and the wait for a line is heard with the next
        os.write(main, b"\x03")
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.3)
            break
    assert child.wait(1) == 130
    said += os.read(main, 1000)
    assert termios.tcgetattr(terminal) == before
    assert b"arcmerge: interrupted; the conversation is over" in said
    assert b"Traceback" not in said
    os.close(main)
    os.close(terminal)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that run, and a recipe and a text for a sweep of them."""
    made = tmp_path_factory.mktemp("running")
    for name in ("a", "b"):
        gemma2_models.build(made / name, "2.6B", num_hidden_layers=2)
        gemma2_models.save_byte_tokenizer(made / name)
    models = [{"model": str(made / name)} for name in ("a", "b")]
    recipe = {"merge_method": "slerp", "base_model": models[0]["model"], "models": models, "parameters": {"t": 0.4}}
    (made / "recipe.yml").write_text(yaml.safe_dump(recipe))
    (made / "text").write_text("Some words that are scored.")
    return made


def test_an_answer_is_said_to_be_incomplete(folder: Path) -> None:
    moment = interrupt_in("arcmerge.gemma2.generation.sampler:Sampler.choose")
    assert run(moment, "generate", str(folder / "a"), "Words") == (
        130,
        "arcmerge: interrupted; the answer is incomplete\n",
    )


def test_a_sweep_goes_on_from_where_it_was_interrupted(folder: Path) -> None:
    out = folder / "sweep"
    call = ["sweep", str(folder / "recipe.yml"), "--text", str(folder / "text"), "--out", str(out), "-q"]
    consequence = "the scored candidates are kept, and the same command resumes the sweep"
    assert run(interrupt_in("arcmerge.sweeping.journal:Journal.add"), *call) == (
        130,
        f"arcmerge: interrupted; {consequence}\n",
    )
    kept = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "best.yml" in kept
    code, said = run(ENTRY, *call)
    assert code == 0, said
    (journal,) = [name for name in kept if name.endswith(".jsonl")]
    assert (out / journal).read_bytes().startswith(kept[journal])
