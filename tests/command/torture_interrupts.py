"""Interrupt commands at random moments: python tests/command/torture_interrupts.py [COUNT [SECONDS]]

Every run must end by 130 with one sentence, or by 0, and leave an older output whole and nothing beside it. Moments are
spread over the length of an undisturbed run, from the start of the process on. What comes before a line of ours runs,
while Python itself starts, is Python's own to answer: such runs are counted apart.
"""

from __future__ import annotations

import collections
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gemma2_models

COMMAND = str(Path(sys.executable).parent / "arcmerge")
# Fast commands run more often.
ORDER = ("merge", "plan", "merge", "generate", "plan", "merge", "sweep")


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(arguments: list[str], seconds: float, twice: bool) -> str:
    """Interrupt a run after some seconds. Returns "interrupted", "done", "early" or a description of a fault."""
    child = start(arguments)
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    if twice:
        time.sleep(random.random() * 0.02)
        child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=120)
    sentences = [line for line in said.splitlines() if "note:" not in line]
    if child.returncode == 130 and len(sentences) == 1 and sentences[0].startswith("arcmerge: interrupted; "):
        return "interrupted"
    if child.returncode == 0 and not sentences:
        return "done"
    if is_early(child.returncode, said):
        return "early"
    return f"{' '.join(arguments)} after {seconds:.3f} s: {child.returncode}, {said!r}"


def is_early(code: int, said: str) -> bool:
    """Whether Python was interrupted before it called arcmerge's `run`.

    It is then killed, or shows a traceback that does not lead through `run`, which blocks signals until they have
    handlers. Python itself loses an interrupt in the destructor of a lock or in the check of argv[0], and the run
    continues.
    """
    ours = ", in run\n" in said or said.startswith("arcmerge: ")
    lost = said.startswith(("Exception ignored in: ", "Failed checking if argv[0] is an import path entry\n"))
    return not ours and (code in (-signal.SIGINT, 1) or (code == 0 and lost))


def prepare(work: Path) -> dict[str, list[str]]:
    """Two models, and the commands that use them."""
    for name in ("a", "b"):
        gemma2_models.build(work / name, "2.6B", vocab_size=4096, intermediate_size=2048)
        gemma2_models.save_byte_tokenizer(work / name)
    recipe = work / "recipe.yml"
    recipe.write_text(
        f"models: [{{model: {work}/a}}, {{model: {work}/b}}]\nmerge_method: slerp\nbase_model: {work}/a\n"
        "parameters: {t: 0.4}\n"
    )
    (work / "text").write_text("Some words that are scored. " * 20)
    return {
        "merge": ["merge", str(recipe), str(work / "out"), "-q"],
        "plan": ["plan", str(recipe), "-q"],
        "generate": ["generate", str(work / "a"), "Once upon a time", "--max-new-tokens", "60", "-q"],
        "sweep": ["sweep", str(recipe), "--text", str(work / "text"), "--out", str(work / "sweep"), "-q"],
    }


def length(arguments: list[str]) -> float:
    """Seconds of the second undisturbed run, whose files are in the page cache."""
    for _ in range(2):
        child, started = start(arguments), time.monotonic()
        said = child.communicate()[1]
        if child.returncode:
            raise SystemExit(f"{' '.join(arguments)} fails by itself: {said}")
    return time.monotonic() - started


def main(count: int, seconds: float) -> int:
    work = Path(tempfile.mkdtemp(prefix="interrupts-"))
    commands = prepare(work)
    lengths = {name: length(arguments) for name, arguments in commands.items()}
    older = sorted(file.name for file in (work / "out").iterdir())
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    end = time.monotonic() + seconds
    for number in range(count):
        if time.monotonic() > end:
            break
        name = ORDER[number % len(ORDER)]
        if name == "sweep":
            shutil.rmtree(work / "sweep", ignore_errors=True)
        found = outcome(commands[name], random.random() * lengths[name] * 1.1, number % 3 == 0)
        left = [path.name for path in work.iterdir() if path.name.startswith(".out")]
        if left or sorted(file.name for file in (work / "out").iterdir()) != older:
            found = f"{found} of {name}, which left {left}"
        if found not in ("interrupted", "done", "early"):
            print(found, flush=True)
            found = "fault"
        outcomes[name, found] += 1
    faults = sum(times for (_, found), times in outcomes.items() if found == "fault")
    rows = ", ".join(f"{name} {found} {times}" for (name, found), times in sorted(outcomes.items()))
    print(f"{sum(outcomes.values())} interrupts, {faults} faults: {rows}", flush=True)
    shutil.rmtree(work)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(int((sys.argv[1:] or ["500"])[0]), float((sys.argv[2:] or ["inf"])[0])))
